"""What a quantized layer becomes in a checkpoint: the tensors themselves, and their sizes without the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import formats, functional
from ..errors import FormatError
from ..nn.params8bit import fits_float16
from ..quant_state import QuantState
from .architecture import Layer
from .checkpoint import Stored
from .options import Options

# Elements that are dequantized at a time to measure the error: a multiple of every nested block (4096 * 256).
_SLAB = 1 << 20

# A nested offset is a float32 written as the nearest double: most take 20 characters ("0.032782569527626038").
_OFFSET = 0.0123456789012345678


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """What became of one layer.

    norm     Frobenius norm of the weight
    error    the same of what quantizing changed, divided by `norm`
    """

    module: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    norm: float
    error: float

    @property
    def kind(self) -> str:
        return self.module.rpartition(".")[2]


def quantize_stored(layer: Layer, stored: Tensor, options: Options) -> tuple[dict[str, Tensor], ConvertedLayer]:
    """The checkpoint entries of a layer's weight, on the CPU, and what quantizing did to it."""
    weight = stored.to(options.device)
    weight = weight.T.contiguous() if layer.transposed else weight
    entries, squares, change = (_int8 if options.format == "int8" else _4bit)(layer, weight, options)
    norm, change = math.sqrt(squares), math.sqrt(change)
    nbytes = sum(entry.nbytes for entry in entries.values())
    error = change / norm if norm else change
    report = ConvertedLayer(layer.module, tuple(weight.shape), stored.nbytes, nbytes, norm, error)
    return {name: entry.cpu().contiguous() for name, entry in entries.items()}, report


def describe(layer: Layer, stored: Stored, options: Options) -> dict[str, int]:
    """Bytes of each entry that `quantize_stored` gives, from the header alone.

    Exact, except for the JSON blob of nested statistics: its length follows the digits of the layer's offset (a few
    bytes).
    """
    shape = stored.shape[::-1] if layer.transposed else stored.shape
    numel = math.prod(shape)
    if options.format == "int8":
        stem = layer.tensor.removesuffix("weight")
        return {layer.tensor: numel, f"{stem}SCB": 4 * shape[0], f"{stem}weight_format": 1}
    blocks = -(-numel // options.blocksize)
    state = QuantState(
        absmax=torch.empty(blocks, device="meta", dtype=torch.uint8 if options.nested else torch.float32),
        shape=shape,
        code=torch.empty(16, device="meta"),
        blocksize=options.blocksize,
        quant_type=options.format,
        dtype=stored.torch_dtype,
    )
    if options.nested:
        groups = -(-blocks // formats.NESTED_BLOCKSIZE)
        state.offset = torch.tensor(_OFFSET, dtype=torch.float32)
        state.state2 = QuantState(
            absmax=torch.empty(groups, device="meta"),
            code=torch.empty(256, device="meta"),
            blocksize=formats.NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    beside = {f"{layer.tensor}.{key}": int(value.nbytes) for key, value in state.as_dict(packed=True).items()}
    return {layer.tensor: -(-numel // 2), **beside}


def _4bit(layer: Layer, weight: Tensor, options: Options) -> tuple[dict[str, Tensor], float, float]:
    packed, state = functional.quantize_4bit(
        weight, format=options.format, blocksize=options.blocksize, nested=options.nested
    )
    flat, codes = weight.reshape(-1), packed.reshape(-1)
    squares = change = 0.0
    for start in range(0, flat.numel(), _SLAB):
        part = state.sliced(start, start + _SLAB)
        if part is None:
            raise FormatError(f"{layer.tensor} cannot be cut at element {start}")
        restored = functional.dequantize_4bit(codes[start // 2 : (start + _SLAB) // 2], part)
        now = _squares(flat[start : start + _SLAB], restored)
        squares, change = squares + now[0], change + now[1]
    beside = {f"{layer.tensor}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {layer.tensor: packed, **beside}, squares, change


def _int8(layer: Layer, weight: Tensor, options: Options) -> tuple[dict[str, Tensor], float, float]:
    """The same as `quantize_rows_as_fp16`, some rows at a time: rows do not depend on each other."""
    rows = max(_SLAB // max(weight.shape[1], 1), 1)
    slabs = [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]
    half = all(fits_float16(weight[some]) for some in slabs)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[:1], dtype=torch.float32, device=weight.device)
    squares = change = 0.0
    for some in slabs:
        slab = weight[some].contiguous()
        codes[some], absmax[some], _ = functional.quantize_int8_rows(slab.half() if half else slab)
        now = _squares(slab, functional.dequantize_int8(codes[some], absmax[some]))
        squares, change = squares + now[0], change + now[1]
    stem = layer.tensor.removesuffix("weight")
    entries = {
        layer.tensor: codes,
        f"{stem}SCB": absmax,
        f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return entries, squares, change


def _squares(weight: Tensor, restored: Tensor) -> tuple[float, float]:
    """Sums of squares of a slab, and of what quantizing changed in it."""
    wide = weight.float()
    norm = float(torch.linalg.vector_norm(wide))
    change = float(torch.linalg.vector_norm(wide - restored.float().view_as(wide)))
    return norm**2, change**2
