"""The optimizer updates as ops, in place over lists of tensors.  Their mathematics stands in ops/rules.py."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..errors import InputError
from ..op import Op
from . import checks, rules
from .eightbit import nearest

# -- the reference -------------------------------------------------------------------------------------------


def _scaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    g = grad.reshape(-1).float()
    return g if grad_scale is None else g * grad_scale.float().to(g.device)


def _in_float32(c: rules.Coefficients) -> rules.Coefficients:
    return rules.Coefficients(*(one.float() if isinstance(one, Tensor) else one for one in c))


def _store(param: Tensor, value: Tensor, seed: int | None, step: rules.Number) -> None:
    flat = param.view(-1)
    flat.copy_(value if seed is None else rules.stochastically_rounded(value, seed, step))


def _each(*lists: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Tensors of one parameter; None for a list that an optimizer leaves empty."""
    count = len(lists[0])
    return zip(*(one or [None] * count for one in lists), strict=True)


def update_32bit(
    optimizer: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    betas: list[float],
    eps: float,
    weight_decay: float,
    alpha: float,
    t_alpha: int,
    t_beta3: int,
    max_unorm: float,
    skip_zeros: bool,
    seeds: list[int],
) -> None:
    """One step of an optimizer whose states are float32, in place.

    optimizer     a name of RULES
    params        float32, float16 or bfloat16, all of one dtype and device, contiguous
    grads         the same dtypes and shapes
    state1        float32, of the parameter's shape; (2, *shape) for ademamix
    state2        the same for v of adam and ademamix; empty for the others
    step, lr      0-dim, on the host or on the parameters' device; the first step is 1
    grad_scale    0-dim, multiplies every gradient; None for 1
    betas         three numbers, of which the rule reads the first ones
    t_alpha, t_beta3  steps over which ademamix's alpha and beta3 rise; 0 for none
    max_unorm     bound on norm(update) / norm(parameter), for adam, momentum and rmsprop; 0 for none
    skip_zeros    leave parameter and states alone where the gradient is 0
    seeds         one per parameter: round bfloat16 stochastically; empty to round to nearest

    NaN stays in its element.
    """
    hyper = rules.Hyper(betas, eps, weight_decay, alpha, t_alpha, t_beta3)
    step_, c = _start(optimizer, step, lr, hyper)
    for param, grad, one, two, seed in _each(params, grads, state1, state2, seeds):
        p, g = param.reshape(-1).float(), _scaled(grad, grad_scale)
        old = _float_states(rules.RULES[optimizer], one, two)
        _, moved, new = rules.moved(optimizer, c, p, g, old, max_unorm, eps)
        if skip_zeros:
            moved, new = torch.where(g == 0, p, moved), tuple(torch.where(g == 0, o, n) for o, n in zip(old, new))
        _store(param, moved, seed, step_)
        for target, value in zip(old, new, strict=True):
            target.copy_(value)


def _start(optimizer: str, step: Tensor, lr: Tensor, hyper: rules.Hyper) -> tuple[rules.Number, rules.Coefficients]:
    step_ = rules.host_or_device(step)
    return step_, _in_float32(rules.coefficients(optimizer, step_, rules.host_or_device(lr), hyper))


def _float_states(rule: rules.Rule, one: Tensor, two: Tensor | None) -> rules.States:
    """Flat views, one per value that a rule keeps."""
    first = one.view(rule.states[0], -1).unbind(0)
    return (*first, two.view(-1)) if two is not None else first


def update_8bit(
    optimizer: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    absmax1: list[Tensor],
    codebook1: Tensor,
    state2: list[Tensor],
    absmax2: list[Tensor],
    codebook2: Tensor | None,
    blocksize: int,
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    betas: list[float],
    eps: float,
    weight_decay: float,
    alpha: float,
    t_alpha: int,
    t_beta3: int,
    max_unorm: float,
    skip_zeros: bool,
    seeds: list[int],
) -> None:
    """One step of an optimizer whose states are 8-bit codes with an absmax per block, in place.

    state1, state2        uint8, of the parameter's shape; state1 (2, *shape) for ademamix
    absmax1, absmax2      float32, (ceil(n / blocksize),); absmax1 (2, ceil(n / blocksize)) for ademamix
    codebook1, codebook2  float32 (256,), ascending, for all tensors of the call
    the rest              as in update_32bit

    The parameter moves by the new states as they are before they are quantized.  A code is that of the nearest
    level of state / absmax, a tie goes to the even one; where the level's sign differs from a nonzero state's, in
    a codebook that has signs, the code beside it is taken.  A block of zeros gets the codes of 0.  An element
    whose new state or update is not finite is skipped: the parameter is kept, its states become 0.

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
    """
    hyper = rules.Hyper(betas, eps, weight_decay, alpha, t_alpha, t_beta3)
    step_, c = _start(optimizer, step, lr, hyper)
    for param, grad, one, scale1, two, scale2, seed in _each(params, grads, state1, absmax1, state2, absmax2, seeds):
        p, g = param.reshape(-1).float(), _scaled(grad, grad_scale)
        places = list(_places(rules.RULES[optimizer], one, scale1, codebook1, two, scale2, codebook2))
        old = tuple(_decoded(codes, scale, book, blocksize) for codes, scale, book in places)
        u, moved, new = rules.moved(optimizer, c, p, g, old, max_unorm, eps)
        kept = ~u.isfinite()
        for state in new:
            kept |= ~state.isfinite()
        moved, new = torch.where(kept, p, moved), tuple(torch.where(kept, 0.0, state) for state in new)
        if skip_zeros:
            moved, new = torch.where(g == 0, p, moved), tuple(torch.where(g == 0, o, n) for o, n in zip(old, new))
        _store(param, moved, seed, step_)
        for (codes, scale, book), state in zip(places, new, strict=True):
            _encode(state, codes, scale, book, blocksize)


def _places(
    rule: rules.Rule,
    one: Tensor,
    scale1: Tensor,
    codebook1: Tensor,
    two: Tensor | None,
    scale2: Tensor | None,
    codebook2: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Codes, absmax and codebook of each value that a rule keeps, as flat views."""
    count = rule.states[0]
    for codes, scale in zip(one.view(count, -1), scale1.view(count, -1), strict=True):
        yield codes, scale, codebook1
    if two is not None and scale2 is not None and codebook2 is not None:
        yield two.view(-1), scale2.view(-1), codebook2


def _decoded(codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int) -> Tensor:
    return codebook[codes.long()] * absmax.repeat_interleave(blocksize)[: codes.numel()]


def _encode(state: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int) -> None:
    n = state.numel()
    blocks = F.pad(state, (0, -n % blocksize)).view(-1, blocksize)
    largest = blocks.abs().amax(dim=1)
    scaled = torch.where(largest[:, None] == 0, 0.0, blocks / largest[:, None]).view(-1)[:n]
    found = nearest(scaled, codebook).long()
    negative = codebook.signbit().sum()  # so many levels, the first ones, are below zero
    wrong = ((found < negative) != (state < 0)) & (state != 0) & (negative > 0)
    codes.copy_((found + wrong * torch.where(state > 0, 1, -1)).clamp(0, 255))
    absmax[: largest.numel()].copy_(largest)


# -- checks --------------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What a kernel for update_32bit may be chosen on; dtype is that of the parameters."""

    device: torch.device
    dtype: torch.dtype
    optimizer: str
    trust: bool
    stochastic: bool


class Facts8bit(NamedTuple):
    """What a kernel for update_8bit may be chosen on; dtype is that of the parameters."""

    device: torch.device
    dtype: torch.dtype
    optimizer: str
    blocksize: int
    trust: bool
    stochastic: bool


def _facts_32bit(*args: Any) -> Facts:
    optimizer, params, max_unorm, seeds = args[0], args[1], args[14], args[16]
    return Facts(params[0].device, params[0].dtype, optimizer, max_unorm > 0, bool(seeds))


def _facts_8bit(*args: Any) -> Facts8bit:
    optimizer, params, blocksize, max_unorm, seeds = args[0], args[1], args[9], args[19], args[21]
    return Facts8bit(params[0].device, params[0].dtype, optimizer, blocksize, max_unorm > 0, bool(seeds))


def _check_32bit(*args: Any) -> None:
    optimizer, params, grads, state1, state2, *rest = args
    rule = _check_parameters(optimizer, params, grads, *rest)
    sizes = native.sizes(params)
    _check_states("state1", params, sizes, state1, torch.float32, rule.states[0])
    _check_states("state2", params, sizes, state2, torch.float32, rule.states[1])


def _check_8bit(*args: Any) -> None:
    optimizer, params, grads, state1, absmax1, codebook1, state2, absmax2, codebook2, blocksize, *rest = args
    rule = _check_parameters(optimizer, params, grads, *rest)
    if blocksize < 1:
        raise InputError(f"blocksize must be at least 1; got {blocksize}")
    sizes = native.sizes(params)
    blocks = array("q", [-(-size // blocksize) for size in sizes])
    for name, codes, absmax, codebook, count in (
        ("1", state1, absmax1, codebook1, rule.states[0]),
        ("2", state2, absmax2, codebook2, rule.states[1]),
    ):
        _check_states(f"state{name}", params, sizes, codes, torch.uint8, count)
        if not count:
            continue
        if codebook is None or codebook.numel() != 256 or codebook.dtype is not torch.float32:
            raise InputError(f"codebook{name} must have 256 float32 entries; got {codebook!r:.60}")
        checks.same_device(f"codebook{name}", codebook, params[0].device)
        if len(absmax) != len(params):
            raise InputError(f"absmax{name} must have one tensor per parameter, {len(params)}; got {len(absmax)}")
        _check_places(f"absmax{name}", absmax, torch.float32, params[0].device)
        if count == 1 and native.sizes(absmax) == blocks:
            continue
        for scale, found, number in zip(absmax, native.sizes(absmax), blocks):
            if found % count or found // count < number:
                expected = f"({count}, {number})" if count > 1 else f"({number},)"
                raise InputError(f"absmax{name} must have shape {expected}; got {tuple(scale.shape)}")


def _check_parameters(
    optimizer: str,
    params: list[Tensor],
    grads: list[Tensor],
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    betas: list[float],
    eps: float,
    weight_decay: float,
    alpha: float,
    t_alpha: int,
    t_beta3: int,
    max_unorm: float,
    skip_zeros: bool,
    seeds: list[int],
) -> rules.Rule:
    if optimizer not in rules.RULES:
        raise InputError(f"optimizer must be one of {', '.join(rules.RULES)}; got {optimizer!r}")
    rule = rules.RULES[optimizer]
    if not params:
        raise InputError("params must have at least one tensor; got none")
    if len(grads) != len(params):
        raise InputError(f"grads must have one tensor per parameter, {len(params)}; got {len(grads)}")
    dtype, device = params[0].dtype, params[0].device
    checks.floating("params", dtype)
    if not (
        _alike(params, dtype, device) and _alike(grads, dtype, device) and native.sizes(params) == native.sizes(grads)
    ):
        for param, grad in zip(params, grads):
            _check_pair(param, grad, dtype, device)
    for name, number in (("step", step), ("lr", lr), ("grad_scale", grad_scale)):
        if number is None:
            continue
        if number.numel() != 1:
            raise InputError(f"{name} must have one element; got {tuple(number.shape)}")
        if number.device.type != "cpu" and number.device != device:
            raise InputError(f"{name} must be on the CPU or on {device}; it is on {number.device}")
    if len(betas) != 3 or not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"betas must be three numbers from 0 to below 1; got {list(betas)}")
    if t_beta3 and not 0 < betas[0] <= betas[2]:
        raise InputError(
            f"t_beta3 lets beta3 rise from beta1, which must be above 0 and not above it; got {list(betas)}"
        )
    if max_unorm < 0 or (max_unorm > 0 and not rule.trust):
        able = ", ".join(name for name, one in rules.RULES.items() if one.trust)
        raise InputError(f"max_unorm must be 0, or positive for {able}; got {max_unorm} for {optimizer}")
    if seeds and (len(seeds) != len(params) or dtype is not torch.bfloat16):
        raise InputError(
            f"seeds must be empty, or one per bfloat16 parameter; got {len(seeds)} for {len(params)} of {dtype}"
        )
    return rule


def _check_pair(param: Tensor, grad: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if param.dtype is not dtype or grad.dtype is not dtype:
        other = grad.dtype if param.dtype is dtype else param.dtype
        raise InputError(f"params and grads must be of one dtype; got {dtype} and {other}")
    if param.device != device or grad.device != device:
        other_device = grad.device if param.device == device else param.device
        raise InputError(f"params and grads must be on one device; got {device} and {other_device}")
    if grad.shape != param.shape:
        raise InputError(f"a gradient must have its parameter's shape {tuple(param.shape)}; got {tuple(grad.shape)}")
    if not param.is_contiguous():
        raise InputError(f"params must be contiguous; got strides {param.stride()} for {tuple(param.shape)}")


def _alike(tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tensors are known to be contiguous, of a dtype and on a device."""
    return isinstance(tensors, native.Placed) and tensors.known[:2] == (dtype, device)


def _check_states(
    name: str, params: list[Tensor], sizes: array[int], states: list[Tensor], dtype: torch.dtype, count: int
) -> None:
    expected = len(params) if count else 0
    if len(states) != expected:
        raise InputError(f"{name} must have {expected} tensors for {len(params)} parameters; got {len(states)}")
    _check_places(name, states, dtype, params[0].device)
    if count == 1 and native.sizes(states) == sizes:
        return
    for found, size in zip(native.sizes(states), sizes):
        if found != count * size:
            raise InputError(f"{name} must have {count * size} elements; got {found}")


def _check_places(name: str, tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Raise for a tensor of another dtype or device, and for one that is not contiguous."""
    if _alike(tensors, dtype, device):
        return
    for one in tensors:
        if one.dtype is not dtype or one.device != device or not one.is_contiguous():
            raise InputError(f"{name} must be {dtype} on {device} and contiguous; got {one.dtype} on {one.device}")


def _fake(*args: Any) -> None:
    return None


_HYPER = (
    "Tensor step, Tensor lr, Tensor? grad_scale, float[] betas, float eps, float weight_decay, float alpha, "
    "int t_alpha, int t_beta3, float max_unorm, bool skip_zeros, int[] seeds"
)
# Against the reference, which fuses nothing: a kernel may.  A code beside the right one is one level away.
_TOLERANCE = {
    torch.float32: (1e-5, 1e-6),
    torch.float16: (2e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.uint8: (0.0, 1.0),
}

OPS = (
    Op(
        "update_32bit",
        "(str optimizer, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, "
        f"{_HYPER}) -> ()",
        Facts,
        _facts_32bit,
        update_32bit,
        _fake,
        _check_32bit,
        tolerance=_TOLERANCE,
    ),
    Op(
        "update_8bit",
        "(str optimizer, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] absmax1, "
        "Tensor codebook1, Tensor(d!)[] state2, Tensor(e!)[] absmax2, Tensor? codebook2, int blocksize, "
        f"{_HYPER}) -> ()",
        Facts8bit,
        _facts_8bit,
        update_8bit,
        _fake,
        _check_8bit,
        tolerance=_TOLERANCE,
    ),
)
