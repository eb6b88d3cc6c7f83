"""Hyperparameters: read from groups, arguments and overrides, and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from ..errors import InputError
from ..ops.rules import RULES


class Unsupported(InputError, NotImplementedError):
    """A choice of hyperparameters that bitsandbytes too answers with NotImplementedError."""


class Options(TypedDict, total=False):
    """What every optimizer takes by keyword, beyond bitsandbytes' arguments.

    fused_clip           bound on the norm of all gradients of a step together; they are scaled while they are read
    stochastic_rounding  round bfloat16 parameters up or down at random, so that small updates count on average
    capturable           keep the step as a tensor on the parameter's device, for CUDA graphs
    paged_budget         bytes that paged states may take on a device, in passing and for good
    paged_memory         where they live: "pinned" or "managed"
    """

    fused_clip: float | None
    stochastic_rounding: bool
    capturable: bool
    paged_budget: int
    paged_memory: str


class Config(NamedTuple):
    """What one parameter is stepped with.  betas are three; what a rule does not read is 0."""

    lr: float | Tensor
    betas: tuple[float, float, float]
    eps: float
    weight_decay: float
    alpha: float
    t_alpha: int
    t_beta3: int
    optim_bits: int
    min_8bit_size: int
    max_unorm: float
    skip_zeros: bool


def parse_betas(betas: str | Sequence[float | str]) -> tuple[float, ...]:
    """Betas as numbers; "(0.9, 0.999)" is what a command line gives."""
    parts = betas.strip().strip("()[]").split(",") if isinstance(betas, str) else betas
    return tuple(parse_number("betas", one) for one in parts)


def parse_number(name: str, value: Any) -> float:
    """A number, also from a string."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number; got {value!r}") from None


def resolve(rule: str, group: Mapping[str, Any], args: Any, override: Mapping[str, Any]) -> Config:
    """The configuration of a parameter: its override, else its group, else the optimizer's arguments.

    Raises InputError for values outside their range, and for max_unorm where the rule has no trust factor.
    """
    found = {
        "alpha": 0.0,
        "t_alpha": None,
        "t_beta3": None,
        "optim_bits": args.optim_bits,
        "min_8bit_size": args.min_8bit_size,
        "max_unorm": args.max_unorm,
        "skip_zeros": args.skip_zeros,
        **{name: value for name, value in group.items() if name in _OF_GROUPS},
        **override,
    }
    betas = parse_betas(found["betas"])
    wanted = 3 if rule == "ademamix" else 2
    if len(betas) < wanted:
        raise InputError(f"betas must be {wanted} numbers; got {betas}")
    lr = found["lr"]
    config = Config(
        lr if isinstance(lr, Tensor) else parse_number("lr", lr),
        (betas[0], betas[1], betas[2] if wanted == 3 else 0.0),
        parse_number("eps", found["eps"]),
        parse_number("weight_decay", found["weight_decay"]),
        parse_number("alpha", found["alpha"]),
        int(found["t_alpha"] or 0),
        int(found["t_beta3"] or 0),
        found["optim_bits"],
        found["min_8bit_size"],
        parse_number("max_unorm", found["max_unorm"]),
        bool(found["skip_zeros"]),
    )
    _check(rule, config)
    return config


_OF_GROUPS = ("lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3")


def _check(rule: str, config: Config) -> None:
    if isinstance(config.lr, Tensor):
        if config.lr.numel() != 1:
            raise InputError(f"lr must be a number or a tensor of one element; got shape {tuple(config.lr.shape)}")
    elif not 0 <= config.lr < math.inf:
        raise InputError(f"lr must be finite and at least 0; got {config.lr}")
    for i, beta in enumerate(config.betas):
        if not 0 <= beta < 1:
            raise InputError(f"betas[{i}] must be at least 0 and below 1; got {beta}")
    for name in ("eps", "weight_decay", "alpha", "t_alpha", "t_beta3", "max_unorm"):
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise InputError(f"{name} must be finite and at least 0; got {value}")
    if config.max_unorm > 0 and not RULES[rule].trust:
        able = ", ".join(name for name, one in RULES.items() if one.trust)
        raise InputError(f"max_unorm has a meaning for {able} only; got {config.max_unorm} for {rule}")
    if config.t_beta3 and not 0 < config.betas[0] <= config.betas[2]:
        raise InputError(f"t_beta3 raises beta3 from beta1, so 0 < beta1 <= beta3 must hold; got {config.betas}")
    if config.optim_bits not in (8, 32):
        raise Unsupported(f"optim_bits must be 8 or 32; got {config.optim_bits!r}")


def refuse(optimizer: object, **given: tuple[Any, Any]) -> None:
    """Raise for an argument that bitsandbytes accepts and ignores: name=(value, the one value that is honored)."""
    for name, (value, honored) in given.items():
        if value != honored:
            raise InputError(f"{type(optimizer).__name__} supports only {name}={honored!r}; got {value!r}")


def momentum_betas(optimizer: object, momentum: float) -> tuple[float, float]:
    """The betas of an optimizer with momentum and no dampening, which bitsandbytes keeps in this form."""
    if momentum == 0:
        raise Unsupported(f"{type(optimizer).__name__} needs a momentum other than 0")
    return momentum, 0.0
