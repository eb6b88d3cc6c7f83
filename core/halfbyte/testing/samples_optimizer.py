"""Arguments for the optimizer updates; testing/samples.py says what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..ops import rules
from .draw import Draw

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_32BIT = {"dtype": FLOATS, "optimizer": tuple(rules.RULES), "trust": (False, True), "stochastic": (False, True)}
DOMAINS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "update_32bit": _32BIT,
    "update_8bit": {
        "dtype": FLOATS,
        "optimizer": tuple(rules.RULES),
        "blocksize": (64, 100, 256, 2048, 4096),
        "trust": (False, True),
        "stochastic": (False, True),
    },
}

VALUES = ("normal", "zeros", "equal", "nan", "inf")


def possible(facts: Any) -> bool:
    """A trust factor needs a rule that has one, stochastic rounding bfloat16."""
    return (not facts.trust or rules.RULES[facts.optimizer].trust) and (
        not facts.stochastic or facts.dtype is torch.bfloat16
    )


def sizes(facts: Any) -> Mapping[str, tuple[int, ...]]:
    """Elements of each parameter."""
    block = getattr(facts, "blocksize", 256)
    return {
        "usual": (block + 300, 40, 3),
        "partial": (2 * block + 19,),
        "odd": (45, 7, 1),
        "one": (1,),
        "empty": (0, 5),
    }


def make_32bit(facts: Any, size: tuple[int, ...], draw: Draw) -> tuple[Any, ...]:
    return (
        facts.optimizer,
        *_parameters(facts, size, draw),
        *_states(facts, size, draw, lambda count: draw.positive((count,)) / 64),
        *_hyper(facts, size),
    )


def make_8bit(facts: Any, size: tuple[int, ...], draw: Draw) -> tuple[Any, ...]:
    codes = _states(facts, size, draw, lambda count: draw.integers(0, 255, (count,), torch.uint8))
    blocks = [-(-count // facts.blocksize) for count in size]
    absmax = _states(facts, blocks, draw, lambda count: draw.positive((count,)) / 64)
    signed, unsigned = (formats.codebook(name, torch.device("cpu")).clone() for name in formats.codebook_names())
    parameters = _parameters(facts, size, draw)
    second = unsigned if codes[1] else None
    states = (codes[0], absmax[0], signed, codes[1], absmax[1], second)
    if facts.optimizer in ("rmsprop", "adagrad"):  # v, in a signed codebook: no negative values
        codes[0][:] = [one.clamp(min=127) for one in codes[0]]
    return facts.optimizer, *parameters, *states, facts.blocksize, *_hyper(facts, size)


def _parameters(facts: Any, size: tuple[int, ...], draw: Draw) -> tuple[list[Tensor], list[Tensor]]:
    plain = Draw(f"parameters {size}")
    grads = [draw.floats((n,), facts.dtype) for n in size]
    if len(size) == 1:  # where zeros are skipped
        grads[0][::5] = 0
    return [plain.floats((n,), facts.dtype) for n in size], grads


def _states(facts: Any, size: Any, draw: Draw, fill: Any) -> tuple[list[Tensor], list[Tensor]]:
    first, second = rules.RULES[facts.optimizer].states
    one = [fill(first * n) if first == 1 else fill(first * n).view(first, n) for n in size]
    return one, [fill(n) for n in size] if second else []


def _hyper(facts: Any, size: tuple[int, ...]) -> tuple[Any, ...]:
    adam = facts.optimizer in ("adam", "ademamix")
    schedule = 50 if facts.optimizer == "ademamix" else 0
    return (
        torch.tensor(7),
        torch.tensor(0.01, dtype=torch.float64),
        torch.tensor(0.5) if len(size) > 1 else None,
        [0.9, 0.99 if adam or facts.optimizer == "lion" else 0.0, 0.999 if adam else 0.0],
        1e-8,
        0.1,
        5.0 if schedule else 0.0,
        schedule,
        schedule,
        0.02 if facts.trust else 0.0,
        len(size) == 1,  # skip_zeros
        list(range(len(size))) if facts.stochastic else [],
    )
