"""The optimizers as classes of bitsandbytes' modules."""

import pickle

import pytest
import torch

import halfbyte
from halfbyte.compat.bitsandbytes import optim
from halfbyte.compat.bitsandbytes.optim import ademamix, optimizer
from halfbyte.optim.pytorch_ademamix import PytorchAdEMAMix

CLASSES = [name for name in optim.__all__ if name != "GlobalOptimManager"]


def parameters(n=5000):
    generator = torch.Generator().manual_seed(0)
    made = torch.nn.Parameter(torch.randn(n, generator=generator))
    made.grad = torch.randn(n, generator=generator)
    return [made]


def required(name):
    return {"lr": 0.01, "momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}


@pytest.mark.filterwarnings("ignore:paging to the host:halfbyte.HalfbyteWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_class_says_bitsandbytes_and_steps_like_halfbytes(name):
    served, core = getattr(optim, name), getattr(halfbyte.optim, name)

    assert "bitsandbytes" in str(served)
    assert served.__module__.startswith("bitsandbytes.optim.")
    assert issubclass(served, core)
    (ours,), (theirs,) = parameters(), parameters()
    for one, cls in ((ours, served), (theirs, core)):
        cls([one], **required(name)).step()
    assert torch.equal(ours, theirs)


def test_a_subclass_there_is_a_subclass_here():
    assert issubclass(optim.AdEMAMix8bit, optim.AdEMAMix)
    assert issubclass(optim.PagedAdEMAMix, optim.AdEMAMix)
    assert issubclass(optim.AdamW8bit, optimizer.Optimizer8bit)
    assert ademamix._ReferenceAdEMAMix is PytorchAdEMAMix


def test_optimizers_are_found_again_by_pickle(served):
    done = served(
        """
        import pickle, torch
        import bitsandbytes as bnb
        for name in bnb.optim.__all__:
            cls = getattr(bnb.optim, name)
            assert pickle.loads(pickle.dumps(cls)) is cls
        p = torch.nn.Parameter(torch.ones(5000))
        p.grad = torch.ones(5000)
        o = bnb.optim.AdamW8bit([p], lr=0.5)
        o.step()
        again = pickle.loads(pickle.dumps(o))
        assert type(again) is bnb.optim.AdamW8bit
        assert torch.equal(again.state[again.param_groups[0]["params"][0]]["state1"], o.state[p]["state1"])
        print("done")
        """
    )

    assert done.stdout == "done\n"


@pytest.mark.parametrize(
    ("name", "base", "options", "same"),
    [
        ("adam", "Optimizer2State", {}, lambda p: halfbyte.optim.Adam(p, 0.01)),
        ("lamb", "Optimizer2State", {"max_unorm": 1.0}, lambda p: halfbyte.optim.LAMB(p, 0.01)),
        ("lion", "Optimizer1State", {"betas": (0.9, 0.99)}, lambda p: halfbyte.optim.Lion(p, 0.01)),
        ("momentum", "Optimizer1State", {"optim_bits": 8}, lambda p: halfbyte.optim.SGD8bit(p, 0.01, 0.9)),
    ],
)
def test_bases_step_by_name(name, base, options, same):
    (ours,), (theirs,) = parameters(), parameters()
    made = getattr(optimizer, base)(name, [ours], lr=0.01, **options)

    made.step()
    same([theirs]).step()

    assert torch.equal(ours, theirs)
    assert "bitsandbytes" in str(type(made))


def test_bases_refuse_a_name_of_the_other_and_keep_theirs():
    with pytest.raises(halfbyte.InputError, match="'lion' is not an optimizer of Optimizer2State"):
        optimizer.Optimizer2State("lion", parameters())
    with pytest.raises(halfbyte.InputError, match="'bogus' is not an optimizer"):
        optimizer.Optimizer1State("bogus", parameters())
    made = optimizer.Optimizer1State("lion", parameters(), betas=(0.9, 0.99))
    assert made.__getstate__()["rule"] == "lion"
    assert optimizer.MockArgs({"a": 1}).a == 1
    assert pickle.loads(pickle.dumps(halfbyte.optim.Lion(parameters()))).rule == "lion"


@pytest.mark.parametrize("schedule", [{}, {"t_alpha": 4, "t_beta3": 4}])
def test_reference_ademamix_is_the_rule(schedule):
    (ours,), (theirs,) = parameters(300), parameters(300)
    one, other = halfbyte.optim.AdEMAMix32bit([ours], **schedule), PytorchAdEMAMix([theirs], **schedule)

    for step in range(6):
        for param in (ours, theirs):
            param.grad = torch.randn(300, generator=torch.Generator().manual_seed(step))
        one.step()
        loss = other.step(lambda: 1.0)

    assert loss == 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_manager_is_halfbytes_and_heeded():
    (param,) = parameters()
    optim.GlobalOptimManager.get_instance().override_config(param, "optim_bits", 32)
    made = optim.AdamW8bit([param])

    made.step()

    assert made.state[param]["state1"].dtype == torch.float32
