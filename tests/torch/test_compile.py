"""torch.compile: no graph breaks, the same results, and a compiled graph that follows use_backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import halfbyte
from halfbyte.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt, LinearNF4


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def nf4(nested: bool, bias: bool, **options: object) -> Linear4bit:
    torch.manual_seed(1)
    return LinearNF4(64, 24, bias, compress_statistics=nested, **options).to("cpu")


def int8(threshold: float, floats: bool) -> Linear8bitLt:
    torch.manual_seed(2)
    return Linear8bitLt(64, 24, has_fp16_weights=floats, threshold=threshold).to("cpu")


def table(width: int) -> Embedding4bit:
    torch.manual_seed(3)
    return Embedding4bit(10, width, quant_type="nf4").to("cpu")


LINEAR: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: nf4(nested=False, bias=False),
    "nf4 nested, bias": lambda: nf4(nested=True, bias=True),
    "nf4 as bfloat16, computing in bfloat16": lambda: nf4(
        nested=False, bias=True, quant_storage=torch.bfloat16, compute_dtype=torch.bfloat16
    ),
    "int8": lambda: int8(0.0, floats=False),
    "int8 with outliers": lambda: int8(6.0, floats=False),
    "int8 over floats": lambda: int8(0.0, floats=True),
    "int8 over floats with outliers": lambda: int8(6.0, floats=True),
}
TABLES: dict[str, Callable[[], nn.Module]] = {
    "nf4 rows": lambda: table(64),
    "nf4 whole": lambda: table(40),
    "int8": lambda: Embedding8bit(10, 40).to("cpu"),
}


def _gradients(module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    own = x.clone().requires_grad_()
    y = call(own)
    y.square().sum().backward()
    trained = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    return [y.detach(), own.grad, *trained]


def _close(compiled: list[torch.Tensor], eager: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert len(compiled) == len(eager) >= 2
    for one, other in zip(compiled, eager, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_layers_compile_whole_forward_and_backward(kind: str) -> None:
    layer = LINEAR[kind]()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(3, 64)
    x[:, 5] = 9.0  # an outlier
    tolerance = 1e-2 if kind.endswith("in bfloat16") else 1e-5  # inductor sums the bias's gradient in float32
    _close(_gradients(layer, compiled, x), _gradients(layer, layer, x), tolerance)


@pytest.mark.parametrize("kind", TABLES)
def test_embeddings_compile_whole(kind: str) -> None:
    layer = TABLES[kind]()
    compiled = torch.compile(layer, fullgraph=True)
    indices = torch.tensor([[0, 9, 3]])
    torch.testing.assert_close(compiled(indices), layer(indices), rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["nf4 nested, bias", "int8 with outliers", "int8 over floats"])
def test_a_dynamic_batch_compiles_once(kind: str, frozen: bool) -> None:
    model = nn.Sequential(LINEAR[kind](), nn.ReLU())
    if frozen:
        halfbyte.freeze_(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (3, 5, 17):
        x = torch.randn(rows, 64)
        torch._dynamo.mark_dynamic(x, 0)
        _close(_forward_and_gradient(compiled, x), _forward_and_gradient(model, x))
    assert counter.frame_count == 1


def _forward_and_gradient(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    x.requires_grad_()
    y = model(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    return [y.detach(), grad]


@pytest.mark.parametrize("kind", ["nf4 rows", "nf4 whole", "int8"])
def test_embeddings_compile_once_for_a_dynamic_count(kind: str) -> None:
    layer = TABLES[kind]()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for count in (3, 5, 8):
        indices = torch.arange(count)
        torch._dynamo.mark_dynamic(indices, 0)
        assert torch.equal(compiled(indices), layer(indices))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamo_backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_follows_use_backend_without_recompiling(dynamo_backend: str, counting: Any) -> None:
    layer = nf4(nested=True, bias=True)
    counter = CompileCounterWithBackend(dynamo_backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(3, 64)

    def step() -> torch.Tensor:
        own = x.clone().requires_grad_()
        compiled(own).sum().backward()
        assert own.grad is not None
        return own.grad

    first = step()
    assert not counting.calls
    with halfbyte.use_backend("counting"):
        torch.testing.assert_close(step(), first)
    assert Counter(counting.calls) == {"linear_4bit": 1, "linear_4bit_backward": 1}
    step()
    assert Counter(counting.calls) == {"linear_4bit": 1, "linear_4bit_backward": 1}
    halfbyte.set_backend("counting")
    try:
        step()
    finally:
        halfbyte.set_backend(None)
    assert Counter(counting.calls) == {"linear_4bit": 2, "linear_4bit_backward": 2}
    assert counter.frame_count == 1


def test_a_compiled_int8_layer_follows_use_backend(counting: Any) -> None:
    layer = int8(6.0, floats=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    compiled(torch.randn(2, 64))
    with halfbyte.use_backend("counting"):
        compiled(torch.randn(2, 64))
    assert counting.calls.count("linear_int8") == 1
    assert counter.frame_count == 1


def test_quantizing_compiles_too() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def round_trip(x: torch.Tensor) -> torch.Tensor:
        packed, state = halfbyte.functional.quantize_4bit(x, nested=True)
        codes, state8 = halfbyte.functional.quantize_8bit(x)
        q, absmax, _ = halfbyte.functional.quantize_int8_rows(x)
        return (
            halfbyte.functional.dequantize_4bit(packed, state)
            + halfbyte.functional.dequantize_8bit(codes, state8)
            + halfbyte.functional.dequantize_int8(q, absmax)
        )

    x = torch.randn(4, 64)
    torch.testing.assert_close(round_trip(x), round_trip.__wrapped__(x), rtol=0, atol=0)


def test_a_whole_model_trains_compiled_under_autocast() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    halfbyte.quantize_(model, "nf4", filter=lambda name, _: name == "0")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 64)

    def gradients(call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        y.float().square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    eager = gradients(model)
    for one, other in zip(gradients(compiled), eager, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
