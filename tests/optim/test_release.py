"""step_in_backward: each parameter is stepped and its gradient freed inside backward."""

import pytest
import torch

import halfbyte
from halfbyte import InputError
from halfbyte.optim import step_in_backward


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Linear(80, 64), torch.nn.Linear(64, 3)
    )


def batch(seed):
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix", "Lion8bit", "SGD"])
@pytest.mark.parametrize("own", [{}, {"capturable": True}, {"stochastic_rounding": True}])
def test_step_in_backward_gives_the_same_bits_as_a_plain_step(build, name, own):
    dtype = torch.bfloat16 if "stochastic_rounding" in own else torch.float32
    ours, theirs = model().to(dtype), model().to(dtype)
    released, plain = build(name, ours.parameters(), **own), build(name, theirs.parameters(), **own)

    with step_in_backward(released):
        for seed in range(3):
            ours(batch(seed).to(dtype)).square().mean().backward()
            assert all(param.grad is None for param in ours.parameters())
            theirs(batch(seed).to(dtype)).square().mean().backward()
            plain.step()
            plain.zero_grad()

    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_training_loop_may_keep_its_step_and_scheduler(build):
    trained = model()
    optimizer = build("AdamW8bit", trained.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    handle = step_in_backward(optimizer)

    trained(batch(0)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()

    assert {state["step"] for state in optimizer.state.values()} == {1}
    handle.remove()
    trained(batch(0)).sum().backward()
    assert all(param.grad is not None for param in trained.parameters())
    assert {state["step"] for state in optimizer.state.values()} == {1}


def test_frozen_parameters_are_left_out(build):
    trained = model()
    trained[0].weight.requires_grad_(False)
    optimizer = build("AdamW", trained.parameters())

    with step_in_backward(optimizer):
        trained(batch(0)).sum().backward()

    assert trained[0].weight not in optimizer.state
    assert trained[0].bias in optimizer.state


def test_fused_clip_together_with_step_in_backward_is_refused(build):
    with pytest.raises(InputError, match="fused_clip needs all gradients at once"):
        step_in_backward(build("AdamW", model().parameters(), fused_clip=1.0))


def test_backend_chosen_at_the_call_holds_in_backward(build, stub_backend):
    stub = stub_backend("acme", priority=-1)
    trained = model()
    with halfbyte.use_backend("acme"):
        step_in_backward(build("AdamW", trained.parameters()))

    trained(batch(0)).sum().backward()

    assert stub.calls == ["update_32bit"] * 6
