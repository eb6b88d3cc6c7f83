"""What each of two processes runs in test_distributed.py: checks by name, each answered by None or a traceback.

Run as: ranks.py <rank> <rendezvous file> <answers file>
"""

from __future__ import annotations

import copy
import datetime
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from halfbyte import FormatError, InputError
from halfbyte.optim import LAMB, AdamW8bit, AdamW32bit, Lion8bit, Optimizer, PagedAdamW8bit, lanes

WORLD = 2
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def model(seed: int = 0) -> nn.Module:
    """The same in each process; 8-bit states for the large weights, rows that two do not divide for one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 160), nn.Tanh(), nn.Linear(160, 65), nn.Tanh(), nn.Linear(65, 3))


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))


def sharded(made: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in made:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    return made


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(made: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        made(batch(dist.get_rank(), step)).square().mean().backward()
        optimizer.step()


def train_alone(made: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """With the mean gradient of both ranks, in one process."""
    for step in steps:
        optimizer.zero_grad()
        loss = sum(made(batch(rank, step)).square().mean() for rank in range(WORLD)) / WORLD
        loss.backward()
        optimizer.step()


def compare_sharded(cls: type[Optimizer], tolerance: float, **own: float) -> None:
    plain, made = model(), sharded(model())
    start = [param.detach().clone() for param in plain.parameters()]
    alone, optimizer = cls(plain.parameters(), lr=1e-2, **own), cls(made.parameters(), lr=1e-2, **own)

    train_alone(plain, alone, range(4))
    train(made, optimizer, range(4))

    for param, state in optimizer.state.items():
        assert isinstance(param, DTensor)
        assert not isinstance(state["state1"], DTensor)
        assert state["state1"].shape == param.to_local().shape
    for one, other, before in zip(made.parameters(), plain.parameters(), start, strict=True):
        off = (full(one) - other).norm() / (other - before).norm()
        assert off < tolerance, off


@check
def fsdp_32bit_states_step_like_one_process() -> None:
    compare_sharded(AdamW32bit, 1e-3)


@check
def fsdp_8bit_states_step_like_one_process_within_noise() -> None:
    compare_sharded(AdamW8bit, 0.1)
    compare_sharded(Lion8bit, 0.3)


@check
def fsdp_fused_clip_takes_the_norm_over_all_shards() -> None:
    compare_sharded(AdamW32bit, 1e-3, fused_clip=1e-2, eps=1e-2)


@check
def fsdp_size_for_8bit_is_that_of_the_whole_parameter() -> None:
    made = sharded(nn.Sequential(nn.Linear(64, 64, bias=False)))
    optimizer = AdamW8bit(made.parameters())
    made(batch(0, 0)).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert (state["state1"].dtype, state["state1"].numel()) == (torch.uint8, 2048)


@check
def fsdp_resumes_with_the_same_bits_on_each_rank() -> None:
    made = sharded(model())
    optimizer = AdamW8bit(made.parameters(), lr=1e-2)
    train(made, optimizer, range(2))
    weights, saved = copy.deepcopy(made.state_dict()), copy.deepcopy(optimizer.state_dict())
    other = sharded(model(seed=1))
    other.load_state_dict(weights)
    resumed = AdamW8bit(other.parameters(), lr=1e-2)
    resumed.load_state_dict(saved)

    train(made, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))

    for one, two in zip(made.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.to_local(), two.to_local())


@check
def fsdp_state_of_a_shard_is_refused_by_a_whole_parameter() -> None:
    made = sharded(model())
    optimizer = AdamW8bit(made.parameters())
    train(made, optimizer, range(1))
    try:
        AdamW8bit(model().parameters()).load_state_dict(optimizer.state_dict())
    except FormatError:
        return
    raise AssertionError("a shard was taken for the whole")


@check
def fsdp_trust_factor_of_a_shard_is_refused() -> None:
    made = sharded(model())
    optimizer = LAMB(made.parameters())
    before = [param.to_local().clone() for param in made.parameters()]
    refused = ""
    try:
        train(made, optimizer, range(1))
    except InputError as error:
        refused = str(error)
    assert "max_unorm needs the norm of the whole parameter" in refused
    assert all(map(torch.equal, before, (param.to_local() for param in made.parameters())))


class Now:
    """Lanes that do everything at once, for parameters on the CPU."""

    def __init__(self, device: torch.device) -> None:
        pass

    def run(self, lane: int, work: Callable[[], None], after: object) -> None:
        work()

    def finish(self) -> None:
        pass

    @staticmethod
    def pin(address: int, size: int) -> Callable[[], None]:
        return lambda: None


@check
def fsdp_shards_are_paged_and_step_with_the_same_bits() -> None:
    lanes.LANES["cpu"] = Now
    try:
        made = []
        for cls in (AdamW8bit, PagedAdamW8bit):
            torch.manual_seed(0)
            one = sharded(nn.Sequential(nn.Linear(64, 4096), nn.Tanh(), nn.Linear(4096, 3)))
            optimizer = cls(one.parameters(), lr=1e-2, paged_budget=100_000)
            train(one, optimizer, range(3))
            made.append((one, optimizer))
    finally:
        del lanes.LANES["cpu"]
    for plain, paged in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
        assert torch.equal(plain.to_local(), paged.to_local())
    weight, optimizer = made[1][0][0].weight, made[1][1]
    assert weight.to_local().numel() == 131_072
    assert optimizer._pager.holds(optimizer.state[weight], torch.device("cpu"))


@check
def ddp_keeps_replicas_equal_and_steps_like_one_process() -> None:
    plain, made = model(), model()
    alone, optimizer = AdamW8bit(plain.parameters(), lr=1e-2), AdamW8bit(made.parameters(), lr=1e-2)

    train_alone(plain, alone, range(4))
    train(DistributedDataParallel(made), optimizer, range(4))

    for param, other in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-2, atol=1e-3)
        both = [torch.empty_like(param) for _ in range(WORLD)]
        dist.all_gather(both, param.detach())
        assert torch.equal(*both)


@check
def ddp_rounds_stochastically_alike_on_all_ranks() -> None:
    torch.manual_seed(dist.get_rank())  # whatever the ranks draw elsewhere
    made = model().to(torch.bfloat16)
    torch.manual_seed(dist.get_rank())
    optimizer = AdamW8bit(made.parameters(), lr=1e-4, stochastic_rounding=True)
    for step in range(3):
        for number, param in enumerate(made.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            param.grad = torch.randn(param.shape, generator=generator).to(torch.bfloat16)
        optimizer.step()
    for param in made.parameters():
        both = [torch.empty_like(param) for _ in range(WORLD)]
        dist.all_gather(both, param.detach())
        assert torch.equal(*both)


def main(rank: int, rendezvous: str, answers: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=30)  # of a collective whose partner failed
    found: dict[str, str | None] = {}
    for number, (name, function) in enumerate(CHECKS.items()):
        # A group each: a check that fails on one rank leaves the other one waiting in the group.
        dist.init_process_group("gloo", f"file://{rendezvous}.{number}", timeout, WORLD, rank)
        try:
            function()
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc()
        dist.destroy_process_group()
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
