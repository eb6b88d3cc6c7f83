"""Bad input gets a sentence, before anything is changed."""

import pytest
import torch

import halfbyte
from halfbyte import InputError, optim
from halfbyte.optim import memory

WRONG = [
    ("AdamW", {"lr": -1.0}, "lr must be finite and at least 0; got -1.0"),
    ("AdamW", {"lr": float("nan")}, "lr must be finite"),
    ("AdamW", {"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element; got shape \(2,\)"),
    ("AdamW", {"eps": -1e-8}, "eps must be finite and at least 0"),
    ("AdamW", {"weight_decay": -0.1}, "weight_decay must be finite and at least 0"),
    ("AdamW", {"betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and below 1; got 1.0"),
    ("AdamW", {"betas": (-0.1, 0.9)}, r"betas\[0\]"),
    ("AdamW", {"betas": (0.9,)}, "betas must be 2 numbers"),
    ("AdamW", {"betas": "(0.9, nine)"}, "betas must be a number; got ' nine'"),
    ("AdEMAMix", {"betas": (0.9, 0.999)}, "betas must be 3 numbers"),
    ("AdEMAMix", {"alpha": -1.0}, "alpha must be"),
    ("AdEMAMix", {"t_beta3": 10, "betas": (0.0, 0.9, 0.99)}, "0 < beta1 <= beta3"),
    ("SGD", {"momentum": 1.5}, r"betas\[0\]"),
    ("AdamW", {"optim_bits": 16}, "optim_bits must be 8 or 32; got 16"),
    ("AdamW", {"fused_clip": 0.0}, "fused_clip must be None, or finite and above 0"),
    ("LAMB", {"max_unorm": -1.0}, "max_unorm must be"),
    # accepted by bitsandbytes, and ignored
    ("AdamW", {"amsgrad": True}, "AdamW supports only amsgrad=False; got True"),
    ("Adam8bit", {"optim_bits": 8}, "Adam8bit supports only optim_bits=32; got 8"),
    ("Adagrad8bit", {"optim_bits": 32}, "Adagrad8bit supports only optim_bits=8; got 32"),
    ("SGD", {"dampening": 0.5}, "SGD supports only dampening=0"),
    ("SGD8bit", {"nesterov": True}, "SGD8bit supports only nesterov=False"),
    ("LARS", {"nesterov": True}, "LARS supports only nesterov=False"),
    ("RMSprop", {"momentum": 0.5}, "RMSprop supports only momentum=0.0"),
    ("Adagrad", {"lr_decay": 0.1}, "Adagrad supports only lr_decay=0"),
    ("Adagrad", {"initial_accumulator_value": 0.1}, "Adagrad supports only initial_accumulator_value=0"),
    ("LAMB", {"bias_correction": False}, "LAMB supports only bias_correction=True"),
    ("LAMB8bit", {"adam_w_mode": False}, "LAMB8bit supports only adam_w_mode=True"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG)
def test_wrong_argument_is_refused(build, randn, name, arguments, message):
    with pytest.raises(InputError, match=message):
        build(name, [randn(3)], **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGD", {"momentum": 0}),
        ("SGD8bit", {"momentum": 0}),
        ("LARS", {"momentum": 0}),
        ("RMSprop", {"alpha": 0}),
        ("RMSprop8bit", {"centered": True}),
        ("AdamW", {"optim_bits": 4}),
    ],
)
def test_what_bitsandbytes_has_not_implemented_has_its_error(build, randn, name, arguments):
    with pytest.raises(NotImplementedError) as caught:
        build(name, [randn(3)], **arguments)

    assert isinstance(caught.value, InputError)


def test_sgd_needs_its_learning_rate(randn):
    with pytest.raises(TypeError, match="lr"):
        optim.SGD([randn(3)])


def test_strings_of_a_command_line_are_read(randn):
    adam = optim.AdamW([randn(3)], betas="(0.9, 0.95)")
    rmsprop = optim.RMSprop([randn(3)], alpha="0.9", eps="1e-6", momentum="0", centered="False")

    assert adam.param_groups[0]["betas"] == (0.9, 0.95)
    assert rmsprop.param_groups[0]["betas"] == (0.9, 0.0)
    assert rmsprop.param_groups[0]["eps"] == 1e-6


def test_wrong_group_is_not_added(build, randn):
    optimizer = build("AdamW", [randn(3)])

    with pytest.raises(InputError, match="lr must be"):
        optimizer.add_param_group({"params": [randn(4)], "lr": -1})

    assert len(optimizer.param_groups) == 1


def test_parameter_listed_twice_is_refused(build, randn):
    param = randn(3)

    with pytest.raises(InputError, match="must not list a parameter twice"):
        build("AdamW", [param, param])


@pytest.fixture
def unchanged(build, randn):
    """`unchanged(change)`: a step after `change` of the second parameter raises, and the first one stays."""

    def check(change, message, error=InputError):
        good, bad = randn(70, 60), randn(70, 60, seed=1)
        optimizer = build("AdamW8bit", [good, bad])
        good.grad = torch.ones(70, 60)
        change(bad)
        before = good.detach().clone()

        with pytest.raises(error, match=message):
            optimizer.step()

        assert torch.equal(good, before)
        assert not optimizer.state.get(good)

    return check


def test_sparse_gradient_is_refused_before_any_parameter_moves(unchanged):
    def change(param):
        param.grad = torch.ones(70, 60).to_sparse()

    unchanged(change, "parameter 1 of group 0 has a sparse gradient, which AdamW8bit does not support")


def test_gradient_of_another_shape_is_refused_before_any_parameter_moves(unchanged):
    def change(param):
        param.grad = torch.ones(70, 60)
        param.data = torch.ones(70, 61)

    unchanged(
        change,
        r"parameter 1 of group 0 must have a gradient of its own .*\(70, 61\) on cpu; got float32 \(70, 60\) on cpu",
    )


def test_gradient_on_another_device_is_refused_before_any_parameter_moves(unchanged, monkeypatch):
    local = memory.local_gradient

    def change(param):
        param.grad = torch.ones(70, 60)
        elsewhere = torch.empty(70, 60, device="meta")  # torch lets only accelerators come apart
        monkeypatch.setattr(memory, "local_gradient", lambda one: elsewhere if one is param else local(one))

    unchanged(change, r"must have a gradient of its own dtype, shape and device, .* on cpu; got .* on meta")


def test_float64_parameter_is_refused_before_any_parameter_moves(unchanged):
    def change(param):
        param.data = param.data.double()
        param.grad = torch.ones(70, 60, dtype=torch.float64)

    unchanged(change, "must be float32, float16, bfloat16; got float64")


def test_hyperparameter_that_went_wrong_is_refused_before_any_parameter_moves(build, randn):
    good, bad = randn(5), randn(5)
    optimizer = build("AdamW", [{"params": [good]}, {"params": [bad]}])
    optimizer.param_groups[1]["lr"] = -1.0
    good.grad, bad.grad = torch.ones(5), torch.ones(5)
    before = good.detach().clone()

    with pytest.raises(InputError, match="lr must be"):
        optimizer.step()

    assert torch.equal(good, before)


def test_missing_kernel_is_found_before_any_parameter_moves(build, randn, stub_backend):
    stub_backend("acme", ops=("update_8bit",))
    large, small = randn(70, 60), randn(3)
    optimizer = build("AdamW8bit", [large, small])
    large.grad, small.grad = torch.ones(70, 60), torch.ones(3)
    before = large.detach().clone()

    with halfbyte.use_backend("acme"), pytest.raises(halfbyte.NoKernel, match="update_32bit"):
        optimizer.step()
    assert torch.equal(large, before)

    optimizer.step()
    assert optimizer.state[large]["step"] == 1


def test_parameters_on_several_devices_are_stepped_by_device(build, randn, calls):
    here, there = randn(5), torch.nn.Parameter(torch.empty(5, device="meta"))
    optimizer = build("AdamW", [here, there])
    here.grad, there.grad = torch.ones(5), torch.empty(5, device="meta")
    before = here.detach().clone()

    optimizer.step()

    assert not torch.equal(here, before)
    assert optimizer.state[there]["state1"].device.type == "meta"
