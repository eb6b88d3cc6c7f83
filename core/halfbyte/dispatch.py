"""The dispatcher: picks one kernel per situation, remembers it, and can say why.

Chain, first that is set: use_backend > set_backend > HALFBYTE_BACKEND_<OP> > HALFBYTE_BACKEND > halfbyte_rank >
priority.  A plan maps (chain, facts) to a function; a call costs the facts and one dict lookup.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pluggy
from torch import Tensor

from . import probe, weights
from .backend import Backend
from .config import AUTO, Chain, Config, parse_chain
from .decision import Decision, Reasons
from .errors import BackendUnavailable, ConfigError, HalfbytePerformanceWarning, KernelUnusable, NoKernel
from .kernel import DeviceFacts, Kernel
from .op import Op
from .plugins import Plugins

log = logging.getLogger("halfbyte.dispatch")


_override: contextvars.ContextVar[Chain | None] = contextvars.ContextVar("halfbyte_backend", default=None)


class Dispatcher:
    """All mutable state of choosing: configuration, the process's chain, loaded kernels, plans."""

    def __init__(self, plugins: Plugins, config: Config) -> None:
        self.plugins = plugins
        self.config = config
        self.process_chain: Chain | None = None
        self._lock = threading.RLock()
        self._kernels: dict[str, dict[str, list[Kernel]]] = {}
        self._unloadable: dict[str, Reasons] = {}
        self._plans: dict[str, dict[Any, Callable[..., Any]]] = {}
        self._binds: dict[Callable[..., Any], Callable[..., Any]] = {}  # of planned kernels that have one
        self._refused: dict[tuple[Callable[..., Any], Any], Reasons] = {}
        self._warned: set[tuple[str, str]] = set()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """A thread that held the lock does not exist in the child: what it was making is made anew."""
        self._lock = threading.RLock()

    # -- choosing ------------------------------------------------------------------------------------------

    def caller(self, op: Op) -> Callable[..., Any]:
        """The function that checks an op's arguments and runs the planned kernel on them."""
        check, facts_of, plan = op.check, op.facts, self._plans.setdefault(op.name, {})
        override = _override.get

        def call(*args: Any) -> Any:
            check(*args)
            facts = facts_of(*args)  # perhaps a plain tuple: equal to the Facts that it makes, and cheaper
            chain = override() or self.process_chain
            while True:
                try:
                    function = plan[chain, facts]
                except KeyError:
                    function = self._planned(op, op.Facts(*facts), chain, plan)
                try:
                    return function(*args)
                except KernelUnusable as error:
                    self._refuse(op, op.Facts(*facts), function, error)

        return call

    def binder(self, op: Op) -> Callable[..., Any]:
        """The function that does the same over a weight that serves many calls: it checks and chooses once.

        It takes x, the bias (None for an op without one), the weight's owner, its tensors as known() wants them, and
        the op's other arguments.  Of x it looks at device, dtype and last dimension; who calls it checks the bias.
        """
        first, plan, takes_bias = self.caller(op), self._plans[op.name], "Tensor? bias" in op.schema
        name, override, known = op.name, _override.get, weights.known

        def call(
            x: Tensor, bias: Tensor | None, owner: Tensor, tensors: tuple[Any, ...], plain: tuple[Any, ...]
        ) -> Any:
            weight = known(owner, *tensors)
            chain = override() or self.process_chain
            situation = (name, chain, x.device, x.dtype, x.shape[-1:], plain)
            way = None if weight is None else weight.ways.get(situation)
            if way is not None:
                try:
                    return way(x, bias, tensors)
                except KernelUnusable:
                    pass  # caller's way refuses the kernel and finds another
            args = (x, *tensors, bias, *plain) if takes_bias else (x, *tensors, *plain)
            result = first(*args)
            function = plan.get((chain, op.facts(*args)))
            if weight is not None and function is not None:
                bind = self._binds.get(function) if weight.dense else None
                weight.ways[situation] = bind(*tensors, *plain) if bind else _unbound(function, plain, takes_bias)
            return result

        return call

    def _refuse(self, op: Op, facts: Any, function: Callable[..., Any], error: KernelUnusable) -> None:
        """Keep a reason that only a kernel's first call could find, and drop the plans that it overturns."""
        plan = self._plans[op.name]
        with self._lock:
            first = (function, facts) not in self._refused
            self._refused[function, facts] = (str(error),)
            for key in [key for key, planned in plan.items() if planned is function and key[1] == facts]:
                del plan[key]
            weights.forget()
        if first:
            log.warning("a kernel for %s is not used for %s: %s", op.name, facts, error)

    def _planned(self, op: Op, facts: Any, chain: Chain | None, plan: dict[Any, Any]) -> Callable[..., Any]:
        decision = self.decide(op, facts, chain)
        if decision.kernel is None:
            raise NoKernel(decision)
        self._mind_the_fallback(decision)
        with self._lock:  # of threads that race, one makes the entry and announces it
            if (chain, facts) in plan:
                return plan[chain, facts]  # type: ignore[no-any-return]
            plan[chain, facts] = decision.kernel.function
            if decision.kernel.bind is not None:
                self._binds[decision.kernel.function] = decision.kernel.bind
        log.debug("%s", decision)
        for impl in self.plugins.manager.hook.halfbyte_resolved.get_hookimpls():
            try:
                _ask(impl, decision=decision)
            except Exception:
                log.exception("halfbyte_resolved of plugin %s raised", impl.plugin_name)
        return decision.kernel.function

    def decide(self, op: Op, facts: Any, chain: Chain | None = None) -> Decision:
        """Resolve one situation, with the whole trace.  Raises ConfigError or BackendUnavailable for a bad chain."""
        device = probe.confirmed(facts.device)
        names, chosen_by = self._candidates(op, facts, *self._chain(op.name, chain))
        excluded = self._excluded(facts.device.type, names, chosen_by)
        tried: list[tuple[str, Reasons]] = []
        for name in names:
            kernel, reasons = self._best_kernel(self.plugins.backends[name], op, facts, device)
            if kernel is not None:
                return Decision(op.name, facts, device, name, kernel.variant, chosen_by, tuple(tried), excluded, kernel)
            tried.append((name, reasons))
        self._chain(op.name, chain)  # raises where by now it is known that the kernels of none can be loaded
        return Decision(op.name, facts, device, None, "", chosen_by, tuple(tried), excluded, None)

    def _chain(self, op: str, chain: Chain | None) -> tuple[Chain, str]:
        """The chain that holds for an op, checked, and who set it."""
        if self.config.errors:
            raise ConfigError("; ".join(self.config.errors))
        origin = "use_backend" if chain == _override.get() else "set_backend"
        if chain is None:
            chain = self.config.per_op.get(op)
            origin = f"HALFBYTE_BACKEND_{op.upper()}"
        if chain is None:
            chain, origin = self.config.backend or AUTO, "HALFBYTE_BACKEND"
        self.require(chain, origin)
        return chain, f"{origin}={','.join(chain)}"

    def _candidates(self, op: Op, facts: Any, chain: Chain, origin: str) -> tuple[list[str], str]:
        backends, device_type = self.plugins.backends, facts.device.type
        if chain != AUTO and any(backends[name].claims(device_type) for name in chain):
            return list(chain), origin
        names = self._by_priority(device_type)
        for impl in reversed(self.plugins.manager.hook.halfbyte_rank.get_hookimpls()):  # pluggy's order of calls
            try:
                ranked = _ask(impl, op=op, facts=facts, candidates=tuple(names))
                if ranked is not None:
                    return [name for name in dict.fromkeys(ranked) if name in names], "halfbyte_rank"
            except Exception:
                log.exception("halfbyte_rank of plugin %s raised", impl.plugin_name)
        return names, "priority"

    def _by_priority(self, device_type: str) -> list[str]:
        claiming = [backend for backend in self.plugins.backends.values() if backend.claims(device_type)]
        return [backend.name for backend in sorted(claiming, key=lambda one: (-one.priority, one.name))]

    def _excluded(self, device_type: str, names: Sequence[str], chosen_by: str) -> tuple[tuple[str, str], ...]:
        """Backends for this type of device that were not asked; quarantined plugins count among them."""
        left_out = [one.name for one in self.plugins.backends.values() if one.claims(device_type)]
        left_out = [name for name in left_out if name not in names]
        excluded = [(name, f"not in {chosen_by}") for name in left_out] if chosen_by != "priority" else []
        return (*excluded, *((q.plugin, f"quarantined: {q.reason}") for q in self.plugins.quarantined.values()))

    def _best_kernel(self, backend: Backend, op: Op, facts: Any, device: DeviceFacts) -> tuple[Kernel | None, Reasons]:
        if not backend.claims(device.type):
            types = ", ".join(sorted(backend.device_types))
            return None, (f"serves {types}, not {device.type}",)
        if reasons := self.why_not(backend) or answer(backend.why_not_device, device):
            return None, reasons
        kernels = self.kernels(backend).get(op.name, [])
        if not kernels:
            return None, (f"has no kernel for {op.name}",)
        against: dict[str, list[str]] = {}
        for kernel in kernels:
            reasons = answer(kernel.why_not, facts, device) or self._refused.get((kernel.function, facts), ())
            if not reasons:
                return kernel, ()
            for reason in reasons:
                against.setdefault(reason, []).append(kernel.variant)
        return None, tuple(
            f"{'/'.join(variants)}: {reason}" if len(variants) < len(kernels) and all(variants) else reason
            for reason, variants in against.items()
        )

    def kernels(self, backend: Backend) -> dict[str, list[Kernel]]:
        """A backend's kernels by op, best first.  Loads them on the first call."""
        with self._lock:
            if backend.name not in self._kernels:
                by_op: dict[str, list[Kernel]] = {}
                for kernel in backend.kernels():
                    op = self.plugins.ops.get(kernel.op)
                    if op is None:
                        raise ConfigError(f"backend {backend.name} has a kernel for an unknown op {kernel.op!r}")
                    if unknown := set(kernel.limits) - set(op.Facts._fields):
                        raise ConfigError(
                            f"backend {backend.name} limits {kernel.op} by {', '.join(sorted(unknown))}; "
                            f"its facts are {', '.join(op.Facts._fields)}"
                        )
                    by_op.setdefault(kernel.op, []).append(kernel)
                for kernels in by_op.values():
                    kernels.sort(key=lambda kernel: -kernel.priority)
                self._kernels[backend.name] = by_op
            return self._kernels[backend.name]

    def why_not(self, backend: Backend, *, load: bool = True) -> Reasons:
        """Reasons against a backend on this machine.

        Kernels that cannot be loaded count as one: it is found out here, once, or with load=False only remembered.
        """
        if reasons := answer(backend.why_not):
            return reasons
        if load and backend.name not in self._unloadable:
            try:
                self.kernels(backend)
            except Exception as error:
                reason = f"its kernels cannot be loaded: {type(error).__name__}: {error}"
                log.warning("backend %s is not used: %s", backend.name, reason)
                self._unloadable[backend.name] = (reason,)
        return self._unloadable.get(backend.name, ())

    def _mind_the_fallback(self, decision: Decision) -> None:
        """Say once per op and device that an accelerator runs the reference without having been told to."""
        on_host = decision.device.type in ("cpu", "meta")
        fell = decision.chosen_by == "priority" or (decision.chosen_by == "halfbyte_rank" and decision.tried)
        if decision.backend != "reference" or on_host or not fell:
            return
        if self.config.fallback == "error":
            raise NoKernel(decision, "\nHALFBYTE_FALLBACK=error forbids the reference on an accelerator")
        seen = (decision.op, str(decision.device))
        with self._lock:
            first = seen not in self._warned
            self._warned.add(seen)
        if self.config.fallback == "warn" and first:
            reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in decision.tried) or "no backend serves it"
            warnings.warn(
                f"{decision.op} on {decision.device} runs the slow reference ({reasons})",
                HalfbytePerformanceWarning,
                stacklevel=4,
            )

    # -- what users set and ask ----------------------------------------------------------------------------

    def require(self, chain: Chain, origin: str) -> None:
        """Raise for a chain with an unknown name, or of which nothing can run on this machine."""
        if chain == AUTO:
            return
        for name in chain:
            if name in self.plugins.backends:
                continue
            if name in self.plugins.quarantined:
                plugin = self.plugins.quarantined[name]
                raise BackendUnavailable(f"backend {name} is quarantined: {plugin.reason}") from plugin.error
            known = ", ".join(sorted(self.plugins.backends))
            raise ConfigError(f"{origin}: there is no backend {name!r}; known are {known}")
        against = {name: self.why_not(self.plugins.backends[name], load=False) for name in chain}
        if all(against.values()):
            reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in against.items())
            raise BackendUnavailable(f"{origin}={','.join(chain)} cannot run on this machine ({reasons})")

    def check_choice(self) -> None:
        """Raise for a process-wide choice that cannot hold: what import warns of, without a look at the devices."""
        self._chain("", self.process_chain)

    def active(self) -> dict[str, str]:
        """The backend of each device found.  Kernels are loaded only of a backend that was asked for by name."""
        chain, origin = self._chain("", _override.get() or self.process_chain)
        found = {}
        for device in probe.machine():
            forced = chain != AUTO and any(self.plugins.backends[name].claims(device.type) for name in chain)
            against = []
            for name in chain if forced else self._by_priority(device.type):
                backend = self.plugins.backends[name]
                if not backend.claims(device.type):
                    continue
                why = self.why_not(backend, load=forced) or answer(backend.why_not_device, device)
                if not why:
                    found[str(device)] = name
                    break
                against.append(f"{name}: {', '.join(why)}")
            else:
                raise BackendUnavailable(f"no backend of {origin} can run on {device} ({'; '.join(against)})")
        return found

    def set_backend(self, chain: str | Sequence[str] | None) -> None:
        """Choose for the whole process."""
        parsed = None if chain is None else parse_chain(chain, "set_backend")
        if parsed is not None:
            self.require(parsed, "set_backend")
        self.process_chain = parsed

    @contextlib.contextmanager
    def use_backend(self, chain: str | Sequence[str]) -> Iterator[None]:
        """Choose for this thread or task."""
        parsed = parse_chain(chain, "use_backend")
        self.require(parsed, "use_backend")
        with entered(parsed):
            yield

    def forget(self) -> None:
        """Drop plans and loaded kernels, after the set of backends changed (for tests)."""
        with self._lock:
            for plan in self._plans.values():
                plan.clear()
            self._kernels.clear()
            self._unloadable.clear()
            self._refused.clear()
            self._warned.clear()
            self._binds.clear()
            weights.forget()


def _unbound(function: Callable[..., Any], plain: tuple[Any, ...], takes_bias: bool) -> Callable[..., Any]:
    """What Kernel.bind would give, of a kernel without it."""
    if takes_bias:
        return lambda x, bias, tensors: function(x, *tensors, bias, *plain)
    return lambda x, bias, tensors: function(x, *tensors, *plain)


def _ask(impl: pluggy.HookImpl, **given: Any) -> Any:
    """Call one implementation of a hook with the arguments that it takes; one that raises must not stop the others."""
    return impl.function(*(given[name] for name in impl.argnames))


def answer(why_not: Callable[..., Reasons], *about: Any) -> Reasons:
    """What a plugin answers; a plugin that raises cannot be used, and everything else goes on."""
    try:
        return tuple(why_not(*about))
    except Exception as error:
        log.debug("%s raised", why_not, exc_info=True)
        return (f"its {why_not.__name__} raised {type(error).__name__}: {error}",)


class entered:  # not a generator with contextlib, which takes three times as long
    """Make a parsed chain hold here: also how autograd's own threads re-enter the forward's choice."""

    __slots__ = ("_chain", "_token")

    def __init__(self, chain: Chain | None) -> None:
        self._chain = chain

    def __enter__(self) -> None:
        self._token = _override.set(self._chain)

    def __exit__(self, *error: object) -> None:
        _override.reset(self._token)


def current_override() -> Chain | None:
    """The chain that `use_backend` set in this thread or task."""
    return _override.get()
