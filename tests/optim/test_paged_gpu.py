"""Paged states on a GPU: the same bits, within the budget, whatever else runs on the device."""

import copy
import gc
from pathlib import Path

import pytest
import torch

from halfbyte import InputError, optim
from halfbyte.optim import managed, paging

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA or ROCm device"),
    pytest.mark.filterwarnings("ignore:update_:halfbyte.HalfbytePerformanceWarning"),
]

PAIRS = [("PagedAdamW8bit", "AdamW8bit"), ("PagedAdamW", "AdamW"), ("PagedLion8bit", "Lion8bit")]
PAIRS += [("PagedAdEMAMix8bit", "AdEMAMix8bit"), ("PagedAdam32bit", "Adam32bit")]
SIZES = (100_000, 4096, 1_300_001, 200_704, 5_000_000)
BUDGET = 3 * 2**20


def parameters(dtype=torch.bfloat16, sizes=SIZES):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator, device="cuda").to(dtype)) for n in sizes]


def give_gradients(params, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, device="cuda").to(param.dtype)


def step(optimizer, params, seed=0):
    give_gradients(params, seed)
    optimizer.step()


def assert_equal(ours, theirs):
    """Parameters and states of two optimizers have the same bits."""
    for one, other in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)
        a, b = ours.state[one], theirs.state[other]
        for key in a:
            same = torch.equal(a[key].cpu(), b[key].cpu()) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
            assert same, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("budget", [BUDGET, paging.PASSING])
@pytest.mark.parametrize(("name", "plain"), PAIRS)
def test_paged_steps_give_the_bits_of_unpaged_ones(name, plain, budget, dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    paged, reference = getattr(optim, name)(ours, paged_budget=budget), getattr(optim, plain)(theirs)

    for seed in range(3):
        step(paged, ours, seed)
        step(reference, theirs, seed)

    assert_equal(paged, reference)
    assert paged.state[ours[0]]["state1"].device.type == "cpu"
    assert paged.state[ours[0]]["state1"].is_pinned()
    assert paged.state[ours[1]]["state1"].is_cuda


def test_paged_steps_draw_the_bits_of_stochastic_rounding():
    ours, theirs = parameters(), parameters()
    paged = optim.PagedAdamW8bit(ours, paged_budget=BUDGET, stochastic_rounding=True)
    reference = optim.AdamW8bit(theirs, stochastic_rounding=True)

    for seed in range(2):
        step(paged, ours, seed)
        step(reference, theirs, seed)

    assert_equal(paged, reference)


def test_step_waits_for_gradients_that_are_still_being_computed():
    ours, theirs = parameters(), parameters()
    paged, reference = optim.PagedAdamW8bit(ours, paged_budget=BUDGET), optim.AdamW8bit(theirs)
    step(paged, ours)
    step(reference, theirs)

    for seed in (1, 2):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        for param in ours:
            late = param.grad.clone()
            param.grad.zero_()
            torch.cuda._sleep(20_000_000)  # about 10 ms
            param.grad.copy_(late)
        paged.step()
        reference.step()

    assert_equal(paged, reference)


def test_step_in_another_stream_gives_the_same_bits():
    ours, theirs = parameters(), parameters()
    paged, reference = optim.PagedAdamW8bit(ours, paged_budget=BUDGET), optim.AdamW8bit(theirs)
    stream = torch.cuda.Stream()

    for seed in range(3):
        give_gradients(ours, seed)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            paged.step()
        torch.cuda.current_stream().wait_stream(stream)
        step(reference, theirs, seed)

    assert_equal(paged, reference)


def test_device_memory_stays_under_the_budget():
    params = parameters(sizes=(40_000_000,))
    optimizer = optim.PagedAdamW8bit(params, paged_budget=12 * 2**20)
    give_gradients(params)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    optimizer.step()

    assert torch.cuda.max_memory_allocated() - before <= 12 * 2**20 + 2**20  # and a table of what is updated


def test_states_that_the_budget_has_room_for_stay_on_the_device():
    ours, theirs = parameters(), parameters()
    paged, reference = optim.PagedAdamW8bit(ours), optim.AdamW8bit(theirs)

    for seed in range(2):
        step(paged, ours, seed)
        step(reference, theirs, seed)

    assert all(state["state1"].is_cuda for state in paged.state.values())
    assert_equal(paged, reference)


def resident():
    """Bytes of this process in memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the process's memory is not in /proc")
def test_ten_optimizers_leave_memory_where_it_was():
    params = parameters(sizes=(40_000_000, 200_000, 200_000))  # states of 81 MB

    def use():
        step(optim.PagedAdamW8bit(params, paged_budget=12 * 2**20), params)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), resident()

    device, host = use()
    for _ in range(10):
        last = use()

    assert last[0] == device
    assert last[1] < host + 40 * 2**20


def test_state_dict_loads_into_paged_and_unpaged_optimizers():
    ours = parameters()
    first = optim.PagedAdamW8bit(ours, paged_budget=BUDGET)
    step(first, ours)
    saved, models = copy.deepcopy(first.state_dict()), []
    for name in ("PagedAdamW8bit", "AdamW8bit"):
        params = [torch.nn.Parameter(param.detach().clone()) for param in ours]
        models.append((getattr(optim, name)(params, paged_budget=BUDGET), params))
        models[-1][0].load_state_dict(saved)

    step(first, ours, 1)
    for optimizer, params in models:
        step(optimizer, params, 1)
        assert_equal(first, optimizer)

    assert [one.state[params[0]]["state1"].is_cuda for one, params in models] == [False, True]


def test_step_in_backward_pages():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    paged, reference = optim.PagedAdamW8bit(ours, paged_budget=BUDGET), optim.AdamW8bit(theirs)

    with optim.step_in_backward(paged):
        sum(param.square().sum() for param in ours).backward()
    for param in theirs:
        param.grad = 2 * param.detach()
    reference.step()

    assert_equal(paged, reference)


# -- managed memory ------------------------------------------------------------------------------------------


@pytest.fixture
def native():
    """Skips where the native module, which allocates managed memory, is not built."""
    try:
        return managed.module()
    except InputError as error:
        pytest.skip(str(error))


def test_steps_in_managed_memory_give_the_same_bits(native):
    ours, theirs = parameters(), parameters()
    paged, reference = optim.PagedAdamW8bit(ours, paged_memory="managed"), optim.AdamW8bit(theirs)

    for seed in range(3):
        step(paged, ours, seed)
        step(reference, theirs, seed)

    assert_equal(paged, reference)
    assert paged._pager.holds(paged.state[ours[0]], ours[0].device)
    assert paged.state[ours[0]]["state1"].is_cuda


def test_managed_memory_is_freed_with_its_optimizer(native, monkeypatch):
    alive = {}

    class Counted:
        """The native module, telling what is allocated: the device's free memory is that of other processes, too."""

        def __getattr__(self, name):
            return getattr(native, name)

        def managed_alloc(self, size, device):
            address = native.managed_alloc(size, device)
            alive[address] = size
            return address

        def managed_free(self, address, device):
            native.managed_free(address, device)
            del alive[address]

    monkeypatch.setattr(managed, "module", Counted)
    params = parameters(sizes=(100_000_000,))

    for _ in range(10):
        optimizer = optim.PagedAdamW8bit(params, paged_memory="managed")
        step(optimizer, params)
        assert sum(alive.values()) >= 200_000_000
        del optimizer
        gc.collect()
        assert not alive


def test_more_managed_memory_than_the_device_has_free_is_refused(native):
    with pytest.raises(InputError, match=r"managed memory of paged states must fit cuda:0: .* are free"):
        managed.Managed(torch.cuda.mem_get_info()[0] + 2**30, torch.device("cuda", 0))
