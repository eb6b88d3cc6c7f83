"""Buckets: the parameters that one call of an update op can serve, and that call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _runtime, functional
from ..choosing import explain
from ..dispatch import current_override
from ..errors import NoKernel
from . import memory
from .options import Config
from .state import BLOCKSIZE, State
from .steps import Steps, following


class Bucket:
    """Parameters of one configuration, device, dtype, kind of state, number of steps and pair of codebooks.

    steps   how many each has taken: an int, or a tensor that they share
    states  of all parameters; those without elements are left out of the call
    """

    def __init__(self, config: Config, sample: State) -> None:
        self.config = config
        self.steps: Steps = sample["step"]
        self.quantized = sample["state1"].dtype is torch.uint8
        self.codebooks = sample.get("qmap1"), sample.get("qmap2")
        self.states: list[State] = []
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.seeds: list[int] = []
        self._lists: dict[str, list[Tensor]] = {name: [] for name in ("state1", "absmax1", "state2", "absmax2")}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._plain = True

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
        self.params.append(target)
        self.grads.append(grad.contiguous())
        for name, tensors in self._lists.items():
            if (tensor := state.get(name)) is not None:
                tensors.append(tensor if order is None or name[0] == "a" else memory.flat(tensor, order))
        if seed is not None:
            self.seeds.append(seed)

    def arguments(self, rule: str, grad_scale: Tensor | None) -> tuple[str, tuple[Any, ...]]:
        """Name and arguments of the op call that takes the next step."""
        c, device = self.config, self.params[0].device
        step = following(self.steps)
        lr = c.lr if isinstance(c.lr, Tensor) else torch.tensor(c.lr, dtype=torch.float64)
        lr, grad_scale = _beside(lr, device), None if grad_scale is None else _beside(grad_scale, device)
        numbers = (list(c.betas), c.eps, c.weight_decay, c.alpha, c.t_alpha, c.t_beta3, c.max_unorm, c.skip_zeros)
        rest = (step, lr, grad_scale, *numbers, self.seeds)
        one, absmax1, two, absmax2 = self._lists.values()
        if not self.quantized:
            return "update_32bit", (rule, self.params, self.grads, one, two, *rest)
        table1, table2 = self.codebooks
        states = (one, absmax1, table1, two, absmax2, table2, BLOCKSIZE)
        return "update_8bit", (rule, self.params, self.grads, *states, *rest)

    def run(self, name: str, args: tuple[Any, ...]) -> None:
        """Call the op on its arguments: the planned kernel where nothing observes, torch's op otherwise."""
        direct = self._plain and functional._direct(self.params[0], None)
        call = _runtime.callers[name] if direct else getattr(torch.ops.halfbyte, name).default
        call(*args)
        for param, copy in self._copies:
            param.copy_(copy)
        torch.autograd.graph.increment_version(self.params)  # kernels write through pointers


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
