"""The real bitsandbytes in a process of its own: answers pickled requests (name, arguments) on its pipes.

Run by the `oracle` fixture of conftest.py and never imported: bitsandbytes must not meet the drop-in or the tests'
settings.  Both ends are our own, so pickle is safe here.
"""

import os
import pickle
import sys
import traceback

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its fallbacks compile themselves, which takes a minute and changes nothing
replies = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what libraries print must not end up among the replies

import bitsandbytes as bnb  # noqa: E402
import bitsandbytes.functional as F  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)


def version():
    return bnb.__version__


def quantize_4bit(x, quant_type, blocksize, nested=False, storage=torch.uint8):
    """(packed, unpacked dictionary of the state)"""
    packed, state = F.quantize_4bit(
        x, quant_type=quant_type, blocksize=blocksize, compress_statistics=nested, quant_storage=storage
    )
    return packed, state.as_dict()


def dequantized(packed, state):
    return F.dequantize_4bit(packed, state).reshape(state.shape)  # of one dimension, their CPU kernel makes two


def dequantize_4bit(packed, state):
    return dequantized(packed, F.QuantState.from_dict(dict(state), device="cpu"))


def quantize_blockwise(x, code, blocksize):
    codes, state = F.quantize_blockwise(x, code=code, blocksize=blocksize)
    return codes, state.absmax


def dequantize_blockwise(codes, absmax, code, blocksize, dtype):
    return torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, blocksize, dtype)


def int8_vectorwise_quant(x, threshold):
    return F.int8_vectorwise_quant(x.clone(), threshold)


def int8_vectorwise_dequant(q, stats):
    return F.int8_vectorwise_dequant(q, stats)


def int8_linear_matmul(a, b):
    return F.int8_linear_matmul(a, b)


def linear_int8(x, weight, bias, threshold):
    """(CB, SCB, y) of a Linear8bitLt."""
    layer = bnb.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False, threshold=threshold
    )
    layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        y = layer(x)
    return layer.state.CB, layer.state.SCB, y


def save_4bit(path, x, quant_type, blocksize, nested, storage=torch.uint8):
    """Write a tensor and its state as bitsandbytes' checkpoints do; what it decodes to."""
    packed, state = F.quantize_4bit(
        x, quant_type=quant_type, blocksize=blocksize, compress_statistics=nested, quant_storage=storage
    )
    save_file({"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}, path)
    return dequantized(packed, state)


def load_4bit(path):
    stored = load_file(path)
    packed = stored.pop("w")
    return dequantized(packed, F.QuantState.from_dict(stored, device="cpu"))


def json_4bit(path):
    stored = load_file(path)
    (blob,) = [value for key, value in stored.items() if ".quant_state." in key]
    return bytes(blob.tolist()).decode(), sorted(stored)


def create_map(name, args):
    return getattr(F, name)(*args)


def main():
    while True:
        try:
            name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = (True, globals()[name](*args, **kwargs))
        except Exception:
            reply = (False, traceback.format_exc())
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main()
