"""Buckets: the parameters that one call of an update op can serve, and that call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _runtime, functional
from ..choosing import explain
from ..dispatch import current_override
from ..errors import NoKernel
from ..ops.rules import RULES
from . import memory
from .options import Config
from .state import BLOCKSIZE, PARTS, State
from .steps import Steps, following


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

    steps   how many each has taken: an int, or a tensor that they share
    paged   whether the states are on the host
    states  of all parameters; those without elements are left out of the lists
    """

    def __init__(self, rule: str, config: Config, sample: State, paged: bool) -> None:
        self.rule = rule
        self.config = config
        self.paged = paged
        self.steps: Steps = sample["step"]
        self.quantized = sample["state1"].dtype is torch.uint8
        self.codebooks = sample.get("qmap1"), sample.get("qmap2")
        self.states: list[State] = []
        self.lists = Lists()
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._plain = True

    def count(self, name: str) -> int:
        """Values that the rule keeps in one of PARTS, per element or block."""
        return RULES[self.rule].states[name[-1] == "2"]

    def add(self, param: Tensor, grad: Tensor, state: State, seed: int | None) -> None:
        """Take in a parameter, with a gradient and states of its shape; the states lie in its order."""
        self.states.append(state)
        if not param.numel():
            return
        order = memory.order_of(param)
        self._plain = self._plain and type(param) in memory.PLAIN
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

    def arguments(self, lists: Lists, grad_scale: Tensor | None) -> tuple[str, tuple[Any, ...]]:
        """Name and arguments of the op call that takes the next step of its own lists, or of parts of them."""
        c, device = self.config, lists.params[0].device
        step = following(self.steps)
        lr = c.lr if isinstance(c.lr, Tensor) else torch.tensor(c.lr, dtype=torch.float64)
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
        direct = self._plain and functional._direct(args[1][0], None)
        call = _runtime.callers[name] if direct else getattr(torch.ops.halfbyte, name).default
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
        key = (name, op.facts(*args), current_override(), _runtime.dispatcher.process_chain)
        if key in _planned:
            continue
        decision = explain(name, *args)
        if decision.kernel is None:
            raise NoKernel(decision)
        _planned.add(key)
