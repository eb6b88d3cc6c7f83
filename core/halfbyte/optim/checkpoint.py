"""Optimizer checkpoints in bitsandbytes' layout: written in its present form, read in all of its forms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, HalfbyteWarning
from ..kernel import show
from ..ops.rules import Rule
from .state import BLOCKSIZE, State, blocks

WRAPPED = "__bnb_optimizer_quant_state__"  # since bitsandbytes 0.49; before that its content stood beside "step"
LEGACY_BLOCKSIZE = 2048  # of bitsandbytes before 0.44
ORDER = ("step", "state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2", "unorm_vec")
LEGACY = ("max1", "max2", "new_max1", "new_max2", "gnorm_vec")  # of its older optimizers; kept, never read


def wrap(state_dict: dict[str, Any]) -> dict[str, Any]:
    """torch's state_dict with all but the step of each state in an inner dictionary."""
    inner = {*ORDER, *LEGACY} - {"step"}
    state = {}
    for key, entry in state_dict["state"].items():
        outside = {name: value for name, value in entry.items() if name not in inner}
        inside = {name: value for name, value in entry.items() if name in inner}
        state[key] = {**outside, WRAPPED: inside} if inside else outside
    return {**state_dict, "state": state}


def params_by_id(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[Any, Tensor]:
    """The parameter that each id of a state_dict stands for."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    return dict(zip(saved, chain.from_iterable(group["params"] for group in groups), strict=True))


def read_groups(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Saved groups with an optimizer's own parameters.  Raises FormatError for groups of another optimizer."""
    if missing := [name for name in ("state", "param_groups") if name not in state_dict]:
        raise FormatError(f"a state_dict must have state and param_groups; {' and '.join(missing)} is missing")
    saved = state_dict["param_groups"]
    sizes, own = [len(group["params"]) for group in saved], [len(group["params"]) for group in groups]
    if sizes != own:
        raise FormatError(f"the state_dict has groups of {sizes} parameters; the optimizer has groups of {own}")
    read = []
    for number, (old, group) in enumerate(zip(saved, groups, strict=True)):
        if missing := [name for name in ("lr", "betas", "eps", "weight_decay") if name not in old]:
            raise FormatError(f"group {number} of the state_dict has no {', '.join(missing)}: another optimizer's")
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        new = copy.deepcopy({name: value for name, value in old.items() if name != "params"})
        read.append({**defaults, **names, **new, "params": group["params"]})
    return read


def read_state(where: str, entry: Mapping[str, Any], rule: Rule, param: Tensor) -> State:
    """A copy of one saved state in the present layout, or {} for a parameter that was never stepped.

    param  what the state belongs to; of a DTensor the local shard

    Raises FormatError where it cannot be this parameter's state under this rule.
    """
    entry = {**entry, **entry.get(WRAPPED, {})}
    entry.pop(WRAPPED, None)
    if not entry:
        return {}
    _check(where, entry, rule, param)
    state = {name: entry[name] for name in ORDER if name in entry}
    state |= {name: value for name, value in entry.items() if name not in state}
    state = {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in state.items()
    }
    if state["state1"].dtype is torch.uint8:
        for suffix, _ in _suffixes(rule):
            state[f"absmax{suffix}"] = _in_present_blocks(state[f"absmax{suffix}"], param.numel())
        if rule.states[0] == 2:
            state["absmax1"] = _disentangled(where, state["absmax1"], param.numel())
    return state


def _suffixes(rule: Rule) -> list[tuple[str, int]]:
    return [(suffix, count) for suffix, count in zip("12", rule.states, strict=True) if count]


def _check(where: str, entry: Mapping[str, Any], rule: Rule, param: Tensor) -> None:
    found = ", ".join(sorted(map(str, entry)))
    if "state1" not in entry:
        raise FormatError(f"{where} has no state1, only {found}: it is another optimizer's, or truncated")
    if not rule.states[1] and "state2" in entry:
        raise FormatError(f"{where} has a state2, which this optimizer has not: it is another optimizer's")
    quantized = entry["state1"].dtype is torch.uint8
    needed = ["step"]
    for suffix, _ in _suffixes(rule):
        needed += [f"state{suffix}", *([f"qmap{suffix}", f"absmax{suffix}"] if quantized else [])]
    if missing := [name for name in needed if name not in entry]:
        raise FormatError(f"{where} has no {', '.join(missing)}, only {found}: it is another optimizer's, or truncated")
    for suffix, count in _suffixes(rule):
        shape = (count, *param.shape) if count > 1 else tuple(param.shape)
        _require(where, f"state{suffix}", entry, [shape], torch.uint8 if quantized else torch.float32)
        if quantized:
            lengths = [blocks(param.numel()), blocks(param.numel(), LEGACY_BLOCKSIZE)]
            shapes = [(count, length) if count > 1 else (length,) for length in lengths]
            _require(where, f"absmax{suffix}", entry, shapes, torch.float32)
            _require(where, f"qmap{suffix}", entry, [(256,)], torch.float32)


def _require(
    where: str, name: str, entry: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> None:
    tensor = entry[name]
    if tuple(tensor.shape) not in shapes or tensor.dtype is not dtype:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise FormatError(
            f"{name} of {where} must be {show(dtype)} of shape {wanted}; "
            f"got {show(tensor.dtype)} of shape {tuple(tensor.shape)}"
        )


def _in_present_blocks(absmax: Tensor, n: int) -> Tensor:
    """One absmax per 256 elements: of an older, larger block its parts have the same, which is exact."""
    if absmax.shape[-1] == blocks(n):
        return absmax
    return absmax.repeat_interleave(LEGACY_BLOCKSIZE // BLOCKSIZE, dim=-1)[..., : blocks(n)].contiguous()


def _disentangled(where: str, absmax: Tensor, n: int) -> Tensor:
    """Undo an error of bitsandbytes' CUDA kernel for AdEMAMix, where the last block is a partial one.

    It writes the slow average's absmax one place too early, over the fast average's last one.  The last place is
    then 0, though the block before it is not.  The fast average of the last block is lost and starts again from 0.
    """
    last = blocks(n) - 1
    if n % BLOCKSIZE == 0 or absmax[1, last] != 0 or absmax[0, last] == 0:
        return absmax
    warnings.warn(
        f"{where} was saved by a bitsandbytes kernel that misplaces absmax1 of AdEMAMix; it is put right, and the "
        "fast average of the last block starts from 0",
        HalfbyteWarning,
        stacklevel=4,
    )
    slow = absmax.view(-1)[last:-1].clone()
    fixed = absmax.clone()
    fixed[0, last] = 0
    fixed[1] = slow
    return fixed
