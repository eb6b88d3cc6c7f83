"""How long calls keep the host busy: layers and optimizers of halfbyte, in turns with torch's.

    python host_time.py [--device cuda] [--cases REGEX] [--profile]

Microseconds, the least of many runs.  "eval" is one row through one layer; "train" is forward and backward of a layer
in a chain of twelve, each by torch's product, two slabs in the backward; "lora" is that layer in peft's.  torch is
nn.Linear, and its fused AdamW.

On "cpu" a GPU module computes nothing on CPU tensors, and the thread's own time is taken: Python and torch alone.  On
"cuda" it is the time until all is launched, of sizes with little to compute.
"""

import argparse
import cProfile
import functools
import pstats
import re
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

import halfbyte
from halfbyte import native_gpu, native_gpu_optimizer, optim
from halfbyte import nn as layers
from halfbyte._runtime import dispatcher
from halfbyte_cuda import linear4bit

CHAIN = 12


@dataclass(frozen=True)
class Setup:
    """Where and on what to measure.

    shape    in and out of a layer that evaluates, of a size that the tensor-core kernels take
    size     of a layer that trains, which has so many rows that they do not
    """

    device: str
    dtype: torch.dtype
    shape: tuple[int, int]
    size: int
    rows: int
    rounds: int


SETUPS = {
    "cpu": Setup("cpu", torch.float32, (256, 32), 128, 4, 200),
    "cuda": Setup("cuda", torch.bfloat16, (1024, 1024), 512, 1536, 12),
}


class Module:
    """A _C whose functions do nothing."""

    few_rows, UPDATE_FIELDS, UPDATE_TENSOR_BYTES, COEFFICIENTS_BYTES = 1, 9, 128, 64

    def __getattr__(self, name):
        setattr(self, name, lambda *args: 1)
        return getattr(self, name)


class Nothing(halfbyte.Backend):
    """What the CUDA backend offers on sm_90, over that module."""

    name = "nothing"
    device_types = frozenset({"cpu"})
    priority = 1000

    def kernels(self):
        module = Module()
        yield from native_gpu.kernels(module)
        yield from native_gpu_optimizer.kernels(module)
        ways = linear4bit.linear_4bit, linear4bit.bind_linear_4bit
        function, bind = (functools.partial(way, module) for way in ways)
        yield halfbyte.Kernel("linear_4bit", function, bind=bind, priority=10, variant="sm_90a")


# -- cases -----------------------------------------------------------------------------------------------------


def linear(setup, k, n, bias=False):
    return nn.Linear(k, n, bias, dtype=setup.dtype).requires_grad_(False).to(setup.device)


def four_bits(setup, k, n, bias=False, nested=False):
    layer = layers.Linear4bit(k, n, bias, setup.dtype, nested, "nf4")
    if bias:
        layer.bias = nn.Parameter(layer.bias.to(setup.dtype), requires_grad=False)
    return layer.to(setup.device)


def eight_bits(setup, k, n):
    return layers.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0).to(setup.device)


def in_lora(make, setup, k, n):
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    model.layer = make(setup, k, n)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["layer"]), autocast_adapter_dtype=False)
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.to(setup.dtype)
    return model.base_model.model.layer


def evaluating(make, setup):
    layer = make(setup, *setup.shape).eval()
    x = torch.randn(1, setup.shape[0], device=setup.device, dtype=setup.dtype)

    @torch.no_grad()
    def run(times):
        for _ in range(times):
            layer(x)

    return run, 1


def training(make, setup):
    size = setup.size
    model = nn.Sequential(*(make(setup, size, size) for _ in range(CHAIN))).train()
    x = torch.randn(1, setup.rows, size, device=setup.device, dtype=setup.dtype, requires_grad=True)
    dy = torch.ones_like(x)

    def run(times):
        for _ in range(times):
            model(x).backward(dy)

    return run, CHAIN


def stepping(make, setup, count):
    params = [nn.Parameter(torch.randn(4096, device=setup.device, dtype=setup.dtype)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn_like(param)
    step = make(params).step

    def run(times):
        for _ in range(times):
            step()

    return run, 1


KINDS = {
    "Linear4bit": four_bits,
    "Linear4bit, nested": functools.partial(four_bits, nested=True),
    "Linear8bitLt": eight_bits,
}
BIASED = [functools.partial(make, bias=True) for make in (four_bits, linear)]
ADAMW = [lambda params: optim.AdamW8bit(params, lr=1e-4), lambda params: torch.optim.AdamW(params, 1e-4, fused=True)]
CASES = {
    **{f"eval, {name}": (evaluating, make, linear) for name, make in KINDS.items()},
    "eval, Linear4bit, bias": (evaluating, *BIASED),
    **{f"train, {name}": (training, make, linear) for name, make in KINDS.items()},
    **{
        f"train, {name}, in lora": (training, *(functools.partial(in_lora, one) for one in (make, linear)))
        for name, make in KINDS.items()
    },
    **{f"AdamW8bit, tensors: {count}": (functools.partial(stepping, count=count), *ADAMW) for count in (1, 10)},
}


# -- measuring -------------------------------------------------------------------------------------------------


def measure(setup, *runs, times=10):
    """Microseconds of each, in turns."""
    on_gpu = setup.device == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time
    least = [float("inf")] * len(runs)
    for _ in range(setup.rounds):
        for i, (run, parts) in enumerate(runs):
            if on_gpu:
                torch.cuda.synchronize()
            started = clock()
            run(times)
            least[i] = min(least[i], (clock() - started) / times / parts * 1e6)
    return least


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SETUPS, default="cpu")
    parser.add_argument("--cases", default=".*", metavar="REGEX", help="only those whose name contains a match")
    parser.add_argument("--profile", action="store_true", help="say where ours spends its time, too")
    arguments = parser.parse_args()
    setup = SETUPS[arguments.device]
    torch.set_num_threads(1)
    if setup.device == "cpu":
        hook = halfbyte.hookimpl(lambda: [Nothing()])
        dispatcher.plugins.add("nothing", "docs/benchmarks", lambda: SimpleNamespace(halfbyte_backends=hook))
        dispatcher.forget()
    native_gpu._LEAST = 1 << 10  # two slabs of a small weight, as of a large one
    print("| µs | halfbyte | torch | difference |\n|---|--:|--:|--:|")
    for name, (prepare, ours, theirs) in CASES.items():
        if re.search(arguments.cases, name):
            runs = prepare(ours, setup), prepare(theirs, setup)
            own, other = measure(setup, *runs)
            print(f"| {name} | {own:.1f} | {other:.1f} | {own - other:.1f} |", flush=True)
            if arguments.profile:
                with cProfile.Profile() as profile:
                    runs[0][0](300)
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
