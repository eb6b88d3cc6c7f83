"""Paged states, here of parameters on the CPU: the same cutting and copying, in lanes that run out of step."""

import copy
import gc
import pickle
import random
import sys
import warnings
from collections import deque

import pytest
import torch

import halfbyte
from halfbyte import HalfbyteWarning, InputError, optim
from halfbyte.ops import rules
from halfbyte.optim import lanes, paging, slabs

NAMES = [
    *("PagedAdam", "PagedAdam8bit", "PagedAdam32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"),
    *("PagedAdEMAMix", "PagedAdEMAMix8bit", "PagedAdEMAMix32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"),
]
LEAST = paging.LEAST
HOST = paging.PASSING  # no state stays on the device


class LateLanes:
    """Lanes that do nothing before they must, and then the work of any lane that may go on."""

    pinned = 0  # slabs

    def __init__(self, device):
        self.queues = [deque(), deque(), deque()]
        self.draw = random.Random(0)
        self.finished = 0

    def run(self, lane, work, after):
        done = []
        self.queues[lane].append((work, after, done))
        return done

    def finish(self):
        while any(self.queues):
            able = [queue for queue in self.queues if queue and all(queue[0][1])]
            work, _, done = self.draw.choice(able).popleft()
            work()
            done.append(True)
        self.finished += 1

    @staticmethod
    def pin(address, size):
        LateLanes.pinned += 1

        def unpin():
            LateLanes.pinned -= 1

        return unpin


@pytest.fixture
def paged_here(monkeypatch):
    """States of parameters on the CPU are paged."""
    monkeypatch.setitem(lanes.LANES, "cpu", LateLanes)
    monkeypatch.setattr(LateLanes, "pinned", 0)


def parameters(dtype=torch.float32, sizes=(100_000, 4096, 130_001, 300_000)):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]


def equal(ours, theirs):
    """Whether two optimizers have the same parameters and states, bit for bit."""
    for one, other in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        a, b = ours.state[one], theirs.state[other]
        assert a.keys() == b.keys()
        if not torch.equal(one, other):
            return False
        if not all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a):
            return False
    return True


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [LEAST, 3 * 300_000, HOST])  # all cut, some, none
def test_paged_steps_give_the_bits_of_unpaged_ones(build, step, paged_here, name, budget):
    ours, theirs = parameters(), parameters()
    paged, plain = build(name, ours, paged_budget=budget), build(name.removeprefix("Paged"), theirs)

    for seed in range(3):
        step(paged, ours, seed)
        step(plain, theirs, seed)

    assert equal(paged, plain)


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedLion"])
def test_paged_steps_draw_the_bits_of_stochastic_rounding(build, step, paged_here, name):
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    paged = build(name, ours, paged_budget=LEAST, stochastic_rounding=True)
    plain = build(name.removeprefix("Paged"), theirs, stochastic_rounding=True)

    for seed in range(3):
        step(paged, ours, seed)
        step(plain, theirs, seed)

    assert equal(paged, plain)


def test_seed_of_a_part_draws_the_bits_of_the_whole():
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    whole = rules.stochastically_rounded(values, 77, 5)

    for length in (256, 1024):
        for first in range(0, 4096, length):
            seed = rules.seed_from(77, 5, first)
            part = rules.stochastically_rounded(values[first : first + length], seed, 5)
            assert torch.equal(part, whole[first : first + length])
    far = 3 << 33  # where an index has more than 32 bits
    key = rules.rounding_key(rules.seed_from(77, 5, far), 5)
    assert key == rules.rounding_key(77, 5) ^ (far >> 32)


def test_hash_is_undone():
    assert [rules.unhash32(rules.hash32(x)) for x in (0, 1, 12345, 0xFFFFFFFF)] == [0, 1, 12345, 0xFFFFFFFF]


def test_fused_clip_of_paged_states_scales_every_piece(build, step, paged_here):
    ours, theirs = parameters(), parameters()
    paged = build("PagedAdamW8bit", ours, paged_budget=LEAST, fused_clip=0.5)
    plain = build("AdamW8bit", theirs, fused_clip=0.5)

    step(paged, ours)
    step(plain, theirs)

    assert equal(paged, plain)


def test_parameters_in_other_memory_formats_are_paged(build, paged_here):
    def model():
        dense = torch.randn(16, 32, 20, 20, generator=torch.Generator().manual_seed(0))
        with_gaps = torch.zeros(110_000, 2)[:, 0]
        return [torch.nn.Parameter(dense.to(memory_format=torch.channels_last)), torch.nn.Parameter(with_gaps)]

    ours, theirs = model(), model()
    paged, plain = build("PagedAdEMAMix8bit", ours, paged_budget=LEAST), build("AdEMAMix8bit", theirs)
    for params in (ours, theirs):
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1))

    for _ in range(2):
        paged.step()
        plain.step()

    assert equal(paged, plain)
    assert paged.state[ours[0]]["state2"].stride() == ours[0].stride()


# -- memory --------------------------------------------------------------------------------------------------


def test_buffers_stay_within_the_budget_and_pieces_within_a_buffer(build, step, paged_here, calls):
    params = parameters()
    optimizer = build("PagedAdamW8bit", params, paged_budget=LEAST)

    step(optimizer, params)

    (stage,) = optimizer._pager._stages.values()
    assert stage._buffers.nbytes <= LEAST
    pages = [args for _, args in calls if args[3][0].untyped_storage().data_ptr() == stage._buffers.data_ptr()]
    assert sum(param.numel() for args in pages for param in args[1]) == 530_001
    states = [sum(one.nbytes for i in (3, 4, 6, 7) for one in args[i]) for args in pages]
    assert max(states) <= LEAST // 3
    assert len(states) > 3 * 8


def test_states_that_lie_side_by_side_are_one_copy(build, step, paged_here, monkeypatch):
    copied = []
    original = paging._copy
    monkeypatch.setattr(paging, "_copy", lambda pairs: copied.append(len(pairs)) or original(pairs))
    params = parameters(sizes=[100_000 + 10 * i for i in range(20)])
    optimizer = build("PagedAdamW8bit", params, paged_budget=HOST)

    step(optimizer, params)

    assert copied == [3, 3]  # in and out: 20 parameters of 0.2 MB in slabs of 1, 1 and 2 MiB


def test_only_large_states_are_paged(build, step, paged_here):
    params = parameters(sizes=(99_999, 100_000))
    optimizer = build("PagedAdamW8bit", params, paged_budget=HOST)

    step(optimizer, params)

    assert [optimizer._pager.holds(optimizer.state[param], param.device) for param in params] == [False, True]


def test_first_states_stay_on_the_device_as_far_as_the_budget_goes(build, step, paged_here):
    ours, theirs = (parameters(sizes=(100_000, 200_000, 100_000, 100_000)) for _ in "ab")
    size = 2 * (100_000 + 4 * 391)
    paged = build("PagedAdamW8bit", ours, paged_budget=HOST + 2 * size)
    plain = build("AdamW8bit", theirs)

    for seed in range(2):
        step(paged, ours, seed)
        step(plain, theirs, seed)

    def held(optimizer, params):
        return [optimizer._pager.holds(optimizer.state[param], param.device) for param in params]

    assert held(paged, ours) == [False, True, False, True]
    assert equal(paged, plain)
    other = copy.deepcopy(paged)
    other.load_state_dict(paged.state_dict())
    assert held(other, other.param_groups[0]["params"]) == [False, True, False, True]


def test_paged_optimizer_whose_states_all_stay_keeps_a_plan(build, step, paged_here):
    ours, theirs = parameters(), parameters()
    paged, plain = build("PagedAdamW8bit", ours), build("AdamW8bit", theirs)

    for seed in range(3):
        step(paged, ours, seed)
        step(plain, theirs, seed)

    assert LateLanes.pinned == 0
    assert paged._plan is not None
    assert equal(paged, plain)


def test_memory_is_unpinned_with_the_last_state(build, step, paged_here):
    params = parameters()
    for _ in range(10):
        optimizer = build("PagedAdamW8bit", params, paged_budget=HOST)
        step(optimizer, params)
    state = optimizer.state[params[0]]["state1"]
    del optimizer
    gc.collect()
    assert LateLanes.pinned == 1
    assert state.sum() > 0

    del state
    gc.collect()
    assert LateLanes.pinned == 0


def test_large_states_do_not_share_slabs():
    made = []

    def allocate(size):
        made.append(size)
        return slabs.Pages(size, LateLanes.pin)

    pool = slabs.Slabs(allocate)
    for n in (1000, 1000, slabs.LARGEST // 8 + 1, 1000):
        pool.adopt({"state1": torch.ones(n, dtype=torch.uint8), "absmax1": torch.ones(3)})

    assert made == [slabs.SMALLEST, slabs.LARGEST // 8 + 512]


def test_failure_in_a_piece_leaves_nothing_under_way(build, step, paged_here, stub_backend):
    def failing(*args):
        raise RuntimeError("the device is gone")

    stub_backend("acme", kernels=[halfbyte.Kernel("update_8bit", failing)])
    (param,) = parameters(sizes=(300_000,))
    optimizer = build("PagedAdamW8bit", [param], paged_budget=LEAST)

    with pytest.raises(RuntimeError, match="the device is gone"):
        step(optimizer, [param])

    assert optimizer.state[param]["step"] == 0


# -- copies and checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copy_of_a_paged_optimizer_is_paged_anew(build, step, paged_here, through):
    params = parameters()
    optimizer = build("PagedAdamW8bit", params, paged_budget=LEAST)
    step(optimizer, params)

    other = through(optimizer)
    copies = other.param_groups[0]["params"]
    step(optimizer, params, 1)
    step(other, copies, 1)

    assert equal(optimizer, other)
    assert other._pager.holds(other.state[copies[0]], torch.device("cpu"))
    assert not other._pager.holds(optimizer.state[params[0]], torch.device("cpu"))


@pytest.mark.parametrize(("saved", "loaded"), [("Paged", "Paged"), ("Paged", ""), ("", "Paged")])
@pytest.mark.parametrize("now", [True, False])
def test_state_dict_moves_between_paged_and_unpaged(build, step, paged_here, tmp_path, saved, loaded, now):
    ours, theirs = parameters(), parameters()
    first, second = (
        build(f"{name}AdamW8bit", params, paged_budget=HOST) for name, params in ((saved, ours), (loaded, theirs))
    )
    step(first, ours)
    for param, one in zip(theirs, ours, strict=True):
        param.data.copy_(one)

    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), move_to_device=now)
    step(first, ours, 1)
    step(second, theirs, 1)

    assert equal(first, second)
    assert second._pager.holds(second.state[theirs[0]], torch.device("cpu")) == bool(loaded)


def test_saved_state_is_no_larger_than_an_unpaged_one(build, step, paged_here, tmp_path):
    sizes = {}
    for name in ("PagedAdamW8bit", "AdamW8bit"):
        (param,) = parameters(sizes=(300_000,))
        optimizer = build(name, [param], paged_budget=HOST)
        step(optimizer, [param])
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        sizes[name] = (tmp_path / "state.pt").stat().st_size

    assert sizes["PagedAdamW8bit"] == pytest.approx(sizes["AdamW8bit"], abs=200)


def test_loading_gives_back_the_memory_of_the_states_before(build, step, paged_here):
    params = parameters()
    optimizer = build("PagedAdamW8bit", params, paged_budget=HOST)
    step(optimizer, params)
    pinned = LateLanes.pinned

    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()

    assert LateLanes.pinned == pinned


def test_step_in_backward_pages(build, paged_here):
    ours, theirs = parameters(), parameters()
    paged, plain = build("PagedAdamW8bit", ours, paged_budget=LEAST), build("AdamW8bit", theirs)

    with optim.step_in_backward(paged):
        sum(param.square().sum() for param in ours).backward()
    for param in theirs:
        param.grad = 2 * param.detach()
    plain.step()

    assert equal(paged, plain)


# -- what is refused -----------------------------------------------------------------------------------------


def test_capturable_and_paging_exclude_each_other(build, randn):
    with pytest.raises(InputError, match="capturable and paging exclude each other"):
        build("PagedAdamW", [randn(3)], capturable=True)
    with pytest.raises(InputError, match="capturable and paging exclude each other"):
        build("Lion", [randn(3)], is_paged=True, capturable=True)


def test_budget_too_small_for_a_piece_is_refused(build, randn):
    with pytest.raises(InputError, match="paged_budget must be at least 65,536 bytes; got 65,535"):
        build("PagedAdamW", [randn(3)], paged_budget=LEAST - 1)


def test_kind_of_memory_must_be_known(build, randn):
    with pytest.raises(InputError, match="paged_memory must be pinned or managed; got 'unified'"):
        build("PagedAdamW", [randn(3)], paged_memory="unified")


def test_managed_memory_needs_the_native_module(build, paged_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "halfbyte_cuda._C", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    (param,) = parameters(sizes=(100_000,))
    optimizer = build("PagedAdamW8bit", [param], paged_memory="managed")
    param.grad = torch.ones_like(param)
    before = param.detach().clone()

    with pytest.raises(InputError, match=r'paged_memory="managed" needs halfbyte_cuda\._C, which cannot be imported'):
        optimizer.step()

    assert torch.equal(param, before)


def test_managed_memory_stays_below_what_the_device_has_free(build, paged_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    (param,) = parameters(sizes=(100_000,))
    optimizer = build("PagedAdamW8bit", [param], paged_memory="managed")
    param.grad = torch.ones_like(param)

    with pytest.raises(InputError, match="must fit cpu: 1,048,576 bytes are needed, 1,000 are free"):
        optimizer.step()


def test_trust_factor_of_a_paged_parameter_is_refused(build, paged_here):
    (param,) = parameters(sizes=(100_000,))
    optimizer = build("PagedAdamW8bit", [param], paged_budget=HOST)
    optim.GlobalOptimManager.get_instance().override_config(param, "max_unorm", 1.0)
    param.grad = torch.ones_like(param)
    before = param.detach().clone()

    with pytest.raises(InputError, match="is paged, and stepped in parts: max_unorm needs the norm"):
        optimizer.step()

    assert torch.equal(param, before)


@pytest.mark.parametrize("name", ["PagedAdam8bit", "PagedAdamW", "PagedAdEMAMix32bit", "PagedLion8bit"])
def test_paged_optimizer_on_the_cpu_warns_once_and_has_ordinary_states(build, randn, step, name):
    params = [randn(400, 300), randn(70, 60)]
    optimizer = build(name, params)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(optimizer, params)
        step(optimizer, params)

    assert [(one.category, "paging to the host does nothing" in str(one.message)) for one in caught] == [
        (HalfbyteWarning, True)
    ]
    assert not optimizer._pager.holds(optimizer.state[params[0]], params[0].device)
