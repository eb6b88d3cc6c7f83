"""The current stream is used, and calls can be captured into a graph.  Devices without streams skip this."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from halfbyte.testing import cases, compare


@pytest.fixture(autouse=True)
def on_its_device(streamed: cases.Case) -> Iterator[None]:
    with torch.cuda.device(streamed.facts.device):
        yield


def emptied(args: tuple[object, ...]) -> tuple[object, ...]:
    """The same arguments with every tensor zeroed."""
    return tuple(pytree.tree_map_only(Tensor, torch.zeros_like, list(args)))


def fill(args: tuple[object, ...], values: tuple[object, ...]) -> None:
    """Write the values into the arguments, into those in lists too."""
    for arg, value in zip(pytree.tree_leaves(list(args)), pytree.tree_leaves(list(values))):
        if isinstance(arg, Tensor) and isinstance(value, Tensor):
            arg.copy_(value)


def test_kernel_runs_on_the_current_stream(streamed: cases.Case) -> None:
    """The inputs are written late on a side stream: a kernel on another stream reads them too early."""
    values = streamed.args()
    late = emptied(values)
    cases.results(streamed.op, streamed.kernel.function, emptied(values))  # compiled and loaded before the race
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(40_000_000)  # cycles: about 20 ms
        fill(late, values)
        found = cases.results(streamed.op, streamed.kernel.function, late)
    side.synchronize()

    wrong = compare.disagreement(streamed.op, found, streamed.expected())
    assert not wrong, f"{streamed.title}, on a side stream: {wrong}"


def test_call_can_be_captured_in_a_graph(streamed: cases.Case) -> None:
    values = streamed.args()
    args = emptied(values)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            cases.results(streamed.op, streamed.kernel.function, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cases.results(streamed.op, streamed.kernel.function, args)
    fill(args, values)
    graph.replay()
    torch.cuda.synchronize()

    wrong = compare.disagreement(streamed.op, found, streamed.expected())
    assert not wrong, f"{streamed.title}, replayed from a graph: {wrong}"
