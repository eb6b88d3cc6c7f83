"""Inputs that break kernels: empty, one element, odd values, storages with gaps and offsets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor
from torch.utils import _pytree as pytree

from halfbyte.testing import cases, compare, guard


def run(case: cases.Case, size: str, values: str = "normal", layout: Callable[[Tensor], Tensor] | None = None) -> str:
    """How the kernel differs from the reference, in a sentence."""
    args = case.args(size, values)
    expected = cases.to_device(case.expected(size, values), case.facts.device)
    want = case.recipe.specified(args, expected)
    if layout is not None:
        kept = () if layout is guard.offset else cases.written(case.op)  # these an op may want contiguous
        args = tuple(
            arg if place in kept else pytree.tree_map_only(Tensor, layout, arg) for place, arg in enumerate(args)
        )
    found = cases.results(case.op, case.kernel.function, args)
    if [one.shape for one in found] == [one.shape for one in want]:
        found = case.recipe.specified(args, found)
    return compare.disagreement(case.op, found, want)


@pytest.mark.parametrize("size", ["empty", "one"])
def test_kernel_takes_almost_nothing(typical: cases.Case, size: str) -> None:
    for name in typical.sizes(size):
        wrong = run(typical, name)
        assert not wrong, f"{typical.title}, size {name}: {wrong}"


@pytest.mark.parametrize("layout", [guard.strided, guard.transposed, guard.offset], ids=lambda layout: layout.__name__)
def test_kernel_reads_any_layout(typical: cases.Case, layout: Callable[[Tensor], Tensor]) -> None:
    for size in typical.sizes("usual", "partial", "odd"):
        wrong = run(typical, size, layout=layout)
        assert not wrong, f"{typical.title}, size {size}, {layout.__name__} tensors: {wrong}"


def test_kernel_takes_any_values(odd: tuple[cases.Case, str]) -> None:
    case, values = odd
    for size in case.sizes("usual", "odd", *(["many"] if values in ("ties", "edges") else [])):
        wrong = run(case, size, values)
        assert not wrong, f"{case.title}, size {size}, {values} values: {wrong}"
