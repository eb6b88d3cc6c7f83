"""What "agrees" means: bit for bit, or within the op's tolerance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernel import show
from ..op import Op


def disagreement(op: Op, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Where results differ from what is expected, in a sentence; empty where they agree.

    Bit for bit, except that any NaN is as good as another; within the op's tolerance for the dtypes it names.
    """
    if len(actual) != len(expected):
        return f"gives {len(actual)} tensors, not {len(expected)}"
    for place, (got, want) in enumerate(zip(actual, expected)):
        got, want = got.detach().cpu(), want.detach().cpu()
        if got.dtype is not want.dtype or got.shape != want.shape:
            return f"result {place} is {show(got.dtype)} {tuple(got.shape)}, not {show(want.dtype)} {tuple(want.shape)}"
        wrong = ~_same(got, want, op.tolerance.get(want.dtype))
        if wrong.any():
            return _describe(place, got, want, wrong)
    return ""


def _same(got: Tensor, want: Tensor, tolerance: tuple[float, float] | None) -> Tensor:
    if not want.is_floating_point():
        return got == want if tolerance is None else (got.long() - want.long()).abs() <= tolerance[1]
    both_nan = got.isnan() & want.isnan()
    if tolerance is None:
        return both_nan | ((got == want) & (got.signbit() == want.signbit()))
    rtol, atol = tolerance
    a, b = got.double(), want.double()
    near = (a - b).abs() <= atol + rtol * b.abs()
    return both_nan | (a == b) | (near & a.isfinite() & b.isfinite())


def _describe(place: int, got: Tensor, want: Tensor, wrong: Tensor) -> str:
    count, index = int(wrong.sum()), tuple(int(i) for i in wrong.nonzero()[0])
    at = f"[{', '.join(map(str, index))}]"
    return (
        f"{count} of {wrong.numel()} values of result {place} differ; the first, {at}, is {got[index].item()!r}, "
        f"not {want[index].item()!r}"
    )


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two calls gave the same bytes."""
    return len(a) == len(b) and all(torch.equal(as_bytes(one), as_bytes(other)) for one, other in zip(a, b))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
