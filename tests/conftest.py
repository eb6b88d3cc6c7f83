"""Fixtures that every test may use: temporary backends and plugins, another environment, fresh interpreters."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch

import halfbyte
from halfbyte import config, plugins
from halfbyte._runtime import dispatcher

ROOT = Path(__file__).resolve().parent.parent
BITSANDBYTES = "0.50.2"  # the compatibility target

hypothesis.settings.register_profile(
    "halfbyte",
    deadline=None,
    derandomize=True,  # explicit seeds: a failure is the same failure everywhere
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("halfbyte")

# Backends that can compute on CPU tensors; tests/ops/test_backends.py skips with the reason of each that cannot.
COMPUTING = ("reference", "cpu")


def why_not(name: str) -> tuple[str, ...]:
    known = dispatcher.plugins.backends.get(name)
    return dispatcher.why_not(known) if known else (dispatcher.plugins.quarantined[name].reason,)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs once on each backend for CPU tensors."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [name for name in COMPUTING if not why_not(name)], indirect=True)


@pytest.fixture(autouse=True)
def default_choice() -> Iterator[None]:
    """Every test starts without HALFBYTE_ variables and without set_backend, whatever the shell says."""
    default = config.Config(), None
    before = dispatcher.config, dispatcher.process_chain
    _choose(default)
    yield
    _choose(default)
    _choose(before)


@pytest.fixture(scope="session")
def real_bitsandbytes() -> None:
    """Skip where the real bitsandbytes of the compatibility target is not installed.

    Its files are looked for, and it is not imported: for its name the drop-in answers, which tests/compat turns on in
    this process and which cannot be turned on any more after an import of the real one.
    """
    found = [one.version for one in importlib.metadata.distributions(name="bitsandbytes", path=[*sys.path])]
    if found != [BITSANDBYTES]:
        what = f"bitsandbytes {found[0]}" if found else "no bitsandbytes"
        pytest.skip(f"{what} is installed, the compatibility target is {BITSANDBYTES}")


def _choose(choice: tuple[config.Config, config.Chain | None]) -> None:
    if (dispatcher.config, dispatcher.process_chain) != choice:
        dispatcher.config, dispatcher.process_chain = choice
        dispatcher.forget()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that runs this test's ops; those that it lacks go to the reference."""
    name: str = request.param
    with halfbyte.use_backend(name if name == "reference" else f"{name},reference"):
        yield name


@pytest.fixture
def environment() -> Iterator[Callable[[Mapping[str, str]], None]]:
    """`environment({"HALFBYTE_BACKEND": "acme"})`: the core reads its configuration from this instead."""

    def read(variables: Mapping[str, str]) -> None:
        found = config.read(variables)
        problems = found.errors + config.unknown_ops(found, dispatcher.plugins.ops)
        dispatcher.config = config.Config(found.backend, found.per_op, found.fallback, found.plugins, problems)
        dispatcher.forget()

    yield read
    dispatcher.forget()


@pytest.fixture
def stub_backend() -> Iterator[Callable[..., Any]]:
    """`stub_backend("acme", limits={...})`: a backend for CPU tensors whose kernels are the references.

    Keyword arguments of Kernel (limits, cc, archs, rule) hold for every kernel.  `kernels` gives a list of kernels
    instead, `ops` limits the ops, `why_not` and `why_not_device` are the reasons to answer with.  The backend's
    `calls` are the names of the ops it ran.
    """
    added = []

    def register(
        name: str,
        *,
        device_types: tuple[str, ...] = ("cpu",),
        priority: int = 100,
        ops: tuple[str, ...] | None = None,
        kernels: list[halfbyte.Kernel] | Callable[[], Any] | None = None,
        why_not: tuple[str, ...] | Callable[[], tuple[str, ...]] = (),
        why_not_device: Callable[[Any], tuple[str, ...]] = lambda device: (),
        hooks: Mapping[str, Callable[..., Any]] | None = None,
        **kernel: Any,
    ) -> Any:
        calls: list[str] = []

        def counted(op: Any) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                calls.append(op.name)
                return op.reference(*args)

            return run

        def its_kernels(self: Any) -> Any:
            if callable(kernels):
                return kernels()
            if kernels is not None:
                return kernels
            every = dispatcher.plugins.ops.values()
            return [
                halfbyte.Kernel(
                    op.name,
                    counted(op),
                    **{**kernel, "limits": _known(kernel.get("limits", {}), op)},
                )
                for op in every
                if ops is None or op.name in ops
            ]

        def machine(self: Any) -> tuple[str, ...]:
            return why_not() if callable(why_not) else why_not

        def device(self: Any, device: Any) -> tuple[str, ...]:
            return why_not_device(device)

        machine.__name__, device.__name__ = "why_not", "why_not_device"
        members = {
            "name": name,
            "device_types": frozenset(device_types),
            "priority": priority,
            "why_not": machine,
            "why_not_device": device,
            "kernels": its_kernels,
            "calls": calls,
        }
        stub: Any = type("Stub", (halfbyte.Backend,), members)()
        plugin = SimpleNamespace(halfbyte_backends=halfbyte.hookimpl(lambda: [stub]))
        for hook, function in (hooks or {}).items():
            setattr(plugin, hook, halfbyte.hookimpl(function))
        if name in plugins.BUILTIN:  # set aside meanwhile
            dispatcher.plugins.remove(name)
        added.append(name)
        dispatcher.plugins.add(name, f"{name}-dist 1.0", lambda: plugin)
        dispatcher.forget()
        return stub

    yield register
    for name in added:
        dispatcher.plugins.remove(name)
    for name in plugins.BUILTIN.keys() & set(added):
        dispatcher.plugins.add(name, "halfbyte", functools.partial(importlib.import_module, plugins.BUILTIN[name]))
    dispatcher.forget()


def _known(limits: Mapping[str, Any], op: halfbyte.Op) -> dict[str, Any]:
    return {name: values for name, values in limits.items() if name in op.Facts._fields}


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python(code, path=(folder,), HALFBYTE_PLUGINS="none")`: run code in a fresh interpreter."""

    def run(
        code: str, *, path: tuple[Path, ...] = (), check: bool = True, flags: tuple[str, ...] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HALFBYTE_")}
        # The same import path as this process, so that a checkout and an installed wheel are both tested as they are.
        paths = [*map(str, path), *(one for one in sys.path if one)]
        done = subprocess.run(
            [sys.executable, *flags, "-c", textwrap.dedent(code)],
            env={**clean, "PYTHONPATH": os.pathsep.join(paths), **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
