"""`halfbyte doctor` and the self-checks behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import halfbyte
from halfbyte import config, diagnosis, selfcheck
from halfbyte.__main__ import main
from halfbyte._runtime import dispatcher
from halfbyte.backend import Check

Capture = pytest.CaptureFixture[str]

BUILTIN = [name for name, op in dispatcher.plugins.ops.items() if op.namespace == "halfbyte"]


@pytest.fixture(autouse=True)
def _automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HALFBYTE_ variables, whatever the shell says."""
    monkeypatch.setattr(dispatcher, "config", config.Config())


@pytest.fixture
def plugin() -> Iterator[Callable[..., None]]:
    """`plugin("acme", backend=..., checks=[...])` registers one for the test."""
    added = []

    def add(name: str, *, backend: halfbyte.Backend | None = None, checks: Any = ()) -> None:
        hooks = SimpleNamespace(
            halfbyte_backends=halfbyte.hookimpl(lambda: [backend] if backend else []),
            halfbyte_doctor_checks=halfbyte.hookimpl(lambda: checks),
        )
        added.append(name)
        dispatcher.plugins.add(name, f"{name}-dist 1.0", lambda: hooks)
        dispatcher.forget()

    yield add
    for name in added:
        dispatcher.plugins.remove(name)
    dispatcher.forget()


def wrong(op: str) -> halfbyte.Backend:
    """A backend whose kernel for an op returns a last result that is slightly off."""

    def kernel(*args: Any) -> Any:
        result = dispatcher.plugins.ops[op].reference(*args)
        if result is None:  # an update: the first parameter is off
            args[1][0].add_(0.5)
            return None
        *rest, last = result if isinstance(result, tuple) else (result,)
        last = last + 0.5 if last.is_floating_point() else last ^ torch.ones_like(last)
        return (*rest, last) if rest else last

    class Acme(halfbyte.Backend):
        name = "acme"
        device_types = frozenset({"cpu"})
        priority = 100
        env = (
            halfbyte.EnvVar("HALFBYTE_ACME_SPEED", "How fast.", "a number"),
            halfbyte.EnvVar("HALFBYTE_ACME_TABLE", "Which table.", choices=("byte", "nibble")),
        )

        def kernels(self) -> Any:
            yield halfbyte.Kernel(op, kernel, variant="turbo")

    return Acme()


def doctor(capsys: Capture, code: int) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# -- self-checks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", BUILTIN)
def test_selfcheck_has_inputs_for_every_op(op: str) -> None:
    labels = [case.label for case in selfcheck.cases(op)]
    assert labels
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("op", BUILTIN)
def test_selfcheck_agrees_on_this_machine(op: str) -> None:
    results = [selfcheck.run_case(dispatcher.plugins.ops[op], case, "cpu") for case in selfcheck.cases(op)]
    assert [(one.label, one.message) for one in results if not one.ok] == []


@pytest.mark.parametrize("op", BUILTIN)
def test_selfcheck_finds_a_wrong_kernel(op: str, plugin: Callable[..., None]) -> None:
    plugin("acme", backend=wrong(op))
    results = [selfcheck.run_case(dispatcher.plugins.ops[op], case, "cpu") for case in selfcheck.cases(op)]
    assert {(one.backend, one.variant) for one in results} == {("acme", "turbo")}
    assert not any(one.ok for one in results)
    assert all("differ" in one.message for one in results)


def test_selfcheck_inputs_are_the_same_each_time() -> None:
    for op in BUILTIN:
        for one, two in zip(selfcheck.cases(op), selfcheck.cases(op), strict=True):
            for first, second in zip(pytree.tree_leaves(one.args), pytree.tree_leaves(two.args), strict=True):
                assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_selfcheck_leaves_its_inputs_unchanged() -> None:
    for op in BUILTIN:
        for case in selfcheck.cases(op):
            tensors = [leaf for leaf in pytree.tree_leaves(case.args) if isinstance(leaf, torch.Tensor)]
            before = [tensor.clone() for tensor in tensors]
            selfcheck.run_case(dispatcher.plugins.ops[op], case, "cpu")
            assert all(map(torch.equal, tensors, before))


def test_selfcheck_of_a_kernel_that_raises_is_a_failure(plugin: Callable[..., None]) -> None:
    class Broken(halfbyte.Backend):
        name = "broken"
        device_types = frozenset({"cpu"})
        priority = 100

        def kernels(self) -> Any:
            def kernel(*args: Any) -> Any:
                raise ZeroDivisionError("oops")

            yield halfbyte.Kernel("matmul_int8", kernel)

    plugin("broken", backend=Broken())
    (case,) = selfcheck.cases("matmul_int8")
    result = selfcheck.run_case(dispatcher.plugins.ops["matmul_int8"], case, "cpu")
    assert (result.ok, result.backend, result.message) == (False, "broken", "ZeroDivisionError: oops")


@pytest.mark.parametrize(
    ("got", "reason"),
    [
        (torch.zeros(3), "float32 (3,) instead of float32 (2,)"),
        (torch.zeros(2, dtype=torch.float16), "float16 (2,) instead of float32 (2,)"),
        (torch.tensor([0.0, 1.0]), "1 of 2 values differ, by up to 1, and must be equal"),
        ((torch.zeros(2), torch.zeros(2)), "2 results instead of 1"),
    ],
)
def test_differences_name_what_is_wrong(got: Any, reason: str) -> None:
    (found,) = selfcheck.differences(dispatcher.plugins.ops["dequantize_4bit"], got, torch.zeros(2))
    assert reason in found


# -- the report ----------------------------------------------------------------------------------------------


def test_doctor_is_well(capsys: Capture) -> None:
    found = doctor(capsys, 0)
    assert found["schema"] == 1
    assert found["ok"] is True
    assert set(found) == {
        *("schema", "ok", "versions", "devices", "backends", "quarantined", "variables", "configuration_errors"),
        *("build", "kernels", "selfchecks", "checks"),
    }
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][-1]["device"] == "cpu"
    assert found["devices"][-1]["backend"] == halfbyte.active()["cpu"]
    assert {one["op"] for one in found["kernels"]} == set(BUILTIN)
    assert found["selfchecks"]["failed"] == []


def test_keys_of_the_json_are_those_that_the_page_lists(capsys: Capture, plugin: Callable[..., None]) -> None:
    plugin("acme", backend=wrong("matmul_int8"), checks=[Check("acme driver", True, "version 7")])
    plugin("bad", backend=SimpleNamespace(name="bad"))
    found = doctor(capsys, 1)
    page = (Path(__file__).parents[2] / "docs/pages/command-line.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (each of )?`([a-z.]+)` \| (`.*) \|$", page.partition("| inside | keys |")[2], re.MULTILINE)
    assert {name.partition(".")[0] for _, name, _ in rows} == {
        key for key in found if isinstance(found[key], list | dict)
    } - {"configuration_errors"}
    for each, name, keys in rows:
        value = found
        for part in name.split("."):
            value = value[part]
        assert value, name
        for one in value if each else [value]:
            assert set(one) == set(re.findall(r"`(\w+)`", keys)), name


def test_doctor_lists_every_variable_with_its_value(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, plugin: Callable[..., None]
) -> None:
    plugin("acme", backend=wrong("matmul_int8"))
    monkeypatch.setenv("HALFBYTE_ACME_SPEED", "11")
    monkeypatch.setenv("HALFBYTE_BACKEND_LINEAR_4BIT", "reference")
    monkeypatch.setenv("HALFBYTE_TYPO", "1")
    found = {one["name"]: one for one in doctor(capsys, 1)["variables"]}
    assert {variable.name for variable in config.VARIABLES} <= set(found)
    assert (found["HALFBYTE_ACME_SPEED"]["value"], found["HALFBYTE_ACME_SPEED"]["owner"]) == ("11", "acme")
    assert found["HALFBYTE_BACKEND_LINEAR_4BIT"]["value"] == "reference"
    assert found["HALFBYTE_TYPO"]["owner"] is None


def test_doctor_fails_where_a_kernel_is_wrong(capsys: Capture, plugin: Callable[..., None]) -> None:
    plugin("acme", backend=wrong("matmul_int8"))
    found = doctor(capsys, 1)
    (failed,) = found["selfchecks"]["failed"]
    assert (failed["op"], failed["backend"], failed["variant"]) == ("matmul_int8", "acme", "turbo")
    assert main(["doctor"]) == 1
    assert "FAILED  matmul_int8 on cpu (int8), acme (turbo): result 0:" in capsys.readouterr().out


def test_doctor_tells_why_a_backend_was_passed_over(capsys: Capture, plugin: Callable[..., None]) -> None:
    plugin("acme", backend=wrong("matmul_int8"))
    found = doctor(capsys, 1)
    (one,) = (one for one in found["kernels"] if (one["op"], one["device"]) == ("quantize_8bit", "cpu"))
    assert one["against"]["acme"] == ["has no kernel for quantize_8bit"]


def test_doctor_fails_for_a_wrong_setting(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "HALFBYTE_FALLBACK must be one of warn, error, silent; got 'x'"
    monkeypatch.setattr(dispatcher, "config", config.Config(errors=(sentence,)))
    found = doctor(capsys, 1)
    assert found["configuration_errors"] == [sentence]
    assert found["kernels"] == []
    assert main(["doctor"]) == 1
    assert f"WRONG   {sentence}" in capsys.readouterr().out


def test_doctor_fails_for_a_value_that_a_backend_does_not_take(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, plugin: Callable[..., None]
) -> None:
    plugin("acme", backend=wrong("matmul_int8"))
    for value in ("", "byte"):
        monkeypatch.setenv("HALFBYTE_ACME_TABLE", value)
        assert doctor(capsys, 1)["configuration_errors"] == []
    monkeypatch.setenv("HALFBYTE_ACME_TABLE", "golden")
    found = doctor(capsys, 1)
    assert found["configuration_errors"] == ["HALFBYTE_ACME_TABLE must be one of byte, nibble; got 'golden'"]
    assert {one["name"]: one["values"] for one in found["variables"]}["HALFBYTE_ACME_TABLE"] == "byte, nibble"


def test_doctor_fails_for_an_instruction_set_that_is_none(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CPU_ISA", "foo")
    (error,) = doctor(capsys, 1)["configuration_errors"]
    assert error.startswith("HALFBYTE_CPU_ISA must be one of scalar, ")


@pytest.mark.parametrize(
    "chosen", [config.Config(backend=("nonsense",)), config.Config(per_op={"matmul_int8": ("nonsense",)})]
)
def test_doctor_fails_for_a_forced_backend_that_is_not_there(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, chosen: config.Config
) -> None:
    monkeypatch.setattr(dispatcher, "config", chosen)
    (error,) = doctor(capsys, 1)["configuration_errors"]
    assert "there is no backend 'nonsense'" in error


def test_doctor_shows_quarantined_plugins(capsys: Capture, plugin: Callable[..., None]) -> None:
    backend: Any = SimpleNamespace(name="bad")
    plugin("bad", backend=backend)
    found = doctor(capsys, 0)
    assert {
        "plugin": "bad",
        "provider": "bad-dist 1.0",
        "reason": "halfbyte_backends must yield Backend; got SimpleNamespace",
    } in found["quarantined"]
    assert main(["doctor"]) == 0
    assert "quarantined: halfbyte_backends must yield Backend" in capsys.readouterr().out


@pytest.mark.parametrize("ok", [True, False])
def test_doctor_runs_the_checks_of_plugins(capsys: Capture, plugin: Callable[..., None], ok: bool) -> None:
    plugin("acme", checks=[Check("acme driver", ok, "version 7")])
    found = doctor(capsys, 0 if ok else 1)
    assert {"name": "acme driver", "ok": ok, "message": "version 7"} in found["checks"]


def test_doctor_shows_a_backend_whose_kernels_cannot_be_loaded(capsys: Capture, plugin: Callable[..., None]) -> None:
    class Unloadable(halfbyte.Backend):
        name = "unloadable"
        device_types = frozenset({"cpu"})
        priority = 500

        def kernels(self) -> Any:
            raise ImportError("libacme.so.1 is missing")

    plugin("unloadable", backend=Unloadable())
    found = doctor(capsys, 1)
    (one,) = (one for one in found["backends"] if one["name"] == "unloadable")
    reason = "its kernels cannot be loaded: ImportError: libacme.so.1 is missing"
    assert one["reasons"] == [reason]
    assert found["devices"][-1]["backend"] in ("cpu", "reference")
    (check,) = found["checks"]
    assert check == {
        "name": "backend unloadable",
        "ok": False,
        "message": f"{reason}; install unloadable-dist 1.0 again",
    }
    assert main(["doctor"]) == 1
    assert f"FAILED  backend unloadable: {reason}; install" in capsys.readouterr().out


def test_doctor_fails_where_the_native_module_cannot_be_loaded(python: Callable[..., Any], tmp_path: Any) -> None:
    garbage = tmp_path / f"_C{EXTENSION_SUFFIXES[0]}"
    garbage.write_bytes(b"garbage")
    code = f"""
        import importlib.util, sys

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                found = name == "halfbyte_cpu._C"
                return importlib.util.spec_from_file_location(name, {str(garbage)!r}) if found else None

        sys.meta_path.insert(0, Finder)
        from halfbyte.__main__ import main
        sys.exit(main(["doctor", "--json"]))
    """
    done = python(code, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["devices"][-1]["backend"] == "reference"
    (check,) = found["checks"]
    assert check["name"] == "backend cpu"
    assert "its kernels cannot be loaded: ImportError: " in check["message"]
    assert check["message"].endswith(
        "; install halfbyte again from its source folder: pip install --force-reinstall --no-deps ."
    )


def test_doctor_advises_where_the_native_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_is_built", lambda module: False)
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: None)
    build = diagnosis.diagnose()["build"]
    assert build["native_cpu"] is False
    assert build["advice"].startswith("install a C++17 compiler first, then install halfbyte again")
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "g++" else None)
    advice = diagnosis.diagnose()["build"]["advice"]
    assert advice.startswith("g++ can build it: install halfbyte again")
