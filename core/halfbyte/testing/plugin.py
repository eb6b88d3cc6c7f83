"""The pytest plugin: options, parameters made from declared limits, the table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .._runtime import dispatcher
from ..kernel import Kernel, show
from . import cases, golden
from .table import Row, Table

CHECKS = Path(__file__).parent / "checks"

_target = pytest.StashKey[cases.Target]()
_table = pytest.StashKey[Table]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("halfbyte", "conformance of a halfbyte backend")
    group.addoption("--backend", metavar="NAME", help="the backend to test")
    group.addoption(
        "--device", metavar="DEVICE", help="the device to test it on; the first that it serves and torch has"
    )
    group.addoption("--variant", metavar="NAME", default="", help="test only kernels of this variant")
    group.addoption(
        "--require",
        metavar="NAME",
        action="append",
        default=[],
        help="a backend whose missing hardware is a failure and not a skip; may be repeated",
    )


@pytest.hookimpl(trylast=True)  # after plugins that bring backends
def pytest_configure(config: pytest.Config) -> None:
    required = config.getoption("--require")
    name = config.getoption("--backend") or (required[0] if len(required) == 1 else None)
    if name is None:
        return
    try:
        target = cases.find(name, config.getoption("--device"), config.getoption("--variant"))
    except (LookupError, RuntimeError) as error:
        raise pytest.UsageError(f"--backend {name}: {error}") from error
    if target.variant and not target.reasons and not target.kernels:
        raise pytest.UsageError(f"--variant {target.variant}: {name} has {', '.join(_variants(name, config))}")
    config.stash[_target] = target
    config.stash[_table] = Table(target)


def _variants(name: str, config: pytest.Config) -> list[str]:
    everything = cases.find(name, config.getoption("--device"), "")
    return sorted({kernel.variant or "no named variant" for kernel in everything.kernels})


def pytest_report_header(config: pytest.Config) -> str | None:
    target = config.stash.get(_target, None)
    if target is None:
        return None
    return f"halfbyte: backend {target.backend.name} on {target.facts}" + "".join(
        f"; {reason}" for reason in target.reasons
    )


# -- parameters ----------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A check that takes `case` runs in every declared situation; `_PARAMETERS` lists the others."""
    if metafunc.definition.path.parent != CHECKS:
        return
    target = metafunc.config.stash.get(_target, None)
    if target is None:
        raise pytest.UsageError("the conformance kit needs --backend NAME")
    for fixture, parameters in _PARAMETERS.items():
        if fixture in metafunc.fixturenames:
            found = [_skipped("; ".join(target.reasons))] if target.reasons else list(parameters(target))
            metafunc.parametrize(fixture, found or [_skipped(f"{target.backend.name} declares none")])


def _skipped(reason: str) -> Any:
    return pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")


def _cases(target: cases.Target, *, typical: bool) -> Iterator[Any]:
    """Situations; a variant that this machine cannot run is one skipped parameter."""
    refused = cases.refusals(target)
    for variant, reasons in refused.items():
        yield pytest.param(None, marks=pytest.mark.skip(reason=f"{variant}: {'; '.join(reasons)}"), id=variant)
    for kernel in target.kernels:
        if kernel.variant not in refused:
            for case in cases.situations(target, kernel, typical=typical):
                yield pytest.param(case, id=case.title)


def _goldens(target: cases.Target) -> Iterator[Any]:
    for kernel in target.kernels:
        for vector in golden.plan():
            if vector.op == kernel.op and not kernel.why_not(vector.facts(target.device), target.facts):
                case = cases.Case(target, kernel, dispatcher.plugins.ops[kernel.op], vector.facts(target.device))
                words = filter(None, (kernel.variant, vector.name))
                yield pytest.param((case, vector), id="-".join(words))


def _limits(target: cases.Target) -> Iterator[Any]:
    for kernel in target.kernels:
        for fact in kernel.limits:
            yield pytest.param((kernel, fact), id=_joined(kernel, fact))
        for name in ("cc", "archs"):
            if getattr(kernel, name) not in (None, (None, None)):
                yield pytest.param((kernel, name), id=_joined(kernel, name))


def _values(target: cases.Target) -> Iterator[Any]:
    """Typical situations times what their floats may be filled with."""
    for parameter in _cases(target, typical=True):
        case = parameter.values[0]
        if case is None:
            yield parameter
            continue
        for values in case.recipe.values:
            if values != "normal":
                yield pytest.param((case, values), id=f"{case.title}-{values}")


def _streamed(target: cases.Target) -> Iterator[Any]:
    if target.device.type == "cuda":
        yield from _cases(target, typical=True)
    else:
        yield _skipped(f"streams and graphs are checked on cuda devices; this is {target.device.type}")


def _joined(kernel: Kernel, *words: str) -> str:
    return "-".join(filter(None, (kernel.op, kernel.variant, *words)))


_PARAMETERS: dict[str, Callable[[cases.Target], Iterator[Any]]] = {
    "case": lambda target: _cases(target, typical=False),  # every situation
    "typical": lambda target: _cases(target, typical=True),  # every dtype, with every other value once
    "odd": _values,  # the same with zeros, infinities, ties, ...
    "streamed": _streamed,
    "vector": _goldens,
    "limit": _limits,
    "kernel": lambda target: (pytest.param(kernel, id=_joined(kernel)) for kernel in target.kernels),
    "op": lambda target: (pytest.param(op, id=op.name) for op in target.ops()),
}


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> cases.Target:
    """The backend under test."""
    return request.config.stash[_target]


@pytest.fixture(scope="session")
def required(request: pytest.FixtureRequest, target: cases.Target) -> bool:
    """Whether missing hardware is a failure."""
    return target.backend.name in request.config.getoption("--require")


# -- the table -----------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    case = _case_of(item)
    if case is not None and call.when == "setup":
        facts = case.facts._asdict()
        row = Row(case.op.name, show(facts.get("dtype", "")), str(facts.get("blocksize", "")), case.kernel.variant)
        item.user_properties.append(("halfbyte", tuple(row)))  # plain: pytest-xdist sends it between processes
    return (yield)


def _case_of(item: pytest.Item) -> cases.Case | None:
    for value in getattr(getattr(item, "callspec", None), "params", {}).values():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, cases.Case):
                return one
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    table = config.stash.get(_table, None)
    if table is None:
        return
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, row in getattr(report, "user_properties", ()):
                if name == "halfbyte":
                    table.add(Row(*row), outcome)
    if table.lines():
        terminalreporter.section("halfbyte conformance")
        for line in table.lines():
            terminalreporter.write_line(line)
