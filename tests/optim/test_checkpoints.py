"""state_dict and load_state_dict: layouts, bitsandbytes' files, resuming, and what is refused."""

import copy
import io

import pytest
import torch

from halfbyte import FormatError, HalfbyteWarning, optim
from halfbyte.optim.checkpoint import WRAPPED

NAMES = ["Adam", "AdamW", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS"]
SHAPES = [(70, 60), (33,)]  # an 8-bit state with a partial block, and a 32-bit one


@pytest.fixture
def model(randn):
    """`model(seed)`: parameters of SHAPES."""
    return lambda seed=0: [randn(*shape, seed=seed + i) for i, shape in enumerate(SHAPES)]


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flattened(state_dict):
    """The layout of older files: the inner dictionary's content beside the step."""
    flat = copy.deepcopy(state_dict)
    for entry in flat["state"].values():
        entry.update(entry.pop(WRAPPED))
    return flat


def gradients(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(count)]


def run(optimizer, params, grads):
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def contents(optimizer):
    """Everything that a step may depend on, copied."""
    return copy.deepcopy(optimizer.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# -- layouts -------------------------------------------------------------------------------------------------


def test_state_dict_wraps_all_but_the_step(build, model, step):
    params = model()
    optimizer = build("AdamW8bit", params)
    step(optimizer, params)

    saved = optimizer.state_dict()

    assert [sorted(entry) for entry in saved["state"].values()] == [[WRAPPED, "step"]] * 2
    inner = [list(entry[WRAPPED]) for entry in saved["state"].values()]
    assert inner == [["state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2"], ["state1", "state2"]]
    assert saved["state"][0]["step"] == 1
    assert saved["state"][0][WRAPPED]["state1"] is optimizer.state[params[0]]["state1"]
    assert "state1" in optimizer.state[params[0]]


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_bitsandbytes_keys_whatever_own_options_are_set(build, oracle, model, name):
    params = model()
    optimizer = build(name, params, fused_clip=1.0, stochastic_rounding=True)
    arguments = {"lr": 0.01, **({"momentum": 0.9} if name in ("SGD", "LARS") else {})}
    _, theirs = oracle.run(name, arguments, [param.detach() for param in params], [])

    (ours,), (group,) = optimizer.state_dict()["param_groups"], theirs["param_groups"]

    assert ours == group
    assert list(ours) == list(group)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [through_a_file, flattened])
def test_resuming_gives_the_same_bits_as_not_stopping(build, model, name, bits, layout):
    params = model()
    optimizer = build(name, params, optim_bits=bits)
    grads = gradients(6)
    run(optimizer, params, grads[:3])
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = build(name, resumed, optim_bits=bits, lr=1.0)
    other.load_state_dict(layout(optimizer.state_dict()))

    run(optimizer, params, grads[3:])
    run(other, resumed, grads[3:])

    assert all(map(torch.equal, params, resumed))
    assert same(contents(optimizer), contents(other))


def test_loading_copies_the_tensors(build, model, step):
    params = model()
    optimizer = build("AdamW8bit", params)
    step(optimizer, params)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    resumed = model()
    other = build("AdamW8bit", resumed)

    other.load_state_dict(saved)
    step(other, resumed)

    assert same(saved, before)


def test_statistics_keep_their_dtypes_beside_bfloat16_parameters(build, randn, step):
    params = [randn(70, 60, dtype=torch.bfloat16), randn(33, dtype=torch.bfloat16)]
    optimizer = build("AdEMAMix8bit", params)
    step(optimizer, params)
    other = build("AdEMAMix8bit", [torch.nn.Parameter(param.detach().clone()) for param in params])

    other.load_state_dict(optimizer.state_dict())

    for ours, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert same(dict(ours), dict(theirs))


def test_loaded_state_shares_one_codebook_and_one_call(build, randn, step, calls):
    params = [randn(70, 60, seed=i) for i in range(4)]
    optimizer = build("AdamW8bit", params)
    step(optimizer, params)
    other = build("AdamW8bit", params)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    calls.clear()

    step(other, params)

    assert [(name, len(args[1])) for name, args in calls] == [("update_8bit", 4)]


def test_state_is_decoded_with_its_own_codebook_and_in_a_call_of_its_own(build, randn, step, calls):
    params = [randn(70, 60), randn(70, 60, seed=1)]
    optimizer = build("SGD8bit", params, lr=1.0, momentum=0.5)
    step(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    inner = saved["state"][0][WRAPPED]
    inner["qmap1"] = torch.linspace(-1, 1, 256)
    momentum = inner["qmap1"][inner["state1"].long()].view(-1) * inner["absmax1"].repeat_interleave(256)[:4200]
    expected = params[0].detach() - 0.5 * momentum.view(70, 60)
    calls.clear()

    optimizer.load_state_dict(saved)
    for param in params:
        param.grad = torch.zeros(70, 60)
    optimizer.step()

    torch.testing.assert_close(params[0].detach(), expected)
    assert [len(args[1]) for _, args in calls] == [1, 1]


def test_parameters_that_were_never_stepped_have_no_state(build, model, step):
    params = model()
    optimizer = build("AdamW8bit", params)
    params[1].requires_grad_(False)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    other = build("AdamW8bit", params)

    other.load_state_dict(optimizer.state_dict())
    step(other, params)

    assert [other.state[param]["step"] for param in params] == [2, 1]


@pytest.mark.parametrize("now", [True, False])
def test_move_to_device_decides_when_states_are_brought_to_their_parameter(build, randn, step, now):
    param = randn(2, 3, 4, 5)
    optimizer = build("AdamW", [param])
    step(optimizer, [param])
    saved = copy.deepcopy(optimizer.state_dict())
    # Without a second device, the memory format shows it.
    other = torch.nn.Parameter(param.detach().to(memory_format=torch.channels_last))
    loaded = build("AdamW", [other])

    loaded.load_state_dict(saved, move_to_device=now)
    moved = loaded.state[other]["state1"].stride() == other.stride()
    step(loaded, [other])

    assert moved == now
    assert loaded.state[other]["state1"].stride() == other.stride()


def test_load_hooks_run(build, model):
    optimizer = build("AdamW", model())
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda self, state_dict: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda self: seen.append("after"))

    optimizer.load_state_dict(optimizer.state_dict())

    assert seen == ["before", "after"]


# -- bitsandbytes' files -------------------------------------------------------------------------------------


def arguments_of(name, bits):
    return {"lr": 1e-3, "optim_bits": bits, **({"momentum": 0.9} if name in ("SGD", "LARS") else {})}


def agree(ours, theirs, start, lr, noise):
    """Apart by no more than a share of the largest movement."""
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one.detach() - other).abs().max() <= noise * (other - before).abs().max()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad"])
def test_training_that_bitsandbytes_began_goes_on_here(build, oracle, model, name, bits):
    params, grads, arguments = model(), gradients(6), arguments_of(name, bits)
    start = [param.detach().clone() for param in params]
    middle, saved = oracle.run(name, arguments, start, grads[:3])
    end, _ = oracle.run(name, arguments, middle, grads[3:], saved)
    ours = [torch.nn.Parameter(param.clone()) for param in middle]
    optimizer = getattr(optim, name)(ours, **arguments)

    optimizer.load_state_dict(saved)
    loaded = contents(optimizer)
    run(optimizer, ours, grads[3:])

    assert same(loaded["state"], saved["state"])
    agree(ours, end, middle, 1e-3, 0.1 if bits == 8 and name != "Lion" else 2.1 if name == "Lion" else 1e-4)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad"])
def test_training_that_began_here_goes_on_in_bitsandbytes(build, oracle, model, name, bits):
    params, grads, arguments = model(), gradients(6), arguments_of(name, bits)
    optimizer = getattr(optim, name)(params, **arguments)
    run(optimizer, params, grads[:3])
    saved = through_a_file(optimizer.state_dict())
    middle = [param.detach().clone() for param in params]

    end, after = oracle.run(name, arguments, middle, grads[3:], saved)
    run(optimizer, params, grads[3:])

    assert [entry["step"] for entry in after["state"].values()] == [6, 6]
    agree(params, end, middle, 1e-3, 0.1 if bits == 8 and name != "Lion" else 2.1 if name == "Lion" else 1e-4)


# -- older files ---------------------------------------------------------------------------------------------


def test_blocks_of_2048_become_blocks_of_256_with_the_same_values(build, randn, step):
    param = randn(5000)
    optimizer = build("AdamW8bit", [param])
    step(optimizer, [param])
    old = flattened(optimizer.state_dict())
    coarse = {name: torch.tensor([1.0, 2.0, 3.0]) * scale for name, scale in (("absmax1", 0.1), ("absmax2", 0.2))}
    old["state"][0].update(coarse)
    other = build("AdamW8bit", [param])

    other.load_state_dict(old)

    for name, absmax in coarse.items():
        assert torch.equal(other.state[param][name], absmax.repeat_interleave(8)[:20])
    step(other, [param])


def test_legacy_keys_are_tolerated_and_kept(build, randn, step):
    param = randn(70, 60)
    optimizer = build("AdamW8bit", [param])
    step(optimizer, [param])
    old = flattened(optimizer.state_dict())
    old["state"][0].update(max1=torch.zeros(1), new_max1=torch.zeros(1), gnorm_vec=torch.zeros(100))
    other = build("AdamW8bit", [param])

    other.load_state_dict(old)
    step(other, [param])

    assert {"max1", "new_max1", "gnorm_vec"} <= other.state_dict()["state"][0][WRAPPED].keys()


def test_groups_from_before_ademamix_lack_its_keys(build, randn, step):
    param = randn(8)
    optimizer = build("AdamW", [param])
    step(optimizer, [param])
    old = copy.deepcopy(optimizer.state_dict())
    for key in ("alpha", "t_alpha", "t_beta3"):
        del old["param_groups"][0][key]

    optimizer.load_state_dict(old)

    assert optimizer.param_groups[0]["t_alpha"] is None


def misplaced(absmax):
    """absmax1 as the CUDA kernel leaves it: the slow average's written one place too early."""
    broken = absmax.clone().view(-1)
    last = absmax.shape[1] - 1
    broken[last : 2 * last + 1] = absmax[1]
    broken[-1] = 0
    return broken.view_as(absmax)


def test_misplaced_absmax_of_ademamix_is_put_right_with_a_warning(build, randn, step):
    param = randn(4396)
    optimizer = build("AdEMAMix8bit", [param])
    step(optimizer, [param])
    saved = copy.deepcopy(optimizer.state_dict())
    right = saved["state"][0][WRAPPED]["absmax1"].clone()
    saved["state"][0][WRAPPED]["absmax1"] = misplaced(right)

    with pytest.warns(HalfbyteWarning, match="misplaces absmax1"):
        optimizer.load_state_dict(saved)

    found = optimizer.state[param]["absmax1"]
    assert torch.equal(found[1], right[1])
    assert torch.equal(found[0, :-1], right[0, :-1])
    assert found[0, -1] == 0


def test_absmax_of_ademamix_in_its_place_stays_as_it_is(build, randn, step):
    for n in (4396, 4352):  # with and without a partial block; the last block never had a gradient
        param = randn(n)
        optimizer = build("AdEMAMix8bit", [param])
        param.grad = torch.ones(n)
        param.grad[-256:] = 0
        optimizer.step()
        before = optimizer.state[param]["absmax1"].clone()

        optimizer.load_state_dict(optimizer.state_dict())

        assert torch.equal(optimizer.state[param]["absmax1"], before)


# -- what is refused -----------------------------------------------------------------------------------------


def without(*keys):
    def change(saved):
        for key in keys:
            saved["state"][0][WRAPPED].pop(key, None)

    return change


def with_(key, value):
    def change(saved):
        saved["state"][0][WRAPPED][key] = value

    return change


def truncated_groups(saved):
    del saved["param_groups"]


def fewer_parameters(saved):
    saved["param_groups"][0]["params"].pop()


def no_step(saved):
    del saved["state"][0]["step"]


def of_torch(saved):
    param = torch.nn.Parameter(torch.zeros(70, 60))
    other = torch.optim.AdamW([param, torch.nn.Parameter(torch.zeros(33))])
    param.grad = torch.zeros_like(param)
    other.step()
    saved["state"] = other.state_dict()["state"]


WRONG = {
    "state1 is missing": (without("state1"), "state 0 has no state1"),
    "state2 is missing": (without("state2", "qmap2", "absmax2"), "state 0 has no state2, qmap2, absmax2"),
    "absmax1 is missing": (without("absmax1"), "state 0 has no absmax1"),
    "qmap2 is missing": (without("qmap2"), "state 0 has no qmap2"),
    "the step is missing": (no_step, "state 0 has no step"),
    "another shape": (with_("state1", torch.zeros(60, 70, dtype=torch.uint8)), r"shape \(70, 60\); got .*\(60, 70\)"),
    "another dtype": (with_("state2", torch.zeros(70, 60)), "state2 of state 0 must be uint8"),
    "an absmax that was cast": (with_("absmax1", torch.zeros(17, dtype=torch.bfloat16)), "must be float32"),
    "too few absmax": (with_("absmax2", torch.zeros(11)), r"absmax2 of state 0 .*\(17,\) or \(3,\); got .*\(11,\)"),
    "a short codebook": (with_("qmap1", torch.zeros(255)), r"qmap1 of state 0 must be .*\(256,\)"),
    "no groups": (truncated_groups, "param_groups is missing"),
    "fewer parameters": (fewer_parameters, r"groups of \[1\] parameters; the optimizer has groups of \[2\]"),
    "torch's state": (of_torch, "state 0 has no state1, only exp_avg, exp_avg_sq, step"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(build, model, step, wrong):
    change, message = WRONG[wrong]
    params = model()
    optimizer = build("AdamW8bit", params)
    step(optimizer, params)
    before = contents(optimizer)
    saved = copy.deepcopy(before)
    saved["param_groups"][0]["lr"] = 7.0
    saved["state"] = dict(sorted(saved["state"].items(), reverse=True))  # the wrong one comes last
    change(saved)

    with pytest.raises(FormatError, match=message):
        optimizer.load_state_dict(saved)

    assert same(contents(optimizer), before)


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), [("AdamW", "Lion"), ("Lion", "AdamW"), ("AdEMAMix", "AdamW"), ("AdamW", "AdEMAMix")]
)
@pytest.mark.parametrize("bits", [8, 32])
def test_state_of_another_kind_of_optimizer_is_refused(build, model, step, saved_by, loaded_by, bits):
    params = model()
    optimizer = build(saved_by, params, optim_bits=bits)
    step(optimizer, params)

    with pytest.raises(ValueError, match=r"another optimizer's|must be .* of shape|betas must be 3"):
        build(loaded_by, model()).load_state_dict(optimizer.state_dict())


def test_groups_of_torch_sgd_are_refused(build, model):
    saved = torch.optim.SGD(model(), lr=1.0, momentum=0.9).state_dict()

    with pytest.raises(FormatError, match="group 0 of the state_dict has no betas, eps: another optimizer's"):
        build("SGD", model()).load_state_dict(saved)
