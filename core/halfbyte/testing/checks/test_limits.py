"""One step outside each limit gives a reason, never a crash and never a wrong result."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte._runtime import dispatcher
from halfbyte.kernel import DeviceFacts, Kernel, show
from halfbyte.testing import cases, compare, samples


def domain(kernel: Kernel) -> tuple[halfbyte.Op, samples.Samples]:
    op = dispatcher.plugins.ops[kernel.op]
    found = samples.of(op)
    if found is None:
        pytest.skip(f"op {op.name} has no samples")
    return op, found


def inside(target: cases.Target, kernel: Kernel) -> Iterator[cases.Case]:
    return cases.situations(target, kernel, typical=True)


def outside(case: cases.Case, fact: str, found: samples.Samples) -> list[Any]:
    """The case's facts with one value that the op takes and the kernel does not."""
    values = [value for value in found.domain[fact] if value not in case.kernel.limits[fact]]
    beyond = [case.facts._replace(**{fact: value}) for value in values]
    return [facts for facts in beyond if found.possible(facts)]


def test_step_outside_a_limit_gives_a_reason(target: cases.Target, limit: tuple[Kernel, str]) -> None:
    kernel, fact = limit
    op, found = domain(kernel)
    if fact in ("cc", "archs"):
        return step_outside_the_hardware(target, kernel, fact)
    for case in itertools.islice(inside(target, kernel), 3):
        for facts in outside(case, fact, found):
            reasons = kernel.why_not(facts, target.facts)
            expected = f"{fact}={show(getattr(facts, fact))}"
            assert any(reason.startswith(expected) for reason in reasons), f"{case.title} with {expected}: {reasons}"
            refused_or_right(target, op, facts)
    return None


def step_outside_the_hardware(target: cases.Target, kernel: Kernel, fact: str) -> None:
    op, found = domain(kernel)
    facts = op.Facts(target.device, *(values[0] for values in found.domain.values()))
    if fact == "archs":
        devices = [dataclasses.replace(target.facts, arch="none")]
    else:
        low, high = kernel.cc
        steps = [(low[0] - 1, 9)] * bool(low) + [(high[0] + 1, 0)] * bool(high) if low and high else []
        steps = steps or ([(low[0] - 1, 9)] if low else [(high[0] + 1, 0)] if high else [])
        devices = [dataclasses.replace(target.facts, cc=cc, arch=f"sm_{cc[0]}{cc[1]}") for cc in steps]
    for device in devices:
        assert kernel._why_not_arch(device), f"{kernel.op} takes {device.arch}, outside its {fact}"
        assert texts(kernel.why_not(facts, device))


def refused_or_right(target: cases.Target, op: halfbyte.Op, facts: Any) -> None:
    """Through the dispatcher: another kernel of the backend is right, or the error names the reasons."""
    args = cases.to_device(cases.arguments(op, facts, "usual", "normal"), target.device)
    call = cases.torch_op(op)
    decision = dispatcher.decide(op, facts, (target.backend.name,))
    with cases.forced(target):
        if decision.kernel is not None:
            want = cases.results(op, op.reference, cases.arguments(op, facts, "usual", "normal"))
            assert not compare.disagreement(op, cases.results(op, call, args), want), str(decision)
            return
        with pytest.raises(halfbyte.NoKernel) as caught:
            call(*args)
    ((name, reasons),) = caught.value.tried
    assert name == target.backend.name
    assert texts(reasons), f"{op.name}: no reasons for {facts}"


def texts(reasons: object) -> bool:
    """Whether these are reasons: a tuple of one sentence or more."""
    return isinstance(reasons, tuple) and bool(reasons) and all(isinstance(one, str) and one for one in reasons)


def test_rule_answers_with_reasons(target: cases.Target, kernel: Kernel) -> None:
    """In every situation inside the limits a rule says yes, or why not."""
    op, found = domain(kernel)
    names = [name for name in op.Facts._fields if name != "device"]
    columns = [cases.declared(kernel, name, found.domain[name]) for name in names]
    if kernel.rule is None:
        return
    for row in itertools.product(*columns):
        facts = op.Facts(target.device, *row)
        reasons = kernel.rule(facts)
        assert reasons == () or texts(reasons), (
            f"{op.name} {cases.describe(facts)}: reasons must be texts; got {reasons}"
        )


def test_limits_name_what_the_op_takes(target: cases.Target, kernel: Kernel) -> None:
    """A kernel declares no dtype, format or block size that its op refuses."""
    op, found = domain(kernel)
    for name in kernel.limits:
        for value in cases.declared(kernel, name, found.domain[name]):
            row = {field: values[0] for field, values in found.domain.items()}
            facts = op.Facts(device=torch.device("cpu"), **{**row, name: value})
            try:
                op.check(*cases.arguments(op, facts, "usual", "normal"))
            except (halfbyte.InputError, KeyError, TypeError) as error:
                pytest.fail(f"{op.name} declares {name}={show(value)}, which the op refuses: {error}")


def test_device_that_is_not_known_yet_is_no_crash(target: cases.Target, kernel: Kernel) -> None:
    """While nothing is known of a device but its type, why_not answers all the same."""
    op, found = domain(kernel)
    facts = op.Facts(target.device, *(values[0] for values in found.domain.values()))

    assert isinstance(kernel.why_not(facts, DeviceFacts(target.device.type, target.device.index)), tuple)
