"""Buckets: the parameters that one call of an update op can serve, and that call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _runtime, calling
from ..choosing import explain
from ..dispatch import current_override
from ..errors import NoKernel
from ..native import Known, Placed
from ..ops.rules import RULES
from . import memory
from .options import Config
from .state import BLOCKSIZE, PARTS, State
from .steps import Steps, following

Source = tuple[int, Any]  # what a configuration is resolved from: the number of a group, and a parameter's overrides


class Job(NamedTuple):
    """One parameter of a step: the tensor that the state belongs to, and the local shards that are worked on."""

    key: Tensor
    param: Tensor
    grad: Tensor
    config: Config
    source: Source
    position: int


@dataclass
class Lists:
    """What an update op takes of each parameter; empty where an optimizer has no such state, or no seeds."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    state1: list[Tensor] = field(default_factory=list)
    absmax1: list[Tensor] = field(default_factory=list)
    state2: list[Tensor] = field(default_factory=list)
    absmax2: list[Tensor] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


class Bucket:
    """Parameters of one configuration, device, dtype, kind of state, number of steps and pair of codebooks.

    steps    how many each has taken: an int, or a tensor that they share
    paged    whether the states are on the host
    steady   whether the lists have the parameters, gradients and states themselves, no views or copies
    keys     of all parameters, like states; those without elements are left out of the lists
    """

    def __init__(self, rule: str, job: Job, sample: State, paged: bool) -> None:
        self.rule = rule
        self.config = job.config
        self.paged = paged
        self.steps: Steps = sample["step"]
        self.kinds = job.param.device, job.param.dtype, sample["state1"].dtype
        self.quantized = sample["state1"].dtype is torch.uint8
        self.codebooks = sample.get("qmap1"), sample.get("qmap2")
        self.parts = [name for name in PARTS if name in sample]
        self.steady = True
        self.keys: list[Tensor] = []
        self.states: list[State] = []
        self.sources: list[Source] = []
        self.lists = Lists()
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._plain = True
        self._known: dict[str, Known] = {}  # of the lists, where they were renewed
        self._tables = {name: sample[name] for name in ("qmap1", "qmap2") if name in sample}

    def count(self, name: str) -> int:
        """Values that the rule keeps in one of PARTS, per element or block."""
        return RULES[self.rule].states[name[-1] == "2"]

    def add(self, job: Job, state: State, seed: int | None) -> None:
        """Take in a parameter, with states of its shape that lie in its order."""
        param, grad = job.param, job.grad
        self.keys.append(job.key)
        self.states.append(state)
        if job.source[1] is not None or job.source not in self.sources:
            self.sources.append(job.source)
        if not param.numel():
            self.steady = False
            return
        order = memory.order_of(param)
        self._plain = self._plain and type(param) in memory.PLAIN
        self.steady = self.steady and type(job.key) in memory.PLAIN and param.is_contiguous() and grad.is_contiguous()
        target = param
        if order is not None:
            target, grad = memory.flat(param, order), memory.flat(memory.ordered(grad, order), order)
        elif not param.is_contiguous():
            target = param.contiguous()
            self._copies.append((param, target))
        self.lists.params.append(target)
        self.lists.grads.append(grad.contiguous())
        for name in PARTS:
            if (tensor := state.get(name)) is not None:
                flat = tensor if order is None or name[0] == "a" else memory.flat(tensor, order)
                getattr(self.lists, name).append(flat)
        if seed is not None:
            self.lists.seeds.append(seed)

    def renew(self, states: Mapping[Tensor, State], resolved: Callable[[Source], Config]) -> bool:
        """Take the configuration, gradients and states of now, of a steady bucket that took a step before.

        False where anything but their values, the learning rate and its like has changed.
        """
        configs = {resolved(source) for source in self.sources}
        grads: list[Any] = [param.grad for param in self.keys]
        if len(configs) != 1 or {*map(type, grads)} != {Tensor}:
            return False
        self.config, before = configs.pop(), self.config
        found = [*map(states.get, self.keys)]
        if None in found:
            return False
        self.states = found  # type: ignore[assignment]
        try:
            counts = [state["step"] for state in self.states]
            tables = {name: [state[name] for state in self.states] for name in self._tables}
            placed = {
                name: Placed([state[name] for state in self.states], self._known.get(name)) for name in self.parts
            }
            placed["params"], placed["grads"] = Placed(self.keys, self._known.get("params")), Placed(grads)
        except (KeyError, ValueError, RuntimeError):  # no such state, not alike, without an address
            return False
        self._known = {name: one.known for name, one in placed.items()}
        self.lists = Lists(**placed, seeds=self.lists.seeds)
        self.steps = counts[0]
        together = [*map(id, counts)] if isinstance(self.steps, Tensor) else counts
        device, dtype, quantized = self.kinds
        return (
            together.count(together[0]) == len(together)
            and all(all(map(is_, tables[name], repeat(table))) for name, table in self._tables.items())
            and {self._known[name][:2] for name in ("params", "grads")} == {(dtype, device)}
            and self._known["state1"][:2] == (quantized, device)
            and self.config.max_unorm == before.max_unorm
        )

    def release(self) -> None:
        """Let go of gradients and states: who frees or replaces them after a step must be able to."""
        self.states = []
        self.lists = Lists(seeds=self.lists.seeds)

    def arguments(self, lists: Lists, grad_scale: Tensor | None) -> tuple[str, tuple[Any, ...]]:
        """Name and arguments of the op call that takes the next step of its own lists, or of parts of them."""
        c, device = self.config, lists.params[0].device
        step = following(self.steps)
        lr = c.lr if isinstance(c.lr, Tensor) else torch.scalar_tensor(c.lr, dtype=torch.float64)
        lr, grad_scale = _beside(lr, device), None if grad_scale is None else _beside(grad_scale, device)
        numbers = (list(c.betas), c.eps, c.weight_decay, c.alpha, c.t_alpha, c.t_beta3, c.max_unorm, c.skip_zeros)
        rest = (step, lr, grad_scale, *numbers, lists.seeds)
        first = (self.rule, lists.params, lists.grads, lists.state1)
        if not self.quantized:
            return "update_32bit", (*first, lists.state2, *rest)
        table1, table2 = self.codebooks
        return "update_8bit", (*first, lists.absmax1, table1, lists.state2, lists.absmax2, table2, BLOCKSIZE, *rest)

    def call(self, name: str, args: tuple[Any, ...]) -> None:
        """Call the op on its arguments: the planned kernel where nothing observes, torch's op otherwise."""
        direct = self._plain and calling.direct(args[1][0])
        call = calling.planned[name] if direct else getattr(torch.ops.halfbyte, name).default
        call(*args)

    def finish(self) -> None:
        """After the call, or the last one: write back what was stepped in a copy."""
        for param, copy in self._copies:
            param.copy_(copy)
        torch.autograd.graph.increment_version(self.lists.params)  # kernels write through pointers


def _beside(number: Tensor, device: torch.device) -> Tensor:
    """A 0-dim tensor where the op takes it: on the host, or on the parameters' device."""
    return number if number.device.type == "cpu" else number.to(device)


def count(buckets: Iterable[Bucket]) -> None:
    """Note that the states of some buckets have taken a step."""
    shared = {id(bucket.steps): bucket.steps for bucket in buckets if isinstance(bucket.steps, Tensor)}
    for tensor in shared.values():
        tensor.add_(1)
    for bucket in buckets:
        if not isinstance(bucket.steps, Tensor):
            for state in bucket.states:
                state["step"] = bucket.steps + 1


_planned: set[Any] = set()


def require_kernels(calls: list[tuple[str, tuple[Any, ...]]]) -> None:
    """Raise NoKernel for a call that no backend can serve, before another one has changed anything."""
    for name, args in calls:
        op = _runtime.dispatcher.plugins.ops[name]
        facts = op.Facts(*op.facts(*args))
        key = (name, facts, current_override(), _runtime.dispatcher.process_chain)
        if key in _planned:
            continue
        decision = explain(name, facts)  # of paged states the arguments are not there yet
        if decision.kernel is None:
            raise NoKernel(decision)
        _planned.add(key)
