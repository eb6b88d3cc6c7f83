"""The mathematics of every optimizer, once; ops/optimizer.py makes ops of it.

All arithmetic is float32: parameters and gradients are widened, parameters are rounded once, at the end.  With
t the step (the first is 1), c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t) every rule is

    u, states = rule(p, g, states)        p = p * decay - (size * r) * u

name        state1   state2   states                                    u
adam        m        v        m = b1 m + (1-b1) g; v = b2 v + (1-b2) g²  m / (√v + eps c2), size = lr c2 / c1
ademamix    m1, m2   v        m2 = b3 m2 + (1-b3) g; m1, v as adam's     (m1 / c1 + alpha m2) / (√v / c2 + eps)
lion        m                 m = b2 m + (1-b2) g                        sign(b1 m_old + (1-b1) g)
momentum    m                 m = b1 m + g (g at t = 1)                  m
rmsprop     v                 v = b1 v + (1-b1) g²                       g / (√v + eps)
adagrad     v                 v = v + g²                                 g / (√v + eps)

Weight decay is decoupled and comes first in the upper three (decay = 1 - lr * weight_decay); in the lower three
it is added to the gradient (g + weight_decay * p).  r is the trust factor, 1 unless `max_unorm` is set.

Sources: Kingma and Ba 2015 (arXiv 1412.6980), Loshchilov and Hutter 2019 (1711.05101), Pagliardini et al. 2024
(AdEMAMix, 2409.03137), Chen et al. 2023 (Lion, 2302.06675), Dettmers et al. 2022 (8-bit states, 2110.02861).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Number = float | Tensor  # a host scalar, or a 0-dim tensor on an accelerator that is never read back


class Coefficients(NamedTuple):
    """What a rule needs besides tensors, computed in float64 and rounded once to float32 where it is used.

    rest1, rest2, rest3   1 - beta
    decay                 factor of the parameter
    coupled               weight decay that is added to the gradient
    size                  step size
    inverse1, inverse2    1 / c1, 1 / c2
    norm                  the update is norm * u, apart from the learning rate
    """

    beta1: Number
    rest1: Number
    beta2: Number
    rest2: Number
    beta3: Number
    rest3: Number
    alpha: Number
    decay: Number
    coupled: Number
    size: Number
    eps: Number
    inverse1: Number
    inverse2: Number
    norm: Number


class Hyper(NamedTuple):
    """What a user sets.  betas are three numbers, of which a rule reads the first ones."""

    betas: Sequence[float]
    eps: float
    weight_decay: float
    alpha: float
    t_alpha: int
    t_beta3: int


States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Rule:
    """One optimizer.

    states     float values per parameter: of state1, of state2 (0: there is none)
    decoupled  whether weight decay shrinks the parameter, not the gradient
    trust      whether `max_unorm` has a meaning
    apply      (coefficients, gradient, states) -> update u and new states
    """

    states: tuple[int, int]
    decoupled: bool
    trust: bool
    apply: Callable[[Coefficients, Tensor, States], tuple[Tensor, States]]


# Products and sums are rounded one by one, without fused multiply-add, so that a kernel can agree bit for bit.


def _root(v: Tensor) -> Tensor:
    """The correctly rounded float32 square root; torch's own may be MKL's, which is an ulp off at places."""
    return v.double().sqrt().float()


def _adam(c: Coefficients, g: Tensor, states: States) -> tuple[Tensor, States]:
    m, v = states
    m = m * c.beta1 + g * c.rest1
    v = v * c.beta2 + (g * g) * c.rest2
    return m / (_root(v) + c.eps), (m, v)


def _ademamix(c: Coefficients, g: Tensor, states: States) -> tuple[Tensor, States]:
    fast, slow, v = states
    fast = fast * c.beta1 + g * c.rest1
    slow = slow * c.beta3 + g * c.rest3
    v = v * c.beta2 + (g * g) * c.rest2
    return (fast * c.inverse1 + slow * c.alpha) / (_root(v) * c.inverse2 + c.eps), (fast, slow, v)


def _lion(c: Coefficients, g: Tensor, states: States) -> tuple[Tensor, States]:
    (m,) = states
    mixed = m * c.beta1 + g * c.rest1
    return torch.where(mixed.isnan(), mixed, mixed.sign()), (m * c.beta2 + g * c.rest2,)


def _momentum(c: Coefficients, g: Tensor, states: States) -> tuple[Tensor, States]:
    (m,) = states
    m = m * c.beta1 + g
    return m, (m,)


def _rmsprop(c: Coefficients, g: Tensor, states: States) -> tuple[Tensor, States]:
    (v,) = states
    v = v * c.beta1 + (g * g) * c.rest1
    return g / (_root(v) + c.eps), (v,)


def _adagrad(c: Coefficients, g: Tensor, states: States) -> tuple[Tensor, States]:
    (v,) = states
    v = v + g * g
    return g / (_root(v) + c.eps), (v,)


RULES = {
    "adam": Rule((1, 1), True, True, _adam),
    "ademamix": Rule((2, 1), True, False, _ademamix),
    "lion": Rule((1, 0), True, False, _lion),
    "momentum": Rule((1, 0), False, True, _momentum),
    "rmsprop": Rule((1, 0), False, True, _rmsprop),
    "adagrad": Rule((1, 0), False, False, _adagrad),
}


def coefficients(optimizer: str, step: Number, lr: Number, hyper: Hyper) -> Coefficients:
    """The numbers of one step: Python floats, or float64 tensors where step or lr is one."""
    rule = RULES[optimizer]
    beta1, beta2, beta3 = hyper.betas
    c1 = 1 - beta1**step
    c2 = (1 - beta2**step) ** 0.5
    alpha: Number = hyper.alpha
    slow: Number = beta3
    if hyper.t_alpha:
        alpha = _least(step * (hyper.alpha / hyper.t_alpha), hyper.alpha)
    if hyper.t_beta3:
        x = step * (1 / hyper.t_beta3)
        ln1, ln3 = math.log(beta1), math.log(beta3)
        exponent = ln1 * ln3 / ((1 - x) * ln3 + x * ln1)
        slow = _least(torch.exp(exponent) if isinstance(exponent, Tensor) else math.exp(exponent), beta3)
    first: Number = beta1
    if optimizer == "momentum":
        first = (step != 1).to(step.dtype) * beta1 if isinstance(step, Tensor) else (step != 1) * beta1
    adam = optimizer == "adam"
    return Coefficients(
        beta1=first,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        beta3=slow,
        rest3=1 - slow,
        alpha=alpha,
        decay=1 - lr * hyper.weight_decay if rule.decoupled else 1.0,
        coupled=0.0 if rule.decoupled else hyper.weight_decay,
        size=lr * c2 / c1 if adam else lr,
        eps=hyper.eps * c2 if adam else hyper.eps,
        inverse1=1 / c1 if optimizer in ("adam", "ademamix") else 1.0,
        inverse2=1 / c2 if optimizer in ("adam", "ademamix") else 1.0,
        norm=c2 / c1 if adam else 1.0,
    )


def _least(a: Number, b: float) -> Number:
    return torch.clamp(a, max=b) if isinstance(a, Tensor) else min(a, b)


def host_or_device(number: Tensor) -> Number:
    """A 0-dim tensor as a Python float where that costs no synchronization; as float64 otherwise."""
    return float(number) if number.device.type == "cpu" else number.double()


# -- moving a parameter --------------------------------------------------------------------------------------


def moved(
    optimizer: str, c: Coefficients, p: Tensor, g: Tensor, states: States, max_unorm: float, eps: float
) -> tuple[Tensor, Tensor, States]:
    """Update u, parameter and states of one flat tensor, all float32."""
    if not RULES[optimizer].decoupled:
        g = g + p * c.coupled
    u, new = RULES[optimizer].apply(c, g, states)
    size = c.size
    if max_unorm > 0:
        r = trust_factor(optimizer, c, max_unorm, eps, _norm(p), _norm(u)).float()
        size = r * size
    return u, p * c.decay - u * size, new


def trust_factor(
    optimizer: str, c: Coefficients, max_unorm: float, eps: float, param_norm: Tensor, update_norm: Tensor
) -> Tensor:
    """How far the step may go: min(1, max_unorm * norm of the parameter / norm of the update), in float64.

    An all-zero parameter moves freely.  One-state optimizers add eps to the numerator, as bitsandbytes does.
    """
    u = update_norm * c.norm
    allowed = max_unorm * param_norm + (0.0 if RULES[optimizer].states[1] else eps)
    r = torch.clamp(allowed / u, max=1.0)
    return torch.where((param_norm == 0) | (u == 0), 1.0, r)


def _norm(x: Tensor) -> Tensor:
    """The float64 norm of what is finite: NaN stays in its element."""
    norm: Tensor = torch.linalg.vector_norm(torch.where(x.isfinite(), x, 0.0), dtype=torch.float64)
    return norm


# -- stochastic rounding -------------------------------------------------------------------------------------


def hash32(x: Any) -> Any:
    """An integer hash of 32 bits, of ints or int64 tensors.  Source: Wellons, hash-prospector, lowbias32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def unhash32(x: int) -> int:
    """What hash32 makes x of."""
    x = (x ^ (x >> 16)) * pow(0x846CA68B, -1, 1 << 32) & 0xFFFFFFFF
    x = (x ^ (x >> 15) ^ (x >> 30)) * pow(0x7FEB352D, -1, 1 << 32) & 0xFFFFFFFF
    return x ^ (x >> 16)


def rounding_key(seed: int, step: Number) -> Any:
    """What a parameter's random bits of one step are drawn from."""
    step = step.long() if isinstance(step, Tensor) else int(step)
    return hash32((seed ^ hash32(step & 0xFFFFFFFF)) & 0xFFFFFFFF)


def seed_from(seed: int, step: int, first: int) -> int:
    """The seed with which a part of a parameter, stepped by itself, draws the bits that it has in the whole.

    first  number of the part's first element: a multiple of a power of two that is not below the part's length
    """
    folded = (first ^ (first >> 32)) & 0xFFFFFFFF
    return unhash32(rounding_key(seed, step) ^ folded) ^ hash32(step & 0xFFFFFFFF)  # type: ignore[no-any-return]


def stochastically_rounded(value: Tensor, seed: int, step: Number) -> Tensor:
    """float32 -> bfloat16, up or down with a chance that makes the mean exact.

    Element i draws the upper 16 bits of hash32(i ^ key); they are added below bfloat16's last bit.
    """
    index = torch.arange(value.numel(), device=value.device)
    index = (index ^ (index >> 32)) & 0xFFFFFFFF
    drawn = hash32(index ^ rounding_key(seed, step)) >> 16
    bits = value.view(torch.int32).long() & 0xFFFFFFFF
    up = (bits + drawn) & 0xFFFF0000
    rounded = torch.where(up > 0x7FFFFFFF, up - (1 << 32), up).to(torch.int32).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
