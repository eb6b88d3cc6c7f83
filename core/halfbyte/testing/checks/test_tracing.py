"""torch's own checks of an op while the backend runs it, and gradients through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte
from halfbyte._runtime import dispatcher
from halfbyte.testing import cases, compare

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def differentiable(case: cases.Case, size: str = "usual") -> list[Any]:
    """Arguments whose floats of the op's dtype want gradients, where the op has any."""
    args = list(case.args(size))
    if case.op.backward is None:
        return args
    dtype = getattr(case.facts, "dtype", None)
    return [arg.requires_grad_() if isinstance(arg, Tensor) and arg.dtype is dtype else arg for arg in args]


def test_op_passes_opcheck(typical: cases.Case) -> None:
    if cases.decided(typical).kernel is not typical.kernel:
        return  # another variant of the same backend runs here
    with cases.forced(typical.target, fallback=True):
        for size in typical.sizes("usual", "empty"):
            torch.library.opcheck(cases.torch_op(typical.op), tuple(differentiable(typical, size)), test_utils=QUICK)


def test_op_passes_aot_dispatch(op: halfbyte.Op, target: cases.Target) -> None:
    """The expensive part of opcheck: once per op."""
    kernel = dispatcher.kernels(target.backend)[op.name][0]
    case = next((one for one in cases.situations(target, kernel, typical=True)), None)
    if case is None:
        pytest.skip(f"{op.name} has no samples, or no kernel for this machine")
    with cases.forced(target, fallback=True):
        torch.library.opcheck(cases.torch_op(op), tuple(differentiable(case)), test_utils="test_aot_dispatch_dynamic")


def test_gradients_agree_with_the_reference(typical: cases.Case) -> None:
    if typical.op.backward is None or cases.decided(typical).kernel is not typical.kernel:
        return
    with halfbyte.use_backend("reference"):
        wanted = gradients(typical)
    with cases.forced(typical.target, fallback=True):
        found = gradients(typical)

    wrong = compare.disagreement(typical.op, found, wanted)
    assert not wrong, f"{typical.title}, gradients: {wrong}"


def gradients(case: cases.Case) -> list[Tensor]:
    args = differentiable(case, "partial" if case.sizes("partial") else "usual")
    y = cases.torch_op(case.op)(*args)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
    wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    found = torch.autograd.grad(y, wanted, dy, allow_unused=True)  # scales have none
    return [gradient for gradient in found if gradient is not None]
