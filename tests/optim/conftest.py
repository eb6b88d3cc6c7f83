"""Optimizers by class name, the calls of the update ops, and bitsandbytes in a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte import calling, optim


class Oracle:
    """`oracle.run("Adam8bit", {}, params, grads)`: the answer of bnb_optim.py.

    hidden  environment variables that keep it from the GPUs
    """

    def __init__(self, hidden: dict[str, str]) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "BNB_"))}
        self.process: Any = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bnb_optim.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**clean, **hidden},
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # hypothesis and pytest look for hooks of their own
            raise AttributeError(name)

        def ask(*args: Any, **kwargs: Any) -> Any:
            pickle.dump((name, args, kwargs), self.process.stdin)
            self.process.stdin.flush()
            good, answer = pickle.load(self.process.stdout)
            if not good:
                raise RuntimeError(f"bitsandbytes raised in {name}:\n{answer}")
            return answer

        return ask

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def oracle(real_bitsandbytes: None) -> Iterator[Oracle]:
    with closing(Oracle({"CUDA_VISIBLE_DEVICES": ""})) as oracle:
        yield oracle


@pytest.fixture(scope="session")
def gpu_oracle(real_bitsandbytes: None) -> Iterator[Oracle]:
    """The oracle with the GPUs of this machine."""
    with closing(Oracle({})) as oracle:
        yield oracle


@pytest.fixture(autouse=True)
def fresh_manager() -> Iterator[None]:
    """No override outlives its test."""
    yield
    optim.GlobalOptimManager.get_instance().initialize()


@pytest.fixture(scope="session")
def build() -> Callable[..., optim.Optimizer]:
    """`build("SGD8bit", params)`: an optimizer with the arguments that its class requires, and an lr of 0.01."""

    def make(name: str, params: Any, **arguments: Any) -> optim.Optimizer:
        required = {"momentum": 0.9} if "SGD" in name or "LARS" in name else {}
        made: optim.Optimizer = getattr(optim, name)(params, **{"lr": 1e-2, **required, **arguments})
        return made

    return make


@pytest.fixture(scope="session")
def step() -> Callable[..., None]:
    """`step(optimizer, params, seed)`: one step with random gradients."""

    def run(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()

    return run


@pytest.fixture(scope="session")
def randn() -> Callable[..., torch.nn.Parameter]:
    """`randn(3, 4, seed=1)`: a random parameter."""

    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Name and arguments of each update op that is called."""
    seen: list[tuple[str, tuple[Any, ...]]] = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen.append((name, args))
            return original(*args)

        return call

    for name in ("update_32bit", "update_8bit"):
        monkeypatch.setitem(calling.planned, name, watched(name, calling.planned[name]))
    return seen
