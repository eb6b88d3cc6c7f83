"""What is timed, for halfbyte, for bitsandbytes, and for plain torch as the yardstick.

A case's `prepare(library)` returns the call to time.  Inputs are random, equal for all libraries, and made outside the
timed region; layers are prepared as their library wants them (bitsandbytes repacks on its first evaluation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One thing to time.

    name       what is done, on what
    libraries  that can do it
    prepare    library -> the call
    inference  time it in torch.inference_mode
    """

    name: str
    libraries: tuple[str, ...]
    prepare: Callable[[str], Call]
    inference: bool = True


def cases() -> list[Case]:
    """Every case, in the order of the table."""
    found = [_linear("nf4", 4096, 4096, m, torch.bfloat16) for m in (1, 4, 16, 128)]
    found += [_linear("nf4", 4096, 4096, m, torch.float32) for m in (1, 128)]
    found += [_linear("int8", 4096, 4096, m, torch.bfloat16) for m in (1, 128)]
    for dtype in (torch.float32, torch.bfloat16):
        found += [_quantize_4bit(dtype), _dequantize_4bit(dtype), _quantize_8bit(dtype), _dequantize_8bit(dtype)]
    found += [_step(name, [ELEMENTS]) for name in ("AdamW8bit", "Lion8bit", "SGD8bit", "AdEMAMix8bit", "AdamW32bit")]
    return [*found, _step("AdamW8bit", [1000] * 10_000)]


ELEMENTS = 2**24


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).mul_(0.02).to(dtype)


def _linear(format: str, n: int, k: int, m: int, dtype: torch.dtype) -> Case:
    def prepare(library: str) -> Call:
        x = _random(m, k, dtype=dtype) * 50
        if library == "torch":
            layer: nn.Module = nn.Linear(k, n, bias=False, dtype=dtype)
        else:
            layers = _module(library).nn
            if format == "int8":
                layer = layers.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
            else:
                layer = layers.Linear4bit(
                    k, n, bias=False, compute_dtype=dtype, quant_type=format, compress_statistics=False
                )
        layer.weight.data = _random(n, k, dtype=dtype)
        layer = layer.to("cpu").eval()
        return lambda: layer(x)

    name = f"{format} linear {n}x{k}, {_name(dtype)}, M={m}"
    return Case(name, ("halfbyte", "bitsandbytes", "torch"), prepare)


def _quantize_4bit(dtype: torch.dtype) -> Case:
    def prepare(library: str) -> Call:
        x, functional = _random(ELEMENTS, dtype=dtype), _module(library).functional
        if library == "halfbyte":
            return lambda: functional.quantize_4bit(x, format="nf4", blocksize=64)
        return lambda: functional.quantize_4bit(x, quant_type="nf4", blocksize=64)

    return Case(f"quantize_4bit nf4, 2^24 {_name(dtype)}", ("halfbyte", "bitsandbytes"), prepare)


def _dequantize_4bit(dtype: torch.dtype) -> Case:
    def prepare(library: str) -> Call:
        x, functional = _random(ELEMENTS, dtype=dtype), _module(library).functional
        options = {"format": "nf4"} if library == "halfbyte" else {"quant_type": "nf4"}
        packed, state = functional.quantize_4bit(x, blocksize=64, **options)
        return lambda: functional.dequantize_4bit(packed, state)

    return Case(f"dequantize_4bit nf4, 2^24 {_name(dtype)}", ("halfbyte", "bitsandbytes"), prepare)


def _quantize_8bit(dtype: torch.dtype) -> Case:
    def prepare(library: str) -> Call:
        x, functional = _random(ELEMENTS, dtype=dtype), _module(library).functional
        if library == "halfbyte":
            return lambda: functional.quantize_8bit(x, blocksize=256)
        return lambda: functional.quantize_blockwise(x, blocksize=256)

    return Case(f"quantize_8bit, 2^24 {_name(dtype)}", ("halfbyte", "bitsandbytes"), prepare)


def _dequantize_8bit(dtype: torch.dtype) -> Case:
    def prepare(library: str) -> Call:
        x, functional = _random(ELEMENTS, dtype=dtype), _module(library).functional
        if library == "halfbyte":
            codes, state = functional.quantize_8bit(x, blocksize=256)
            return lambda: functional.dequantize_8bit(codes, state)
        codes, state = functional.quantize_blockwise(x, blocksize=256)
        return lambda: functional.dequantize_blockwise(codes, state)

    return Case(f"dequantize_8bit, 2^24 {_name(dtype)}", ("halfbyte", "bitsandbytes"), prepare)


def _step(name: str, sizes: list[int]) -> Case:
    """One step of an optimizer over fp32 parameters; torch stands for its fused AdamW."""

    def prepare(library: str) -> Call:
        params = [nn.Parameter(_random(n, dtype=torch.float32)) for n in sizes]
        for param in params:
            param.grad = _random(param.numel(), dtype=torch.float32)
        if library == "torch":
            return torch.optim.AdamW(params, lr=1e-4, fused=True).step
        momentum = {"momentum": 0.9} if name.startswith("SGD") else {}
        step: Call = getattr(_module(library).optim, name)(params, lr=1e-4, **momentum).step
        return step

    what = "2^24 parameters" if sizes == [ELEMENTS] else f"{len(sizes):,} tensors of {sizes[0]:,} parameters"
    libraries = ("halfbyte", "bitsandbytes", "torch") if name.startswith("AdamW") else ("halfbyte", "bitsandbytes")
    return Case(f"{name}, {what}, fp32", libraries, prepare, inference=False)


def _module(library: str) -> Any:
    if library == "halfbyte":
        import halfbyte

        return halfbyte
    import bitsandbytes

    return bitsandbytes
