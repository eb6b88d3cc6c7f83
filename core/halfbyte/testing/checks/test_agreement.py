"""Every kernel agrees with the reference in every situation that it declares, and its results look as promised."""

from __future__ import annotations

from torch import Tensor
from torch.utils import _pytree as pytree

from halfbyte.kernel import show
from halfbyte.testing import cases, compare, samples


def test_kernel_agrees_with_the_reference(case: cases.Case) -> None:
    for size in case.sizes("usual", "vector", "tall", "deep", "partial", "odd"):
        args = case.args(size)
        made = case.op.facts(*args)
        assert made == case.facts, f"the samples of {case.op.name} make {made} for {case.facts}"
        case.op.check(*args)
        found = cases.results(case.op, case.kernel.function, args)
        wrong = compare.disagreement(case.op, found, case.expected(size)) or unlike_the_fake(case, args, found)
        assert not wrong, f"{case.title}, size {size}: {wrong}"


def unlike_the_fake(case: cases.Case, args: samples.Args, found: tuple[Tensor, ...]) -> str:
    """How shape, dtype, strides or device differ from what the op's fake kernel says."""
    meta = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), list(args))
    for place, (got, want) in enumerate(zip(found, cases.results(case.op, case.op.fake, tuple(meta)))):
        if got.dtype is not want.dtype or got.shape != want.shape:
            return f"result {place} is {show(got.dtype)} {tuple(got.shape)}, the fake kernel says {want}"
        if got.numel() > 1 and got.stride() != want.stride():
            return f"result {place} has strides {got.stride()}, the fake kernel says {want.stride()}"
        if got.device.type != case.facts.device.type:
            return f"result {place} is on {got.device}, the arguments on {case.facts.device}"
        if got.requires_grad:
            return f"result {place} requires a gradient; gradients are the op's business"
    return ""


def test_forced_backend_runs_its_own_kernel(typical: cases.Case) -> None:
    decision = cases.decided(typical)
    assert decision.backend == typical.target.backend.name, str(decision)
    if decision.kernel is not typical.kernel:
        return  # another variant is better here; this one is called by itself in the check above
    with cases.forced(typical.target):
        found = cases.results(typical.op, cases.torch_op(typical.op), typical.args())

    wrong = compare.disagreement(typical.op, found, typical.expected())
    assert not wrong, f"{typical.title}, through torch.ops.{typical.op.namespace}.{typical.op.name}: {wrong}"
