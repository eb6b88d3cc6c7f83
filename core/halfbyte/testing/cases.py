"""What is tested: the kernels of one backend times the facts that their limits declare."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import probe
from .._runtime import dispatcher
from ..backend import Backend, DeviceFacts
from ..choosing import use_backend
from ..decision import Decision
from ..kernel import Kernel, show
from ..op import Op
from ..selfcheck import results as results
from ..selfcheck import written as written
from . import samples
from .draw import Draw

MOST_VALUES = 10  # of one limit; of more, that many are picked evenly


@dataclass(frozen=True)
class Target:
    """The backend under test, on one device.

    reasons  why this machine cannot run it; empty means it can
    variant  the only variant to test; "" for all
    """

    backend: Backend
    device: torch.device
    facts: DeviceFacts
    reasons: tuple[str, ...] = ()
    variant: str = ""

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """Its kernels, those of `variant` where one is named.  What loading them raises is a failure, not a skip."""
        by_op = dispatcher.kernels(self.backend)
        return [one for kernels in by_op.values() for one in kernels if self.variant in ("", one.variant)]

    def ops(self) -> list[Op]:
        names = dict.fromkeys(kernel.op for kernel in self.kernels)
        return [dispatcher.plugins.ops[name] for name in names]


@dataclass(frozen=True)
class Case:
    """One kernel in one situation."""

    target: Target
    kernel: Kernel
    op: Op
    facts: Any

    @property
    def title(self) -> str:
        return "-".join(filter(None, (self.op.name, self.kernel.variant, *describe(self.facts))))

    @functools.cached_property
    def recipe(self) -> samples.Samples:
        found = samples.of(self.op)
        if found is None:
            raise LookupError(f"op {self.op.name} has no samples")
        return found

    def sizes(self, *wanted: str) -> list[str]:
        """Names of sizes, those of `wanted` that there are."""
        known = self.recipe.sizes(self.facts)
        return [name for name in wanted or known if name in known]

    def args(self, size: str = "usual", values: str = "normal") -> samples.Args:
        """Fresh arguments on the device under test."""
        return to_device(arguments(self.op, self.facts, size, values), self.facts.device)

    def expected(self, size: str = "usual", values: str = "normal") -> tuple[Tensor, ...]:
        """What the reference makes of the same arguments, on the CPU."""
        return _expected(self.op, self.facts._replace(device=torch.device("cpu")), size, values)


def find(name: str, device: str | None, variant: str) -> Target:
    """The backend of that name.  Raises LookupError where there is none, with what is known."""
    plugins = dispatcher.plugins
    if name in plugins.quarantined:
        raise LookupError(f"backend {name} is quarantined: {plugins.quarantined[name].reason}")
    if name not in plugins.backends:
        raise LookupError(f"there is no backend {name!r}; known are {', '.join(sorted(plugins.backends))}")
    backend = plugins.backends[name]
    types = [device] if device else sorted(backend.device_types) or ["cpu"]
    present = [one for one in types if is_present(torch.device(one).type)]
    chosen = torch.device((present or types)[0])
    if chosen.type != "cpu" and chosen.index is None:
        chosen = torch.device(chosen.type, 0)
    if not backend.claims(chosen.type):
        reasons: tuple[str, ...] = (f"serves {', '.join(sorted(backend.device_types))}, not {chosen.type}",)
    else:
        reasons = backend.why_not() or (() if present else (f"there is no {' or '.join(types)} device",))
    if reasons:
        return Target(backend, chosen, DeviceFacts(chosen.type, chosen.index), reasons, variant)
    facts = probe.confirmed(chosen)
    return Target(backend, chosen, facts, backend.why_not_device(facts), variant)


def is_present(device_type: str) -> bool:
    """Whether torch has a device of this type here."""
    if device_type == "cpu":
        return True
    try:
        return bool(torch.get_device_module(device_type).is_available())
    except (RuntimeError, AttributeError):
        return False


def describe(facts: Any) -> list[str]:
    """Facts as words for a test's name."""
    words = []
    for name, value in facts._asdict().items():
        if isinstance(value, bool):
            words += [name] * value
        elif name != "device":
            words.append(show(value))
    return words


# -- situations ----------------------------------------------------------------------------------------------


def situations(target: Target, kernel: Kernel, *, typical: bool) -> Iterator[Case]:
    """The kernel in every situation that its limits declare and its rule allows.

    typical  only as many as show every dtype with every other value once; of block sizes the two smallest
    """
    op = dispatcher.plugins.ops[kernel.op]
    found = samples.of(op)
    if found is None:
        return
    names = [name for name in op.Facts._fields if name != "device"]
    columns = [declared(kernel, name, found.domain[name]) for name in names]
    rows = _typical(names, columns) if typical else itertools.product(*columns)
    seen = set()
    for row in rows:
        # Where the rule refuses a typical row, one that differs in a single fact may stand in.
        for one in (row, *(_replaced(row, columns) if typical else ())):
            facts = op.Facts(target.device, *one)
            if one not in seen and found.possible(facts) and not kernel.why_not(facts, target.facts):
                seen.add(one)
                yield Case(target, kernel, op, facts)
                break


def declared(kernel: Kernel, fact: str, domain: Sequence[object]) -> list[object]:
    """The values of a fact that a kernel says it takes; those of the samples where it does not limit it."""
    limit = kernel.limits.get(fact)
    if limit is None:
        return list(domain)
    values = [value for value in domain if value in limit]
    values += sorted((value for value in limit if value not in domain), key=show)
    if len(values) > MOST_VALUES:
        values = [values[i * (len(values) - 1) // (MOST_VALUES - 1)] for i in range(MOST_VALUES)]
    return values


def _typical(names: list[str], columns: list[list[object]]) -> Iterator[tuple[object, ...]]:
    columns = [values[:2] if name == "blocksize" else values for name, values in zip(names, columns)]
    first = columns[0] if names and names[0] == "dtype" else [None]
    rest = columns[1:] if names and names[0] == "dtype" else columns
    for row, value in enumerate(first):
        for step in range(max(map(len, rest), default=1)):
            # Shifted by the column, so that facts do not move in step: nf4 is seen nested and not nested.
            others = tuple(values[(step + row * shift) % len(values)] for shift, values in enumerate(rest))
            yield others if first == [None] else (value, *others)


def _replaced(row: tuple[object, ...], columns: list[list[object]]) -> Iterator[tuple[object, ...]]:
    """The rows that differ from this one in one fact, the last facts first."""
    for place in reversed(range(len(row))):
        for value in columns[place]:
            yield (*row[:place], value, *row[place + 1 :])


def refusals(target: Target) -> Mapping[str, tuple[str, ...]]:
    """Variants of which no kernel applies to this machine, with the reasons of one."""
    able: set[str] = set()
    against: dict[str, tuple[str, ...]] = {}
    for kernel in target.kernels:
        op = dispatcher.plugins.ops[kernel.op]
        found = samples.of(op)
        if found is None:
            continue
        names = [name for name in op.Facts._fields if name != "device"]
        columns = [declared(kernel, name, found.domain[name]) for name in names]
        for row in itertools.product(*columns):
            reasons = kernel.why_not(op.Facts(target.device, *row), target.facts)
            if not reasons:
                able.add(kernel.variant)
                break
            against.setdefault(kernel.variant, reasons)
    return {variant: reasons for variant, reasons in against.items() if variant not in able}


# -- arguments -----------------------------------------------------------------------------------------------


def arguments(op: Op, facts: Any, size: str, values: str) -> samples.Args:
    """Arguments on the CPU, the same for every backend."""
    found = samples.of(op)
    if found is None:
        raise LookupError(f"op {op.name} has no samples")
    facts = facts._replace(device=torch.device("cpu"))
    seed = "/".join((op.name, *describe(facts), size, values))
    return found.make(facts, found.sizes(facts)[size], Draw(seed, values))


@functools.lru_cache(maxsize=4096)
def _expected(op: Op, facts: Any, size: str, values: str) -> tuple[Tensor, ...]:
    return results(op, op.reference, arguments(op, facts, size, values))


def to_device(args: samples.Args, device: torch.device) -> samples.Args:
    return tuple(pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), list(args)))


def forced(target: Target, *, fallback: bool = False) -> AbstractContextManager[None]:
    """The backend under test runs; where it has no kernel for an op: an error, or the reference."""
    name = target.backend.name
    return use_backend((name, "reference") if fallback else name)


def decided(case: Case) -> Decision:
    """What the dispatcher picks in the case's situation when only the backend under test may run."""
    return dispatcher.decide(case.op, case.facts, (case.target.backend.name,))


def torch_op(op: Op) -> torch._ops.OpOverload[..., Any]:
    """torch.ops.<namespace>.<op>"""
    call: torch._ops.OpOverload[..., Any] = getattr(getattr(torch.ops, op.namespace), op.name).default
    return call


def over_weight(op: Op, args: Sequence[Any]) -> tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of an op over a weight: the first, the bias, the tensors of the weight, the rest."""
    names = [parameter.split()[-1] for parameter in op.schema[1 : op.schema.index(")")].split(", ")]
    given = dict(zip(names, args, strict=True))
    first, bias = given.pop(names[0]), given.pop("bias", None)
    tensors = tuple(one for one in given.values() if one is None or isinstance(one, Tensor))
    return first, bias, tensors, tuple(given.values())[len(tensors) :]
