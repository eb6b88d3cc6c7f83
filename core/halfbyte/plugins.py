"""The plugin manager: built-in backends, entry points, validation, quarantine."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pluggy
import torch

from . import config, hookspecs
from .backend import API, Backend, Check, EnvVar
from .errors import PluginError
from .op import Op

log = logging.getLogger("halfbyte.plugins")

GROUP = "halfbyte.backends"

# The built-in backends are plugins like any other; only their place of registration differs.
BUILTIN = {
    "cpu": "halfbyte_cpu.plugin",
    "cuda": "halfbyte_cuda.plugin",
    "rocm": "halfbyte_rocm.plugin",
    "triton": "halfbyte_triton.plugin",
    "xpu": "halfbyte_xpu.plugin",
}


@dataclass(frozen=True)
class Quarantined:
    """A plugin that is not used, and why."""

    plugin: str
    provider: str
    reason: str
    error: BaseException


class Plugins:
    """All ops and backends of this process, with who provided them."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("halfbyte")
        self.manager.add_hookspecs(hookspecs)
        self.ops: dict[str, Op] = {}
        self.backends: dict[str, Backend] = {}
        self.providers: dict[str, str] = {}
        self.quarantined: dict[str, Quarantined] = {}

    def load(self, wanted: frozenset[str] | None) -> list[str]:
        """Load the built-in plugins and the installed ones; `wanted` limits the installed ones by name.

        returns  the names of all that could be loaded
        """
        for name, module in BUILTIN.items():
            self.add(name, "halfbyte", _importer(module))
        installed = importlib.metadata.entry_points(group=GROUP)
        for entry in installed:
            if wanted is None or entry.name in wanted:
                provider = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
                self.add(entry.name, provider, entry.load)
        return [*BUILTIN, *(entry.name for entry in installed)]

    def add(self, name: str, provider: str, load: Callable[[], Any]) -> None:
        """Load one plugin, validate all it offers, then register it; or quarantine it whole."""
        plugin = None
        try:
            if self.manager.has_plugin(name):
                raise PluginError(f"the name {name!r} is taken by {self.providers.get(name, 'another plugin')}")
            plugin = load()
            if getattr(getattr(plugin, "__spec__", None), "_initializing", False):
                raise PluginError("it imported halfbyte before its hooks were there: import halfbyte first")
            self.manager.register(plugin, name)
            self.manager.check_pending()
            ops, backends = self._offers(name)
        except (Exception, SystemExit) as error:
            if plugin is not None and self.manager.get_plugin(name) is plugin:
                self.manager.unregister(plugin)
            self._quarantine(name, provider, error)
            return
        for op in ops:
            self.ops[op.name] = op
        for backend in backends:
            self.backends[backend.name] = backend
            self.providers[backend.name] = provider
        self.providers.setdefault(name, provider)

    def remove(self, name: str) -> None:
        """Forget a plugin and its backends (for tests)."""
        if self.manager.has_plugin(name):
            self.manager.unregister(name=name)
        self.backends.pop(name, None)
        self.providers.pop(name, None)
        self.quarantined.pop(name, None)

    def doctor_checks(self) -> Iterator[Check]:
        """What plugins add to doctor; one that raises becomes a failed check."""
        for impl in self.manager.hook.halfbyte_doctor_checks.get_hookimpls():
            try:
                yield from self._call("halfbyte_doctor_checks", impl.plugin_name)
            except Exception as error:
                yield Check(impl.plugin_name, False, f"its doctor check raised {_sentence(error)}")

    def _offers(self, name: str) -> tuple[list[Op], list[Backend]]:
        ops: list[Op] = []
        for op in self._call("halfbyte_ops", name):
            ops.append(self._valid_op(op, ops))
        backends: list[Backend] = []
        for backend in self._call("halfbyte_backends", name):
            self._validate_backend(backend)
            if any(backend.name == other.name for other in backends):
                raise PluginError(f"offers the backend {backend.name!r} twice")
            backends.append(backend)
        return ops, backends

    def _call(self, hook: str, name: str) -> Iterator[Any]:
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            if impl.plugin_name == name:
                yield from impl.function() or ()

    def _valid_op(self, op: object, before: list[Op]) -> Op:
        if not isinstance(op, Op):
            raise PluginError(f"halfbyte_ops must yield Op; got {type(op).__name__}")
        if op.name in self.ops or any(op.name == other.name for other in before):
            raise PluginError(f"the op {op.name!r} is already there")
        if op.namespace == "halfbyte":
            raise PluginError(f"the op {op.name!r} must live in a namespace of its own, not halfbyte")
        # What torch would refuse later, when it can no longer be blamed on a plugin.
        try:
            schema = torch._C.parse_schema(f"{op.namespace}::{op.name}{op.schema}")
        except RuntimeError as error:
            raise PluginError(f"the schema of op {op.name!r} is not one that torch can read: {op.schema}") from error
        if hasattr(getattr(torch.ops, op.namespace), op.name):
            raise PluginError(f"torch.ops.{op.namespace}.{op.name} is already there")
        if op.backward is not None and schema.is_mutable:
            raise PluginError(f"the op {op.name!r} writes to its arguments, so it can have no gradient")
        return op

    def _validate_backend(self, backend: object) -> None:
        if not isinstance(backend, Backend):
            raise PluginError(f"halfbyte_backends must yield Backend; got {type(backend).__name__}")
        name = getattr(backend, "name", None)
        if not isinstance(name, str) or not config.BACKEND_NAME.fullmatch(name) or name == "auto":
            raise PluginError(f"a backend's name must match {config.BACKEND_NAME.pattern}; got {name!r}")
        if backend.api != API:
            raise PluginError(f"{name} was written for contract version {backend.api}; this halfbyte speaks {API}")
        if name in self.backends:
            raise PluginError(f"the backend name {name!r} is taken by {self.providers[name]}")
        types = getattr(backend, "device_types", None)
        if not isinstance(types, frozenset) or not all(isinstance(one, str) for one in types):
            raise PluginError(f"device_types of {name} must be a frozenset of torch device types; got {types!r}")
        if not isinstance(getattr(backend, "priority", None), int):
            raise PluginError(f"priority of {name} must be an int; got {getattr(backend, 'priority', None)!r}")
        if not all(isinstance(variable, EnvVar) for variable in backend.env):
            raise PluginError(f"env of {name} must hold EnvVar records; got {backend.env!r}")

    def _quarantine(self, name: str, provider: str, error: BaseException) -> None:
        reason = _sentence(error)
        log.warning("plugin %s (%s) is quarantined: %s", name, provider, reason)
        key = name if name not in self.quarantined and name not in self.backends else f"{name} ({provider})"
        self.quarantined[key] = Quarantined(name, provider, reason, error)


def _sentence(error: BaseException) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"


def _importer(module: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(module)
