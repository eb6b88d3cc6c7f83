"""Which backend runs, and why: the questions and choices of a user."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from . import _runtime
from .decision import Decision
from .dispatch import current_override
from .errors import InputError
from .op import Op


@dataclass(frozen=True)
class BackendInfo:
    """One known backend.

    reasons      why this machine cannot run it; empty means it can, as far as is known before its kernels are loaded
    provider     the distribution it comes from
    """

    name: str
    priority: int
    device_types: tuple[str, ...]
    reasons: tuple[str, ...]
    provider: str


def active() -> dict[str, str]:
    """The backend of each device found: {"cuda:0": "cuda", "cpu": "cpu"}.

    Raises ConfigError for an unknown name, BackendUnavailable for a forced backend that cannot run.
    """
    return _runtime.dispatcher.active()


def backends() -> list[BackendInfo]:
    """All known backends by descending priority; quarantined plugins come last, with their reason."""
    dispatcher, plugins = _runtime.dispatcher, _runtime.dispatcher.plugins
    known = [
        BackendInfo(
            backend.name,
            backend.priority,
            tuple(sorted(backend.device_types)) or ("any",),
            dispatcher.why_not(backend, load=False),
            plugins.providers[backend.name],
        )
        for backend in plugins.backends.values()
    ]
    known.sort(key=lambda info: (-info.priority, info.name))
    return known + [
        BackendInfo(name, 0, (), (f"quarantined: {plugin.reason}",), plugin.provider)
        for name, plugin in plugins.quarantined.items()
    ]


def explain(op: str | Op, *args: Any) -> Decision:
    """Which kernel would run an op on these arguments, and why.

    op     a name such as "linear_4bit", or the Op
    args   what the op takes; or one Facts tuple of it

    Raises InputError for an unknown op or a wrong number of arguments; where no kernel applies, the decision's
    backend is None.
    """
    dispatcher = _runtime.dispatcher
    record = dispatcher.plugins.ops.get(op) if isinstance(op, str) else op
    if record is None:
        raise InputError(f"op must be one of {', '.join(sorted(dispatcher.plugins.ops))}; got {op!r}")
    if len(args) == 1 and isinstance(args[0], record.Facts):
        return dispatcher.decide(record, args[0], current_override() or dispatcher.process_chain)
    taken = inspect.signature(record.facts)
    try:
        taken.bind(*args)
    except TypeError:
        names = ", ".join(taken.parameters)
        raise InputError(f"{record.name} takes {names}, or its Facts; got {len(args)} arguments") from None
    record.check(*args)
    facts = record.Facts(*record.facts(*args))
    return dispatcher.decide(record, facts, current_override() or dispatcher.process_chain)


def set_backend(chain: str | Sequence[str] | None) -> None:
    """Choose the backend for the whole process: a name, a comma-separated list, "auto"; None undoes it."""
    _runtime.dispatcher.set_backend(chain)


def use_backend(chain: str | Sequence[str]) -> AbstractContextManager[None]:
    """Choose the backend for this thread or task, as a context manager."""
    return _runtime.dispatcher.use_backend(chain)
