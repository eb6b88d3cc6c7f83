"""What halfbyte adds: fused_clip, stochastic_rounding, capturable."""

import copy

import pytest
import torch

from halfbyte import optim
from halfbyte.ops import rules

# -- fused_clip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "SGD8bit"])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_fused_clip_steps_like_clip_grad_norm_and_leaves_gradients_alone(build, randn, name, limit):
    ours, theirs = [randn(70, 60), randn(9)], [randn(70, 60), randn(9)]
    fused, plain = build(name, ours, fused_clip=limit), build(name, theirs)

    for seed in range(3):
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in ours]
        for params in (ours, theirs):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs, limit)
        fused.step()
        plain.step()
        assert all(torch.equal(param.grad, grad) for param, grad in zip(ours, grads, strict=True))

    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if "8bit" in name else 1e-5)


def test_fused_clip_counts_the_gradients_of_all_dtypes_once(build, randn, calls):
    params = [randn(9), randn(9, dtype=torch.bfloat16)]
    optimizer = build("SGD", params, fused_clip=1.0)
    for param in params:
        param.grad = torch.full_like(param, 4.0)

    optimizer.step()

    scales = [float(args[7]) for _, args in calls]
    assert scales == pytest.approx([1 / (18 * 16) ** 0.5] * 2, rel=1e-6)


def test_fused_clip_of_zero_gradients_does_not_divide(build, randn):
    param = randn(5)
    optimizer = build("SGD", [param], fused_clip=1.0)
    before = param.detach().clone()

    param.grad = torch.zeros(5)
    optimizer.step()

    assert torch.equal(param, before)


# -- stochastic rounding -------------------------------------------------------------------------------------


def test_stochastic_rounding_lets_small_updates_of_bfloat16_count(build):
    def train(stochastic):
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = build("Lion", [param], lr=1e-4, stochastic_rounding=stochastic)
        for _ in range(100):
            param.grad = torch.ones(4096, dtype=torch.bfloat16)
            optimizer.step()
        return param.detach().float().mean().item()

    assert train(False) == 1.0  # 1e-4 is a fortieth of the distance to the next value below
    assert train(True) == pytest.approx(0.99, abs=1e-3)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
def test_stochastic_rounding_resumes_with_the_same_bits(build, randn, step, name):
    params = [randn(70, 60, dtype=torch.bfloat16), randn(70, 60, seed=1, dtype=torch.bfloat16)]
    optimizer = build(name, params, stochastic_rounding=True)
    step(optimizer, params)
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = build(name, resumed, stochastic_rounding=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    for seed in (1, 2):
        step(optimizer, params, seed)
        step(other, resumed, seed)

    assert all(map(torch.equal, params, resumed))


def test_stochastic_rounding_draws_other_bits_for_each_parameter_and_step(build, calls):
    params = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = build("Lion", params, lr=1e-3, stochastic_rounding=True)
    moved = []
    for _ in range(2):
        for param in params:
            param.data.fill_(1.0)
            param.grad = torch.ones_like(param)
        optimizer.step()
        moved += [param.detach().clone() for param in params]

    assert not any(torch.equal(moved[i], moved[j]) for i in range(4) for j in range(i))


def test_stochastic_rounding_leaves_other_dtypes_alone(build, randn, step):
    ours, theirs = randn(50), randn(50)

    step(build("AdamW", [ours], stochastic_rounding=True), [ours])
    step(build("AdamW", [theirs]), [theirs])

    assert torch.equal(ours, theirs)


# -- capturable ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix", "SGD8bit", "Lion"])
def test_capturable_steps_like_the_plain_optimizer(build, randn, step, name):
    arguments = {"t_alpha": 3, "t_beta3": 3} if name == "AdEMAMix" else {}
    ours, theirs = [randn(70, 60), randn(4)], [randn(70, 60), randn(4)]
    capturable, plain = build(name, ours, capturable=True, **arguments), build(name, theirs, **arguments)

    for seed in range(4):
        step(capturable, ours, seed)
        step(plain, theirs, seed)

    assert all(map(torch.equal, ours, theirs))
    steps = capturable.state[ours[0]]["step"]
    assert (steps.dtype, steps.shape, float(steps)) == (torch.float32, (), 4.0)


def test_capturable_counts_apart_for_parameters_that_step_apart(build, randn, step):
    params = [randn(5), randn(5, seed=1), randn(5, seed=2)]
    optimizer = build("AdamW", params, capturable=True)
    reference = [torch.nn.Parameter(param.detach().clone()) for param in params]
    plain = build("AdamW", reference)

    for chosen in ([0, 1, 2], [0, 1], [0], [0, 1, 2]):
        for model, one in ((params, optimizer), (reference, plain)):
            one.zero_grad()
            step(one, [model[i] for i in chosen], seed=len(chosen))

    assert [float(optimizer.state[param]["step"]) for param in params] == [4.0, 3.0, 2.0]
    assert all(map(torch.equal, params, reference))


def test_capturable_keeps_the_tensor_that_a_graph_would_have_captured(build, randn, step):
    param = randn(5)
    optimizer = build("AdamW", [param], capturable=True)
    step(optimizer, [param])
    steps = optimizer.state[param]["step"]

    step(optimizer, [param])

    assert optimizer.state[param]["step"] is steps


@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True), (True, True)])
def test_capturable_is_a_choice_of_the_optimizer_and_not_of_the_file(build, randn, step, calls, saved, loaded):
    params = [randn(5), randn(6)]
    optimizer = build("AdamW", params, capturable=saved)
    step(optimizer, params)
    other = build("AdamW", params, capturable=loaded)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    calls.clear()

    step(other, params)

    assert len(calls) == 1  # the counts are shared again
    assert isinstance(other.state[params[0]]["step"], torch.Tensor if loaded else int)
    assert float(other.state[params[0]]["step"]) == 2


def test_every_rule_has_a_class():
    used = {one.rule for one in vars(optim).values() if isinstance(one, type) and hasattr(one, "rule")}

    assert used == set(rules.RULES)
