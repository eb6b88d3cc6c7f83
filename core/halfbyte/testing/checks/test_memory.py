"""Guard words stay whole, inputs stay as they are, nothing outside an input or before a write is read."""

from __future__ import annotations

from torch import Tensor

from halfbyte.testing import cases, compare, guard


def guarded(case: cases.Case, size: str, fill: int) -> tuple[tuple[Tensor, ...], str]:
    """The results of one call between guard words, and what it did wrong."""
    placed = guard.Placed(case.args(size), fill)
    with guard.Arena(fill) as arena:
        found = cases.results(case.op, case.kernel.function, placed.args)
    wrong = arena.overwritten()
    if over := placed.overwritten():
        wrong = wrong or f"writes outside argument {over[0]}"
    if not cases.written(case.op):
        tensors = [arg for arg in placed.args if isinstance(arg, Tensor)]
        own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        if changed := placed.changed():
            wrong = wrong or f"changes input {changed[0]}, or the memory around it"
        if any(one.numel() and one.untyped_storage().data_ptr() in own for one in found):
            wrong = wrong or "gives a result that shares memory with an input"
    return found, wrong


def test_kernel_stays_inside_its_memory(typical: cases.Case) -> None:
    for size in typical.sizes("usual", "vector", "partial", "odd", "one"):
        first, wrong = guarded(typical, size, 0x00)
        assert not wrong, f"{typical.title}, size {size}: {wrong}"
        # As floats, bytes of 0xFF are NaN: whatever is read outside an input, or before it is written, shows.
        second, wrong = guarded(typical, size, 0xFF)
        assert not wrong, f"{typical.title}, size {size}: {wrong}"
        assert compare.same_bits(first, second), (
            f"{typical.title}, size {size}: the result depends on memory outside the inputs, or not initialised"
        )
