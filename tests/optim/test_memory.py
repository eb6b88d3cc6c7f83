"""Parameters, gradients and states in any memory format, and moved ones."""

import pytest
import torch

NAMES = ["AdamW8bit", "AdEMAMix8bit", "AdEMAMix32bit", "Lion8bit"]
SHAPE = (8, 6, 10, 9)  # 4320 elements: an 8-bit state, with a partial block


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def transposed(tensor):
    return tensor.transpose(0, 3).contiguous().transpose(0, 3)


def strided(tensor):
    """With gaps: every second element of a larger tensor."""
    return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0].copy_(tensor)


LAYOUTS = [channels_last, transposed, strided]


def values(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def train(optimizer, param, layout, seeds):
    for seed in seeds:
        param.grad = layout(values(seed))
        optimizer.step()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", [*LAYOUTS, torch.clone])
@pytest.mark.parametrize("name", NAMES)
def test_parameter_in_another_memory_format_is_stepped_like_its_flat_run(build, name, layout, gradient):
    """A contiguous parameter with the same elements in the same places of memory takes the same steps."""
    param = torch.nn.Parameter(layout(values(0)))
    strides, pointer = param.stride(), param.data_ptr()
    order = layout(torch.arange(float(param.numel())).view(SHAPE))
    places = (order.reshape(-1) if layout is strided else order.as_strided((order.numel(),), (1,))).long()
    flat = torch.nn.Parameter(values(0).view(-1)[places])
    ours, theirs = build(name, [param]), build(name, [flat])

    train(ours, param, gradient, [1, 2, 3])
    for seed in (1, 2, 3):
        flat.grad = values(seed).view(-1)[places]
        theirs.step()

    assert (param.stride(), param.data_ptr()) == (strides, pointer)
    assert torch.equal(param.detach().reshape(-1)[places], flat.detach())


@pytest.mark.parametrize("name", ["AdamW32bit", "AdEMAMix32bit", "SGD32bit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_32bit_states_do_not_depend_on_the_memory_format(build, name, layout):
    ours, theirs = torch.nn.Parameter(layout(values(0))), torch.nn.Parameter(values(0))

    train(build(name, [ours]), ours, layout, [1, 2, 3])
    train(build(name, [theirs]), theirs, torch.clone, [1, 2, 3])

    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", [channels_last, transposed])
def test_state_of_a_dense_parameter_lies_like_the_parameter(build, layout):
    param = torch.nn.Parameter(layout(values(0)))
    optimizer = build("AdEMAMix8bit", [param])

    train(optimizer, param, layout, [1])

    assert optimizer.state[param]["state2"].stride() == param.stride()
    assert optimizer.state[param]["state1"][0].stride() == param.stride()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("saved", "loaded"), [(torch.clone, channels_last), (channels_last, torch.clone)])
def test_state_follows_a_parameter_into_another_memory_format(build, name, saved, loaded):
    first = torch.nn.Parameter(saved(values(0)))
    optimizer = build(name, [first])
    train(optimizer, first, saved, [1, 2])
    second = torch.nn.Parameter(loaded(first.detach().clone()))
    other = build(name, [second])
    other.load_state_dict(optimizer.state_dict())
    middle = first.detach().clone()

    train(optimizer, first, saved, [3])
    train(other, second, loaded, [3])

    off = (first.detach() - second.detach()).norm() / (first.detach() - middle).norm()
    assert off < (0.3 if name == "Lion8bit" else 0.02 if "8bit" in name else 1e-6)  # 8-bit: quantized once more


def test_parameter_may_change_its_memory_format_between_steps(build):
    ours, theirs = torch.nn.Parameter(values(0)), torch.nn.Parameter(values(0))
    one, other = build("AdamW32bit", [ours]), build("AdamW32bit", [theirs])
    train(one, ours, torch.clone, [1])
    train(other, theirs, torch.clone, [1])

    ours.data = channels_last(ours.data)
    train(one, ours, channels_last, [2])
    train(other, theirs, torch.clone, [2])

    assert torch.equal(ours, theirs)
    assert one.state[ours]["state1"].is_contiguous(memory_format=torch.channels_last)
