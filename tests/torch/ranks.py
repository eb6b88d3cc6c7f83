"""What each of two processes runs in test_distributed.py: checks by name, each answered by None or a traceback.

Run as: ranks.py <rank> <rendezvous file> <answers file>
"""

from __future__ import annotations

import datetime
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import halfbyte
from halfbyte.nn import Linear4bit, Linear8bitLt

WORLD = 2
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def quantized(kind: str, n: int, k: int) -> nn.Module:
    if kind == "int8":
        return Linear8bitLt(k, n, has_fp16_weights=False, threshold=2.0).to("cpu")
    storage = torch.bfloat16 if kind == "4bit as bfloat16" else torch.uint8
    nested = kind == "4bit nested"
    return Linear4bit(k, n, quant_type="nf4", compress_statistics=nested, quant_storage=storage).to("cpu")


def model(kind: str, n: int = 48, k: int = 64, frozen: bool = False, seed: int = 0) -> nn.Module:
    """A quantized layer between two trainable ones; the same in each process."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(k, k), quantized(kind, n, k), nn.ReLU(), nn.Linear(n, 3))
    for parameter in made[1].parameters():
        parameter.requires_grad_(False)
    if frozen:
        halfbyte.freeze_(made)
    return made


def batch(rank: int) -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(rank))


def mean_gradients(made: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the mean of both ranks' losses, in one process."""
    loss = sum(made(batch(rank)).square().mean() for rank in range(WORLD)) / WORLD
    loss.backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def sharded(made: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in made:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    return made


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare_sharded(kind: str, n: int = 48, frozen: bool = False) -> None:
    rank = dist.get_rank()
    plain = model(kind, n, frozen=frozen)
    made = sharded(model(kind, n, frozen=frozen))
    assert isinstance(made[1], FSDPModule)
    assert isinstance(made[1].weight, DTensor)
    local = made[1].weight.to_local()
    assert local.numel() < plain[1].weight.numel(), "the weight is not sharded"

    x = batch(rank)
    for _ in range(2):  # the parameter is replaced at each pass
        assert torch.equal(made(x).detach(), plain(x).detach())
    assert torch.equal(made.eval()(x).detach(), plain(x).detach())
    made.train()

    made(x).square().mean().backward()
    expected = mean_gradients(plain)
    found = {name: full(p.grad) for name, p in made.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)

    saved = {name: full(tensor) for name, tensor in made.state_dict().items()}
    wanted = plain.state_dict()
    assert saved.keys() == wanted.keys(), saved.keys() ^ wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8)), name
    gathered = get_model_state_dict(made, options=StateDictOptions(full_state_dict=True))

    other = sharded(model(kind, n, frozen=frozen, seed=1))
    assert not torch.equal(other(x), plain(x))
    other.load_state_dict(made.state_dict())
    assert isinstance(other[1].weight, DTensor)
    assert torch.equal(other(x).detach(), plain(x).detach())
    if rank == 0:
        assert gathered.keys() == wanted.keys()
        assert torch.equal(gathered["1.weight"].view(torch.uint8), wanted["1.weight"].view(torch.uint8))
        fresh = model(kind, n, frozen=frozen)
        fresh.load_state_dict({name: tensor.clone() for name, tensor in saved.items()})
        assert torch.equal(fresh(x), plain(x))


@check
def fsdp_4bit() -> None:
    compare_sharded("4bit")


@check
def fsdp_4bit_nested_with_an_odd_number_of_rows() -> None:
    compare_sharded("4bit nested", n=47)


@check
def fsdp_4bit_as_bfloat16() -> None:
    compare_sharded("4bit as bfloat16")


@check
def fsdp_4bit_frozen() -> None:
    compare_sharded("4bit nested", frozen=True)


@check
def fsdp_int8() -> None:
    compare_sharded("int8")


@check
def fsdp_int8_with_an_odd_number_of_rows() -> None:
    compare_sharded("int8", n=47)


@check
def fsdp_int8_frozen() -> None:
    compare_sharded("int8", frozen=True)


@check
def fsdp_casts_leave_codes_alone() -> None:
    made = sharded(model("4bit as bfloat16"))
    before = full(made[1].weight).clone()
    made.to(torch.float16).to(torch.float32)
    assert made[1].weight.dtype == torch.bfloat16
    assert torch.equal(full(made[1].weight).view(torch.uint8), before.view(torch.uint8))
    made(batch(dist.get_rank()))


def compare_replicated(kind: str, frozen: bool) -> None:
    rank = dist.get_rank()
    expected = mean_gradients(model(kind, frozen=frozen))
    made = model(kind, frozen=frozen)
    replicated = DistributedDataParallel(made)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    weight = made[1].weight.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        replicated(batch(rank)).square().mean().backward()
        if step == 0:
            found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
        optimizer.step()
    assert torch.equal(made[1].weight, weight)
    others = [torch.empty_like(made[0].weight) for _ in range(WORLD)]
    dist.all_gather(others, made[0].weight.detach())
    assert torch.equal(*others)


@check
def ddp_4bit() -> None:
    compare_replicated("4bit nested", frozen=False)


@check
def ddp_4bit_frozen() -> None:
    compare_replicated("4bit nested", frozen=True)


@check
def ddp_int8() -> None:
    compare_replicated("int8", frozen=False)


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
