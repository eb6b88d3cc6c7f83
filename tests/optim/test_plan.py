"""Steps after the first reuse what it found out, and see everything that has changed since."""

import gc
import weakref

import pytest
import torch

from halfbyte import optim
from halfbyte.optim import base


@pytest.fixture
def sorted_anew(monkeypatch):
    """How often parameters were sorted into buckets."""
    found = []
    original = base.Optimizer._buckets
    monkeypatch.setattr(base.Optimizer, "_buckets", lambda self, jobs: found.append(len(jobs)) or original(self, jobs))
    return found


@pytest.fixture
def pair(build, randn, step):
    """`pair("AdamW8bit")`: an optimizer, its parameters, and a function that takes the same step with another that
    forgets its plan, and compares all bits."""

    def make(name, **arguments):
        ours, theirs = ([randn(70, 60), randn(5), randn(90, 50)] for _ in range(2))
        planned, fresh = build(name, ours, **arguments), build(name, theirs, **arguments)

        def advance(seed, change=lambda optimizer, params: None):
            for optimizer, params in ((planned, ours), (fresh, theirs)):
                change(optimizer, params)
                fresh._plan = None
                step(optimizer, params, seed)
            assert all(map(torch.equal, ours, theirs))
            for one, other in zip(ours, theirs, strict=True):
                a, b = planned.state[one], fresh.state[other]
                assert a.keys() == b.keys()
                for key in a:
                    same = torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
                    assert same, key

        return planned, ours, advance

    return make


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "SGD", "Lion8bit", "LAMB"])
@pytest.mark.parametrize("own", [{}, {"capturable": True}, {"fused_clip": 0.5}])
def test_second_step_sorts_nothing_and_gives_the_same_bits(pair, sorted_anew, name, own):
    _, _, advance = pair(name, **own)
    for seed in range(4):
        advance(seed)

    assert len(sorted_anew) == 1 + 4  # of the other optimizer each time


def set_lr(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.3


def set_decay(optimizer, params):
    optimizer.param_groups[0]["weight_decay"] = 0.5


def set_override(optimizer, params):
    optim.GlobalOptimManager.get_instance().override_config(params[1], "lr", 0.5)


def replace_state(optimizer, params):
    optimizer.state[params[0]]["state1"] = optimizer.state[params[0]]["state1"].flip(0).contiguous()


def set_step(optimizer, params):
    optimizer.state[params[0]]["step"] = 7


def set_table(optimizer, params):
    state = optimizer.state[params[0]]
    state["qmap1"] = state["qmap1"].clone()


def forget_state(optimizer, params):
    del optimizer.state[params[0]]


def reload_state(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


def widen(optimizer, params):
    params[2].data = params[2].data.bfloat16()


def transpose(optimizer, params):
    params[0].data = params[0].data.t().contiguous().t()


def reorder(optimizer, params):
    group = optimizer.param_groups[0]
    group["params"] = group["params"][::-1]


CHANGES = [set_lr, set_decay, set_override, replace_state, set_step, set_table, forget_state, reload_state, widen]


@pytest.mark.parametrize("change", [*CHANGES, transpose, reorder], ids=lambda change: change.__name__)
def test_change_between_steps_is_seen(pair, change):
    optimizer, _, advance = pair("AdamW8bit")
    for seed in range(2):
        advance(seed)

    advance(2, change)
    advance(3)

    assert (optimizer._plan is None) == (change is transpose)


def test_new_group_and_gradients_that_come_and_go_are_seen(build, randn, step, calls):
    params = [randn(70, 60, seed=i) for i in range(4)]
    optimizer = build("AdamW8bit", params[:3])
    reference = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = build("AdamW8bit", reference[:3])

    for seed, chosen in enumerate([[0, 1, 2], [0, 1, 2], [0, 2], [0, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]):
        if seed == 5:
            optimizer.add_param_group({"params": [params[3]], "lr": 0.5})
            other.add_param_group({"params": [reference[3]], "lr": 0.5})
        for one, model in ((optimizer, params), (other, reference)):
            other._plan = None
            one.zero_grad()
            step(one, [model[i] for i in chosen], seed)

    assert all(map(torch.equal, params, reference))


def test_learning_rate_schedule_keeps_the_plan_beside_an_override(build, randn, step, sorted_anew):
    params = [randn(70, 60), randn(90, 50)]
    optim.GlobalOptimManager.get_instance().override_config(params[0], "optim_bits", 32)
    optimizer = build("AdamW8bit", params)

    for seed in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + seed)
        step(optimizer, params, seed)

    assert len(sorted_anew) == 1


def test_gradients_and_replaced_states_are_not_kept(build, randn, step):
    params = [randn(70, 60)]
    optimizer = build("AdamW8bit", params)
    for seed in range(2):
        step(optimizer, params, seed)
    assert optimizer._plan is not None
    state = optimizer.state[params[0]]
    gone = [weakref.ref(params[0].grad), weakref.ref(state["state1"])]

    optimizer.zero_grad()
    state["state1"] = state["state1"].clone()
    gc.collect()

    assert [one() for one in gone] == [None, None]


def test_no_places_are_no_parameters(build, randn):
    param = randn(70, 60)
    optimizer = build("AdamW8bit", [param])
    param.grad = torch.ones(70, 60)
    before = param.detach().clone()

    optimizer.update([])

    assert torch.equal(param, before)


def test_planned_step_is_seen_by_a_mode(build, randn, step):
    ours, theirs = [randn(70, 60)], [randn(70, 60)]
    optimizer, other = build("AdamW8bit", ours), build("AdamW8bit", theirs)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for seed in range(2):
        step(other, theirs, seed)
        with Watch():
            step(optimizer, ours, seed)

    assert seen.count("halfbyte.update_8bit.default") == 2
    assert torch.equal(ours[0], theirs[0])


def test_parameter_at_the_same_address_with_another_dtype_is_seen(build, randn, step):
    """As where a model is cast and cast again, and the allocator gives the first memory back."""
    params = [randn(70, 60)]
    optimizer = build("AdamW8bit", params)
    for seed in range(2):
        step(optimizer, params, seed)

    address = params[0].data_ptr()
    params[0].data = torch.empty(0, dtype=torch.bfloat16).set_(params[0].untyped_storage(), 0, (70, 60)).zero_()
    assert params[0].data_ptr() == address
    params[0].grad = None
    params[0].grad = torch.ones(70, 60, dtype=torch.bfloat16)
    optimizer.step()

    assert optimizer._plan.buckets[0].kinds[1] is torch.bfloat16


def test_step_that_fails_leaves_no_plan(build, randn, step):
    params = [randn(70, 60)]
    optimizer = build("AdamW8bit", params)
    step(optimizer, params)
    optimizer.state[params[0]]["absmax1"] = torch.zeros(3)

    with pytest.raises(ValueError, match="absmax1 must have shape"):
        step(optimizer, params, 1)

    assert optimizer._plan is None


def test_stochastic_rounding_is_read_at_each_step(build, randn, step):
    ours, theirs = ([randn(70, 60, dtype=torch.bfloat16)] for _ in range(2))
    late, never = build("AdamW8bit", ours), build("AdamW8bit", theirs)
    for seed in range(2):
        step(late, ours, seed)
        step(never, theirs, seed)
    late.stochastic_rounding = True
    step(late, ours, 2)
    step(never, theirs, 2)

    assert not torch.equal(ours[0], theirs[0])
