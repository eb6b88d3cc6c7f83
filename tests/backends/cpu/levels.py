"""What the tests of the CPU backend share: its kernels by level, awkward inputs, bitwise comparison."""

import functools

import pytest
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

try:
    from halfbyte_cpu import _C
    from halfbyte_cpu import kernels as adapters
    from halfbyte_cpu import optimizer as updates
except ImportError:  # a pure-Python build
    _C = None


def kernels(op):
    """(level, function of the op's arguments) of every level that this machine runs."""
    if _C is None:
        return []
    return [
        (level, functools.partial(getattr(updates if op.startswith("update_") else adapters, op), functions[op]))
        for level, functions in _C.levels().items()
        if op in functions and _C.supports(level)
    ]


def for_each_level(op):
    """Run a test once per level and for 1 and 2 threads, with `kernel` bound."""
    found = kernels(op)
    if not found:
        return pytest.mark.skip(reason="halfbyte_cpu._C is not built")

    def with_threads(level, count, function):
        def call(*args):
            before = torch.get_num_threads()
            torch.set_num_threads(count)
            try:
                return function(*args)
            finally:
                torch.set_num_threads(before)

        call.level = level
        return call

    return pytest.mark.parametrize(
        "kernel",
        [
            pytest.param(with_threads(level, count, function), id=f"{level}-{count}")
            for level, function in found
            for count in (1, 2)
        ],
    )


def odd_values(n, dtype, seed):
    """Normal values over many magnitudes, with zeros, a zero stretch, NaN and, at the end, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.rand(n, generator=generator) ** 4
    if n > 20:
        x[3] = 0.0
        x[5] = -0.0
        x[7] = float("nan")
        x[n // 2 : n // 2 + 70] = 0.0
        x[n - 3] = 1e-40
    return x.to(dtype)


def on_offset(x):
    """The same values in storage that starts one element off."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    storage[1:] = x.reshape(-1)
    return storage[1:].view(x.shape)


def same(result, expected):
    """Equal in every bit but NaN's."""
    assert result.dtype is expected.dtype
    assert result.shape == expected.shape
    nan = torch.isnan(expected) if expected.dtype.is_floating_point else torch.zeros_like(expected, dtype=torch.bool)
    if expected.dtype.is_floating_point:
        assert torch.equal(torch.isnan(result), nan)
        integers = torch.int32 if expected.dtype is torch.float32 else torch.int16
        result, expected = result.contiguous().view(integers), expected.contiguous().view(integers)
    wrong = ((result != expected) & ~nan).nonzero()
    assert not len(wrong), f"{len(wrong)} of {result.numel()} differ, first at {wrong[0].tolist()}"
