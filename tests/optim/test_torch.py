"""The optimizers are torch optimizers: schedulers, closures, scalers, copies, hooks, compiled steps."""

import copy
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from halfbyte import optim


def test_scheduler_sets_the_learning_rate(build, randn):
    param = randn(4)
    optimizer = build("SGD", [param], lr=1.0, momentum=0.5)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.1)
    moved = []

    for _ in range(3):
        before = param.detach().clone()
        param.grad = torch.zeros(4)
        param.grad[0] = 1.0
        optimizer.state.clear()
        optimizer.step()
        scheduler.step()
        moved.append((before - param.detach())[0].item())

    assert moved == pytest.approx([1.0, 0.1, 0.01], rel=1e-5)


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD8bit", "Lion8bit", "RMSprop8bit", "AdEMAMix8bit"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 4),
        lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
        lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=4),  # moves betas too
    ],
)
def test_schedulers_of_torch_run(build, randn, step, name, schedule):
    param = randn(70, 60)
    optimizer = build(name, [param])
    scheduler = schedule(optimizer)

    for seed in range(3):
        step(optimizer, [param], seed)
        scheduler.step()

    assert param.isfinite().all()
    assert optimizer.state[param]["step"] == 3


def test_learning_rate_may_be_a_tensor(build, randn, step):
    ours, theirs = randn(5), randn(5)
    rate = torch.tensor(0.01)
    tensor, number = build("AdamW", [ours], lr=rate), build("AdamW", [theirs], lr=0.01)

    for value in (0.01, 0.5):
        rate.fill_(value)
        number.param_groups[0]["lr"] = rate.item()
        step(tensor, [ours])
        step(number, [theirs])

    assert torch.equal(ours, theirs)
    assert tensor.param_groups[0]["lr"] is rate


def test_closure_runs_with_gradients_and_its_loss_is_returned(build, randn):
    param = randn(4)
    optimizer = build("AdamW", [param])

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)

    assert second < first


def test_add_param_group_takes_its_own_hyperparameters(build, randn, step):
    first, second = randn(4), randn(70, 60)
    optimizer = build("AdamW8bit", [first], lr=0.1)
    step(optimizer, [first])

    optimizer.add_param_group({"params": [second], "lr": 0.0, "betas": "(0.5, 0.6)"})
    before = second.detach().clone()
    step(optimizer, [first, second])

    assert torch.equal(second, before)
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    assert [optimizer.state[one]["step"] for one in (first, second)] == [2, 1]


def test_named_parameters_are_accepted(build):
    model = torch.nn.Linear(3, 2)
    optimizer = build("AdamW", model.named_parameters())

    optimizer.load_state_dict(optimizer.state_dict())

    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_grad_scaler_skips_a_step_that_overflowed(build, randn):
    param = randn(70, 60)
    optimizer = build("AdamW8bit", [param])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = param.detach().clone()

    scaler.scale(param.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, before)
    assert not optimizer.state

    optimizer.zero_grad()
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(param.detach(), before * (1 - 1e-4) - 1e-2, rtol=1e-5, atol=1e-6)  # unscaled: g = 1


@pytest.mark.parametrize("through", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedLion", "AdEMAMix8bit", "LAMB"])
@pytest.mark.filterwarnings("ignore:paging to the host:halfbyte.HalfbyteWarning")
def test_copy_steps_like_the_original(build, randn, step, calls, through, name):
    params = [randn(70, 60), randn(5)]
    optimizer = build(name, params, fused_clip=0.5)
    step(optimizer, params)

    other = through(optimizer)
    copies = other.param_groups[0]["params"]
    calls.clear()
    step(optimizer, params, 1)
    count = len(calls)
    step(other, copies, 1)

    assert all(map(torch.equal, params, copies))
    assert len(calls) == 2 * count
    assert (other.fused_clip, other.is_paged, other.optim_bits) == (0.5, optimizer.is_paged, optimizer.optim_bits)


def test_copied_states_share_calls_with_new_ones(build, randn, step, calls):
    first, second = randn(70, 60), randn(70, 60)
    optimizer = copy.deepcopy(build("AdamW8bit", [first, second]))
    params = optimizer.param_groups[0]["params"]
    params[0].grad = torch.ones(70, 60)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    params = other.param_groups[0]["params"]
    other.state[params[0]]["step"] = 0
    calls.clear()

    step(other, params)

    assert len(calls) == 1


def test_hooks_and_zero_grad_work(build, randn, step):
    param = randn(4)
    optimizer = build("Lion", [param])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    step(optimizer, [param])
    optimizer.zero_grad()

    assert seen == ["before", "after"]
    assert param.grad is None


def test_step_is_seen_by_the_profiler(build, randn, step):
    param = randn(4)
    optimizer = build("AdamW8bit", [param])

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        step(optimizer, [param])

    assert "Optimizer.step#AdamW8bit.step" in {event.key for event in profile.key_averages()}


def test_step_bumps_the_version_of_parameters(build, randn, step):
    param = randn(4)
    optimizer = build("AdamW", [param])
    loss = (param * param).sum()

    step(optimizer, [param])

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD", "Lion"])
@pytest.mark.parametrize("own", [{}, {"capturable": True}])
def test_compiled_step_gives_the_same_bits_without_recompiling(build, randn, step, name, own):
    torch._dynamo.reset()
    ours, theirs = [randn(70, 60), randn(4)], [randn(70, 60), randn(4)]
    compiled, eager = build(name, ours, **own), build(name, theirs, **own)
    run = torch.compile(compiled.step, backend="eager")
    compiled_step = type("Compiled", (), {"step": staticmethod(run)})

    for seed in range(4):
        with torch.compiler.set_stance("fail_on_recompile") if seed > 1 else torch.compiler.set_stance("default"):
            step(compiled_step, ours, seed)
        step(eager, theirs, seed)

    assert all(map(torch.equal, ours, theirs))


def test_gradients_that_are_none_are_left_out(build, randn, step):
    params = [randn(4), randn(4)]
    optimizer = build("AdamW", params)
    before = params[1].detach().clone()

    step(optimizer, params[:1])

    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


def test_step_without_any_gradient_does_nothing(build, randn, calls):
    optimizer = build("AdamW8bit", [randn(4)], fused_clip=1.0)

    optimizer.step()

    assert calls == []


def test_empty_parameter_is_counted_and_not_computed(build, calls, step):
    param = torch.nn.Parameter(torch.empty(0, 3))
    optimizer = build("AdamW8bit", [param])

    step(optimizer, [param])

    assert calls == []
    assert optimizer.state[param]["step"] == 1


def sentences(count, generator):
    """Tokens of which every second one follows from the one before, and the others from nothing."""
    tokens = torch.randint(0, 16, (count, 12), generator=generator)
    tokens[:, 1::2] = (tokens[:, ::2] * 7 + 3) % 16
    return tokens


def trained_loss(cls):
    """Loss on held-out sentences before and after training a one-layer transformer, and the dtypes of its states."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 64), layer, torch.nn.Linear(64, 16))
    optimizer = cls(model.parameters(), lr=3e-3)

    def loss(tokens):
        return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])

    held_out = sentences(64, torch.Generator().manual_seed(1))
    before, generator = loss(held_out).item(), torch.Generator().manual_seed(2)
    for _ in range(45):
        optimizer.zero_grad()
        loss(sentences(16, generator)).backward()
        optimizer.step()
    return before, loss(held_out).item(), {state["state1"].dtype for state in optimizer.state.values()}


def test_tiny_transformer_trained_with_8bit_adamw_ends_within_one_percent_of_32bit():
    before, plain, _ = trained_loss(optim.AdamW32bit)
    _, quantized, dtypes = trained_loss(optim.AdamW8bit)

    assert torch.uint8 in dtypes
    assert plain < 0.6 * before
    assert quantized == pytest.approx(plain, rel=0.01)
