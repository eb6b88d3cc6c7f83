"""What `halfbyte doctor` knows: the state of this installation as one plain dict.

The keys are a public interface ("schema": 1); new ones may be added, none change their meaning.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from . import __version__, _runtime, choosing, config, probe, selfcheck
from .backend import Check, EnvVar
from .dispatch import Dispatcher, answer
from .errors import HalfbyteError
from .kernel import DeviceFacts

SCHEMA = 1

_COMPILERS = ("c++", "g++", "clang++", "cl")
_INSTALL = "install halfbyte again from its source folder: pip install --force-reinstall --no-deps ."


def diagnose() -> dict[str, Any]:
    """Look at everything: versions, devices, backends, variables, kernels; run the self-checks.  Never raises.

    Creates a context on each accelerator found, and loads the kernels of all backends.
    """
    dispatcher = _runtime.dispatcher
    errors = [*dispatcher.config.errors, *_wrong_values(dispatcher)]
    backends = _backends(dispatcher)  # first: it loads all kernels, and devices then show what could not be
    active: dict[str, str] = {}
    try:
        active = choosing.active()
    except HalfbyteError as error:
        if str(error) not in "; ".join(errors):
            errors.append(str(error))
    errors += _wrong_chains(dispatcher, errors)
    results = [] if errors else list(_run_selfchecks(dispatcher, list(active)))
    checks = [
        {"name": one.name, "ok": one.ok, "message": one.message}
        for one in (*_load_failures(dispatcher), *dispatcher.plugins.doctor_checks())
    ]
    return {
        "schema": SCHEMA,
        "ok": not errors and all(one.ok for one in results) and all(one["ok"] for one in checks),
        "versions": _versions(),
        "devices": [_device(device, active) for device in probe.machine()],
        "backends": backends,
        "quarantined": [
            {"plugin": one.plugin, "provider": one.provider, "reason": one.reason}
            for one in dispatcher.plugins.quarantined.values()
        ],
        "variables": list(_variables(dispatcher)),
        "configuration_errors": errors,
        "build": _build(),
        "kernels": _kernels(results),
        "selfchecks": {"run": len(results), "failed": [_failure(one) for one in results if not one.ok]},
        "checks": checks,
    }


def _versions() -> dict[str, str | None]:
    return {
        "halfbyte": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "platform": platform.platform(),
    }


def _device(device: DeviceFacts, active: dict[str, str]) -> dict[str, Any]:
    return {
        "device": str(device),
        "name": device.name,
        "vendor": device.vendor,
        "arch": device.arch,
        "cc": None if device.cc is None else list(device.cc),
        "backend": active.get(str(device)),
    }


def _backends(dispatcher: Dispatcher) -> list[dict[str, Any]]:
    """By descending priority; `reasons` also tells of kernels that cannot be loaded."""
    plugins = dispatcher.plugins
    ordered = sorted(plugins.backends.values(), key=lambda one: (-one.priority, one.name))
    return [
        {
            "name": backend.name,
            "priority": backend.priority,
            "provider": plugins.providers[backend.name],
            "device_types": sorted(backend.device_types) or ["any"],
            "reasons": list(dispatcher.why_not(backend)),
        }
        for backend in ordered
    ]


def _load_failures(dispatcher: Dispatcher) -> Iterator[Check]:
    """Backends that the machine could run, but whose kernels cannot be loaded."""
    for backend in dispatcher.plugins.backends.values():
        if not answer(backend.why_not) and (reasons := dispatcher.why_not(backend)):
            provider = dispatcher.plugins.providers[backend.name]
            again = _INSTALL if provider == "halfbyte" else f"install {provider} again"
            yield Check(f"backend {backend.name}", False, f"{'; '.join(reasons)}; {again}")


def _variables(dispatcher: Dispatcher) -> Iterator[dict[str, str | None]]:
    """Every variable that is read, with its value; then those that are set but read by nobody."""
    owned = [(variable, "halfbyte") for variable in config.VARIABLES]
    owned += [(variable, one.name) for one in dispatcher.plugins.backends.values() for variable in one.env]
    known = set()
    for variable, owner in owned:
        if "<" not in variable.name:
            known.add(variable.name)
            yield _variable(variable, owner, variable.name)
            continue
        stem = variable.name.partition("<")[0]
        yield _variable(variable, owner, variable.name)
        for name in sorted(os.environ):
            if name.startswith(stem):
                known.add(name)
                yield _variable(variable, owner, name)
    for name in sorted(os.environ):
        if name.startswith("HALFBYTE_") and name not in known:
            yield _variable(EnvVar(name, "Set, but nothing loaded here reads it."), None, name)


def _variable(variable: EnvVar, owner: str | None, name: str) -> dict[str, str | None]:
    return {
        "name": name,
        "value": os.environ.get(name),
        "values": variable.values,
        "doc": variable.doc,
        "owner": owner,
    }


def _wrong_values(dispatcher: Dispatcher) -> Iterator[str]:
    """Variables of backends that are set to something else than their choices."""
    for backend in dispatcher.plugins.backends.values():
        for variable in backend.env:
            value = os.environ.get(variable.name)
            if value and variable.choices and value not in variable.choices:
                yield f"{variable.name} must be one of {', '.join(variable.choices)}; got {value!r}"


def _wrong_chains(dispatcher: Dispatcher, known: list[str]) -> list[str]:
    """Chains of single ops that cannot run here."""
    errors = []
    for op, chain in dispatcher.config.per_op.items():
        try:
            dispatcher.require(chain, f"HALFBYTE_BACKEND_{op.upper()}")
        except HalfbyteError as error:
            errors.append(str(error))
    return [error for error in errors if error not in known]


def _build() -> dict[str, Any]:
    """Whether the native CPU module is there, and if not, what building it lacks."""
    built = _is_built("halfbyte_cpu._C")
    compilers = {name: path for name in _COMPILERS if (path := shutil.which(name))}
    advice = None
    if not built:
        way = f"{', '.join(compilers)} can build it:" if compilers else "install a C++17 compiler first, then"
        advice = f"{way} {_INSTALL}"
    return {"native_cpu": built, "compilers": compilers, "advice": advice}


def _is_built(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package around it is missing, or broken
        return False


def _run_selfchecks(dispatcher: Dispatcher, devices: list[str]) -> Iterator[selfcheck.Result]:
    for device in devices:
        try:
            torch.zeros(1, device=device).cpu()
        except Exception as error:  # torch raises what it likes here
            message = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            yield selfcheck.Result("torch", device, "a tensor on the device", None, "", False, message)
            continue
        for op in dispatcher.plugins.ops.values():
            for case in selfcheck.cases(op.name):
                yield selfcheck.run_case(op, case, device)


def _kernels(results: list[selfcheck.Result]) -> list[dict[str, Any]]:
    """Per device and op: which kernels ran the self-check's cases, and how many agreed."""
    groups: dict[tuple[str, str, str | None, str], list[selfcheck.Result]] = {}
    for one in results:
        groups.setdefault((one.device, one.op, one.backend, one.variant), []).append(one)
    return [
        {
            "device": device,
            "op": op,
            "backend": backend,
            "variant": variant,
            "cases": [one.label for one in group],
            "agree": sum(one.ok for one in group),
            "against": {name: list(reasons) for one in group for name, reasons in one.against},
            "chosen_by": next((one.message.removeprefix("chosen by ") for one in group if one.ok), None),
        }
        for (device, op, backend, variant), group in groups.items()
    ]


def _failure(result: selfcheck.Result) -> dict[str, Any]:
    return {
        "op": result.op,
        "device": result.device,
        "case": result.label,
        "backend": result.backend,
        "variant": result.variant,
        "message": result.message,
    }
