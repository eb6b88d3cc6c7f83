"""A backend is quick to import, silent, answers in reasons, and touches no device before it is used."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
import time
from typing import Any

import pytest

from halfbyte import plugins
from halfbyte._runtime import dispatcher
from halfbyte.backend import API, EnvVar
from halfbyte.kernel import DeviceFacts, Kernel
from halfbyte.testing import cases, samples

IMPORT_SECONDS = 0.5
ANSWER_SECONDS = 0.1

# In a fresh interpreter: load the plugin as halfbyte does, after everything that it may build on.
_IMPORT = """
import importlib, json, sys, time
import halfbyte, torch
from halfbyte import _runtime

module, name = sys.argv[1:]
halves = module.partition(":")
package = module.partition(".")[0]
for loaded in [one for one in sys.modules if one.partition(".")[0] == package and package != "halfbyte"]:
    del sys.modules[loaded]
print("begin", flush=True)
print("begin", file=sys.stderr, flush=True)
start = time.perf_counter()
plugin = importlib.import_module(halves[0])
if halves[2]:
    for attribute in halves[2].split("."):
        plugin = getattr(plugin, attribute)
seconds = time.perf_counter() - start
backend = next(one for one in plugin.halfbyte_backends() if one.name == name)
reasons = backend.why_not()
initialized = [one for one in ("cuda", "xpu") if getattr(torch, one).is_initialized()]
print(json.dumps({"seconds": seconds, "initialized": initialized}))
"""


def required_answer(target: cases.Target) -> str:
    return f"{target.backend.name} cannot run here: {'; '.join(target.reasons)}"


def test_required_backend_can_run(target: cases.Target, required: bool) -> None:
    """What `--require` is for: missing hardware is a failure."""
    if not required:
        pytest.skip("only with --require") if not target.reasons else pytest.skip(required_answer(target))
    assert not target.reasons, required_answer(target)
    if target.variant:
        refused = cases.refusals(target)
        assert target.variant not in refused, f"{target.variant}: {'; '.join(refused[target.variant])}"


@pytest.fixture(scope="module")
def imported(target: cases.Target) -> dict[str, Any]:
    """What a fresh interpreter says about importing the plugin."""
    name = target.backend.name
    module = plugins.BUILTIN.get(name)
    for entry in importlib.metadata.entry_points(group=plugins.GROUP):
        if entry.name == name:
            module = entry.value
    if module is None:
        pytest.skip(f"{name} is registered by hand: there is no module to import")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HALFBYTE_")}
    path = os.pathsep.join(one for one in sys.path if one)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, module, name],
        env={**clean, "PYTHONPATH": path, "HALFBYTE_PLUGINS": "none"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.partition("begin\n")[2].splitlines()  # what halfbyte itself says comes before
    return {**json.loads(last), "output": "\n".join(said) + done.stderr.partition("begin\n")[2]}


def test_import_is_quick(imported: dict[str, Any]) -> None:
    assert imported["seconds"] < IMPORT_SECONDS, f"importing the plugin takes {imported['seconds']:.2f} s"


def test_import_is_silent(imported: dict[str, Any]) -> None:
    assert imported["output"] == ""


def test_import_touches_no_device(imported: dict[str, Any]) -> None:
    assert imported["initialized"] == []


def test_answers_are_quick_reasons(target: cases.Target) -> None:
    backend = target.backend
    start = time.perf_counter()
    answers = [backend.why_not(), backend.why_not_device(target.facts)]
    seconds = time.perf_counter() - start

    for answer in answers:
        assert isinstance(answer, tuple), f"why_not must answer with a tuple of texts; got {answer!r}"
        assert all(isinstance(one, str) and one for one in answer), f"why_not must answer with texts; got {answer!r}"
    assert seconds < ANSWER_SECONDS, f"why_not and why_not_device take {seconds:.2f} s"


def test_device_that_is_not_known_yet_is_no_crash(target: cases.Target) -> None:
    """At import nothing is known of a device but its type."""
    for device_type in target.backend.device_types or {"cpu"}:
        assert isinstance(target.backend.why_not_device(DeviceFacts(device_type, 0)), tuple)


def test_facts_of_the_backend_survive_pickle(target: cases.Target) -> None:
    backend = target.backend
    facts = (backend.name, backend.device_types, backend.priority, backend.api, backend.env, backend.why_not())

    assert pickle.loads(pickle.dumps(facts)) == facts
    assert backend.api == API


def test_environment_variables_are_explained(target: cases.Target) -> None:
    for variable in target.backend.env:
        assert isinstance(variable, EnvVar)
        assert variable.name.startswith("HALFBYTE_"), variable.name
        assert variable.doc.endswith("."), f"{variable.name}: a sentence, not {variable.doc!r}"


def test_kernels_are_told_apart(target: cases.Target) -> None:
    if target.reasons:
        pytest.skip("; ".join(target.reasons))
    seen: set[tuple[str, str]] = set()
    for kernel in target.kernels:
        assert (kernel.op, kernel.variant) not in seen, f"two kernels for {kernel.op} are called {kernel.variant!r}"
        seen.add((kernel.op, kernel.variant))


def test_kernel_is_silent(target: cases.Target, kernel: Kernel, capfd: pytest.CaptureFixture[str]) -> None:
    case = next(cases.situations(target, kernel, typical=True), None)
    if case is None:
        pytest.skip(f"{kernel.op} has no samples, or {kernel.variant or 'the kernel'} does not apply here")
    args = case.args()
    capfd.readouterr()
    cases.results(case.op, kernel.function, args)

    assert capfd.readouterr() == ("", ""), f"{kernel.op} prints"


def test_op_has_samples(target: cases.Target, kernel: Kernel) -> None:
    """Without samples the kit cannot call an op: no silence about that."""
    op = dispatcher.plugins.ops[kernel.op]
    if samples.of(op) is None:
        pytest.skip(f"op {op.namespace}::{op.name} has no samples: give its Op samples=, see write-a-backend")
