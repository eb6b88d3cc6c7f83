"""Every kernel agrees with the stored results of an oracle that shares nothing with the reference."""

from __future__ import annotations

from halfbyte.testing import cases, compare, golden


def test_kernel_agrees_with_golden_vector(vector: tuple[cases.Case, golden.Vector]) -> None:
    case, stored = vector
    found = cases.results(case.op, case.kernel.function, cases.to_device(stored.args(), case.facts.device))
    wrong = compare.disagreement(case.op, found, golden.results(stored))
    assert not wrong, f"{case.kernel.variant} {stored.name}: {wrong}"
