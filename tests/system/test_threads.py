"""Threads that race on first use, and choices that stay in their thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import functional
from halfbyte.derived import derived
from halfbyte.nn import LinearNF4

RACE = """
    import threading
    import torch
    import halfbyte
    from halfbyte._runtime import dispatcher

    decisions, results, errors = [], [], []

    class Watcher:
        @halfbyte.hookimpl
        def halfbyte_resolved(self, decision):
            decisions.append(decision)

    dispatcher.plugins.manager.register(Watcher())
    x = torch.linspace(-1, 1, 4096)
    start = threading.Barrier(16)

    def first_use():
        start.wait()
        try:
            packed, state = halfbyte.functional.quantize_4bit(x, nested=True)
            results.append(halfbyte.functional.dequantize_4bit(packed, state))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=first_use) for _ in range(16)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors, errors
    assert len(results) == 16
    assert all(torch.equal(one, results[0]) for one in results)
    ops = sorted(decision.op for decision in decisions)
    assert ops == ["dequantize_4bit", "quantize_4bit", "quantize_8bit"], ops
"""


def test_racing_on_the_first_use_makes_one_plan_and_announces_it_once(python: Callable[..., Any]) -> None:
    python(RACE)


def test_racing_on_the_first_use_of_the_last_registered_backend(stub_backend: Callable[..., Any]) -> None:
    """Kernels are loaded once, however many threads want them."""
    loads = []
    op = halfbyte._runtime.dispatcher.plugins.ops["matmul_int8"]

    def kernels() -> list[halfbyte.Kernel]:
        loads.append(threading.get_ident())
        threading.Event().wait(0.05)
        return [halfbyte.Kernel(op.name, op.reference)]

    stub_backend("slow", kernels=kernels)
    a = torch.ones(2, 3, dtype=torch.int8)
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda _: torch.ops.halfbyte.matmul_int8(a, a), range(16)))
    assert len(loads) == 1
    assert all(torch.equal(one, results[0]) for one in results)


def test_use_backend_stays_in_its_thread(stub_backend: Callable[..., Any]) -> None:
    stubs = {name: stub_backend(name, priority=-1) for name in ("one", "two")}
    x = torch.randn(2, 64)
    layer = LinearNF4(64, 8).to("cpu")
    meet = threading.Barrier(3)
    picked = {}

    def work(name: str | None) -> None:
        with halfbyte.use_backend(name or "auto"):
            meet.wait()  # all three choices hold now
            for _ in range(20):
                layer(x)
            picked[name] = halfbyte.active()["cpu"]
            meet.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert picked["one"] == "one"
    assert picked["two"] == "two"
    assert picked[None] == halfbyte.active()["cpu"]
    assert {name: stub.calls.count("linear_4bit") for name, stub in stubs.items()} == {"one": 20, "two": 20}


def test_derived_layouts_are_built_once_while_others_are_dropped() -> None:
    weights = [torch.randn(8, 8) for _ in range(4)]
    built: list[int] = []

    def use(index: int) -> bool:
        weight = weights[index % 4]
        if index % 7 == 0:
            halfbyte.drop_derived(torch.randn(3))
        layout = derived(weight, "transposed", lambda: (built.append(index % 4), weight.T.contiguous())[1])
        return torch.equal(layout, weight.T)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(use, range(400)))
    assert sorted(built) == [0, 1, 2, 3]


def test_one_layer_serves_many_threads(backend: str) -> None:
    layer = LinearNF4(64, 32, compress_statistics=True).to("cpu")
    inputs = [torch.randn(3, 64) for _ in range(32)]
    expected = [layer(x) for x in inputs]

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with halfbyte.use_backend(backend if backend == "reference" else f"{backend},reference"):
            own = x.clone().requires_grad_()
            y = layer(own)
            (grad,) = torch.autograd.grad(y.sum(), own)
        return y.detach(), grad

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(step, inputs))
    for x, (y, grad), one in zip(inputs, found, expected, strict=True):
        torch.testing.assert_close(y, one.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(grad, step(x)[1])


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_number_of_threads_changes_nothing(backend: str, rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 256), torch.randn(300, 256)

    def everything() -> list[torch.Tensor]:
        packed, state = functional.quantize_4bit(weight, nested=True)
        codes, state8 = functional.quantize_8bit(weight)
        q, absmax, columns = functional.quantize_int8_rows(weight, threshold=2.5)
        q0, absmax0, _ = functional.quantize_int8_rows(weight)
        return [
            packed,
            state.absmax,
            functional.dequantize_4bit(packed, state),
            functional.dequantize_8bit(codes, state8),
            q,
            absmax,
            columns,
            torch.ops.halfbyte.matmul_int8(q0, q0),
            *_products(x, packed, state, q0, absmax0),
        ]

    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(everything())
    finally:
        torch.set_num_threads(before)
    first, *others = found
    for other in others:
        for index, (one, two) in enumerate(zip(first, other, strict=True)):
            if backend == "reference" and index >= 8:  # torch's own matrix product splits its sums
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
            else:
                assert torch.equal(one, two), index


def _products(
    x: torch.Tensor, packed: torch.Tensor, state: halfbyte.QuantState, q: torch.Tensor, absmax: torch.Tensor
) -> list[torch.Tensor]:
    own = x.clone().requires_grad_()
    y = functional.linear_4bit(own, packed, state)
    (grad,) = torch.autograd.grad(y.sum(), own)
    return [y.detach(), grad, functional.linear_int8(x, q, absmax), functional.linear_int8(x, q, absmax, threshold=2.0)]
