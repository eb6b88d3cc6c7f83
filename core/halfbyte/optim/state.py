"""The state of one parameter: which tensors it has, their dtypes and shapes, and where they live.

key                  32-bit               8-bit
step                 steps taken, an int (a float32 tensor if capturable)
state1, state2       float32, p's shape   uint8 codes, p's shape; state1 of AdEMAMix (2, *shape)
qmap1, qmap2                              float32 (256,), shared by all parameters
absmax1, absmax2                          float32 (ceil(n / 256),); absmax1 of AdEMAMix (2, ceil(n / 256))
unorm_vec            float32 (1,), present where max_unorm > 0; nothing reads it

Names, dtypes and shapes are bitsandbytes'.  A block is 256 elements in the order in which they lie in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import formats, functional
from ..ops.rules import Rule
from ..quant_state import QuantState
from . import memory

BLOCKSIZE = 256
PAGED_FROM = 100_000  # elements
PARTS = ("state1", "absmax1", "state2", "absmax2")  # what is paged
CODEBOOKS = {"1": "dynamic", "2": "dynamic_unsigned"}  # of state1 and state2; a single state takes the signed one

State = dict[str, Any]


def blocks(n: int, blocksize: int = BLOCKSIZE) -> int:
    """How many absmax values n elements have."""
    return -(-n // blocksize)


def size_of(rule: Rule, n: int, quantized: bool) -> int:
    """Bytes of the states of a parameter of n elements."""
    return sum(rule.states) * (n + 4 * blocks(n) if quantized else 4 * n)


def create(rule: Rule, param: Tensor, trust: bool, quantized: bool, device: torch.device) -> State:
    """Zero states on a device, for a parameter that was never stepped; codes of 0, absmax of 0 decode to 0."""
    state: State = {}
    order = memory.order_of(param)
    for suffix, count in (("1", rule.states[0]), ("2", rule.states[1])):
        if not count:
            continue
        dtype = torch.uint8 if quantized else torch.float32
        state[f"state{suffix}"] = memory.zeros(param, order, dtype, count, device)
        if quantized:
            shape = (count, blocks(param.numel())) if count > 1 else (blocks(param.numel()),)
            state[f"qmap{suffix}"] = formats.codebook(CODEBOOKS[suffix], param.device)
            state[f"absmax{suffix}"] = torch.zeros(shape, dtype=torch.float32, device=device)
    if trust:
        state["unorm_vec"] = torch.zeros(1, device=device)
    return state


def fits(state: State, rule: Rule, param: Tensor, device: torch.device) -> bool:
    """Whether the states lie on a device, and as the op wants them for a parameter."""
    one: Tensor = state["state1"]
    return one.device == device and memory.lies_in(one, memory.order_of(param), rule.states[0])


def refit(state: State, rule: Rule, param: Tensor, device: torch.device) -> None:
    """Bring states to a device and into the order of their parameter, which was moved or loaded.

    Codebooks go to the parameter.
    """
    order = memory.order_of(param)
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = value.to(param.device if key[:4] == "qmap" else device)
    for suffix, count in (("1", rule.states[0]), ("2", rule.states[1])):
        if not count or memory.lies_in(state[f"state{suffix}"], order, count):
            continue
        if state[f"state{suffix}"].dtype is torch.uint8:
            _reblock(state, suffix, count, order)
        else:
            state[f"state{suffix}"] = memory.ordered(state[f"state{suffix}"], order, count)
    share_codebooks([state])


def _reblock(state: State, suffix: str, count: int, order: memory.Order) -> None:
    """Bring codes into another order.  Other elements share a block then, so that they are quantized anew."""
    codes, absmax, table = (state[f"{name}{suffix}"] for name in ("state", "absmax", "qmap"))
    table = table.to(codes.device)
    target = memory.ordered(codes, order, count)
    scales = absmax.view(count, -1)
    for one, into, scale in zip(_slices(codes, count), _slices(target, count), scales, strict=True):
        run = memory.flat(one, memory.order_of(one))
        decoded = functional.dequantize_8bit(run, QuantState(scale, run.shape, table, BLOCKSIZE, None, torch.float32))
        values = memory.ordered(decoded.view(-1).as_strided(one.shape, one.stride()), order)
        found, new = functional.quantize_8bit(memory.flat(values, order), codebook=table, blocksize=BLOCKSIZE)
        memory.flat(into, order).copy_(found)
        scale.copy_(new.absmax)
    state[f"state{suffix}"] = target


def _slices(tensor: Tensor, count: int) -> list[Tensor]:
    return list(tensor.unbind()) if count > 1 else [tensor]


def share_codebooks(states: Iterable[Any]) -> None:
    """Put one table in place of equal copies, which loading and unpickling make, so that one call can serve all."""
    tables: dict[torch.device, list[Tensor]] = {}
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # id of a copy -> the copy, which keeps its id taken, and the table
    for state in states:
        for suffix, name in CODEBOOKS.items():
            key = f"qmap{suffix}"
            if not isinstance(state, dict) or not isinstance(copy := state.get(key), Tensor):
                continue
            if id(copy) not in seen:
                known = tables.setdefault(copy.device, [])
                known += [formats.codebook(name, copy.device), copy]
                seen[id(copy)] = copy, next(one for one in known if torch.equal(one, copy))
            state[key] = seen[id(copy)][1]
