"""A step inside a compiled function: one opaque op, in which the optimizer steps as it does outside.

The graph has the parameters, which the op changes, and their gradients.  States, step counts and hyperparameters are
read when it runs: a schedule of the learning rate recompiles nothing.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

Given = dict[int, tuple[Tensor, Tensor]]  # by the id of an optimizer's parameter: itself or a copy, and its gradient


class Steps(Protocol):
    """As much of an optimizer as is needed here."""

    param_groups: list[dict[str, Any]]

    def update(self, places: None = None, given: Given | None = None) -> None: ...


_alive: weakref.WeakValueDictionary[int, Steps] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def numbered(optimizer: Steps) -> int:
    """The number by which a graph finds an optimizer, as long as it lives."""
    number = next(_numbers)
    _alive[number] = optimizer
    return number


def _step(number: int, params: list[Tensor], grads: list[Tensor]) -> None:
    optimizer = _alive.get(number)
    if optimizer is None:
        raise RuntimeError("the optimizer whose step was compiled does not exist any more")
    keys = [key for group in optimizer.param_groups for key in group["params"] if key.grad is not None]
    own = [(key.data_ptr(), key.grad.data_ptr()) for key in keys]
    if own == [(param.data_ptr(), grad.data_ptr()) for param, grad in zip(params, grads, strict=True)]:
        optimizer.update()
    else:  # a functional graph steps copies, and copies them back
        optimizer.update(given=dict(zip(map(id, keys), zip(params, grads), strict=True)))


def _fake(number: int, params: list[Tensor], grads: list[Tensor]) -> None:
    return None


_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define(
    "step_optimizer(int number, Tensor(a!)[] params, Tensor[] grads) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("step_optimizer", _step, "CompositeExplicitAutograd")
torch.library.register_fake("halfbyte::step_optimizer", _fake, lib=_library)
