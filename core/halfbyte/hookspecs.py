"""The hooks.  Their docstrings are the plugin manual.

A plugin is a module (or object) with functions of these names, marked `@halfbyte.hookimpl`.  Publish it under
the entry-point group `halfbyte.backends`; the entry point's name is the backend's.

Hooks yield records.  The host validates them plugin by plugin: one that raises, implements an unknown hook,
speaks another contract version or takes a name that is taken is quarantined with a sentence, and everything
else goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from .backend import Backend, Check
from .op import Op

if TYPE_CHECKING:
    from .decision import Decision

hookspec = pluggy.HookspecMarker("halfbyte")
hookimpl = pluggy.HookimplMarker("halfbyte")


@hookspec
def halfbyte_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Offer backends.

    Called once, at import.  Return quickly and import nothing heavy: a backend object is a promise, its kernels
    are loaded when one is first wanted.

    Two backends with one name are an error that names both distributions.

    Example::

        @halfbyte.hookimpl
        def halfbyte_backends():
            yield AcmeBackend()
    """


@hookspec
def halfbyte_ops() -> Iterable[Op]:  # type: ignore[empty-body]
    """Offer further ops, in a torch namespace of their own.

    Called once, at import, before any backend's kernels are asked for.

    Example::

        @halfbyte.hookimpl
        def halfbyte_ops():
            yield Op("rotate", "(Tensor x) -> Tensor", ..., namespace="acme")
    """


@hookspec(firstresult=True)
def halfbyte_rank(op: Op, facts: Any, candidates: Sequence[str]) -> Sequence[str] | None:
    """Reorder the candidate backends of one op.

    Called once per new situation, in automatic mode only (a forced chain is the user's word).  Returns the
    names, best first; names left out are not used.  None leaves the order to priority.

    Example::

        @halfbyte.hookimpl
        def halfbyte_rank(op, facts, candidates):
            if op.name == "linear_4bit" and facts.device.type == "acme":
                return ["acme", "reference"]
    """


@hookspec
def halfbyte_resolved(decision: Decision) -> None:
    """Learn of a decision.

    Called once per new entry of the plan, for logging and telemetry.  What it raises is logged and ignored.

    Example::

        @halfbyte.hookimpl
        def halfbyte_resolved(decision):
            print(decision.op, decision.backend)
    """


@hookspec
def halfbyte_doctor_checks() -> Iterable[Check]:  # type: ignore[empty-body]
    """Add lines to `halfbyte doctor`.

    Called when doctor runs.

    Example::

        @halfbyte.hookimpl
        def halfbyte_doctor_checks():
            yield Check("acme driver", ok=True, message="version 7")
    """
