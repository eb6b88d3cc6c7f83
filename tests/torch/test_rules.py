"""How layers and ops live with torch's modes, transforms, autograd and checkpointing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import halfbyte
from halfbyte import formats, functional
from halfbyte.nn import Embedding4bit, Embedding8bit, Int8Params, Linear8bitLt, LinearNF4, Params4bit

CPU = torch.device("cpu")


def nf4(nested: bool = False) -> LinearNF4:
    torch.manual_seed(1)
    return LinearNF4(64, 24, compress_statistics=nested).to("cpu")


def int8(floats: bool = False) -> Linear8bitLt:
    torch.manual_seed(2)
    return Linear8bitLt(64, 24, has_fp16_weights=floats, threshold=2.0).to("cpu")


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": nf4,
    "nf4 nested": lambda: nf4(nested=True),
    "int8": int8,
    "int8 over floats": lambda: int8(floats=True),
}


@pytest.fixture
def _no_tables() -> Iterator[None]:
    formats._build.cache_clear()
    yield
    formats._build.cache_clear()


# -- torch.func ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_vmap_over_a_layer_is_refused_in_a_sentence(kind: str) -> None:
    with pytest.raises(halfbyte.InputError, match=r"cannot run inside torch\.func\.vmap"):
        torch.func.vmap(LAYERS[kind]())(torch.randn(4, 64))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.ops.halfbyte.quantize_4bit(x, "nf4", 64)[0],
        lambda x: torch.ops.halfbyte.quantize_int8_rows(x, 0.0)[0],
        lambda x: functional.quantize_8bit(x)[0],
        lambda x: functional.quantize_4bit(x)[0],
    ],
)
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_transforms_of_an_op_are_refused_in_a_sentence(transform: Callable, call: Callable) -> None:
    with pytest.raises(halfbyte.InputError, match=r"cannot run inside torch\.func\.vmap"):
        transform(call)(torch.randn(4, 64))


def test_an_op_on_tensors_that_a_transform_leaves_alone_runs() -> None:
    layer, x, steps = nf4(), torch.randn(2, 64, requires_grad=True), torch.randn(3, 24)
    y = torch.func.vmap(lambda step: layer(x) + step)(steps)
    torch.testing.assert_close(y, layer(x) + steps[:, None], rtol=0, atol=0)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_functional_call_replaces_the_bias(kind: str, frozen: bool) -> None:
    layer, x = LAYERS[kind](), torch.randn(2, 64)
    if frozen:
        halfbyte.freeze_(layer)
    bias = torch.randn(24, requires_grad=True)
    y = torch.func.functional_call(layer, {"bias": bias}, (x,))
    torch.testing.assert_close(y, layer(x) - layer.bias + bias, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert bias.grad is not None


def test_functional_call_replaces_frozen_statistics() -> None:
    layer, x = nf4(), torch.randn(2, 64)
    layer.bias = None
    halfbyte.freeze_(layer)
    doubled = torch.func.functional_call(layer, {"weight_absmax": 2 * layer.weight_absmax}, (x,))
    assert torch.equal(doubled, 2 * layer(x))


@pytest.mark.usefixtures("_no_tables")
def test_tables_first_made_inside_a_transform_are_plain_afterwards() -> None:
    torch.func.grad(lambda x: (formats.levels("nf4", CPU) * x).sum())(torch.randn(16))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(formats.levels("nf4", CPU))


# -- modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_deterministic_mode_raises_nothing_and_repeats(kind: str) -> None:
    def gradients() -> list[torch.Tensor]:
        layer = LAYERS[kind]()
        x = torch.linspace(-3, 3, 128).reshape(2, 64).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [gradients() for _ in range(3)]
        table = Embedding4bit(10, 64).to("cpu")
        assert torch.equal(table(torch.tensor([3])), table(torch.tensor([3])))
        Embedding8bit(10, 64).to("cpu")(torch.tensor([3]))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.usefixtures("_no_tables")
def test_fake_tensors_leave_real_tables_behind() -> None:
    with FakeTensorMode():
        packed, state = functional.quantize_4bit(torch.randn(64, 64), nested=True)
        functional.dequantize_4bit(packed, state)
        codes, _ = functional.quantize_8bit(torch.randn(64))
    assert isinstance(packed, FakeTensor)
    assert isinstance(codes, FakeTensor)
    for table in (formats.levels("nf4", CPU), formats.codebook("dynamic", CPU)):
        assert type(table) is torch.Tensor
        assert table.abs().max() == 1


def test_fake_statistics_have_the_shapes_of_real_ones() -> None:
    x = torch.randn(5, 77)
    _, real = functional.quantize_4bit(x, nested=True)
    with FakeTensorMode() as mode:
        _, fake = functional.quantize_4bit(mode.from_tensor(x), nested=True)
    assert fake.absmax.shape == real.absmax.shape
    assert fake.state2.absmax.shape == real.state2.absmax.shape
    assert fake.absmax.dtype == real.absmax.dtype


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8", "int8 over floats"])
def test_a_frozen_layer_runs_with_fake_parameters_and_buffers(kind: str) -> None:
    layer = LAYERS[kind]()
    halfbyte.freeze_(layer)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(t) for name, t in (*layer.named_parameters(), *layer.named_buffers())}
        y = torch.func.functional_call(layer, fake, (torch.randn(2, 64),))
    assert isinstance(y, FakeTensor)
    assert y.shape == (2, 24)
    assert type(layer(torch.randn(2, 64))) is torch.Tensor


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8"])
def test_a_live_layer_runs_on_fake_inputs(kind: str) -> None:
    layer = LAYERS[kind]()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(torch.randn(2, 64)))
    assert isinstance(y, FakeTensor)
    assert y.shape == (2, 24)


def test_building_over_fake_tensors_is_refused_in_a_sentence() -> None:
    for build in (lambda: LinearNF4(64, 32), lambda: Linear8bitLt(64, 32)):
        with FakeTensorMode(), pytest.raises(halfbyte.InputError, match="cannot hold a FakeTensor: build the layer on"):
            build()


def test_building_and_running_on_meta() -> None:
    with torch.device("meta"):
        layer = LinearNF4(64, 32)
    assert layer.weight.is_meta
    packed, state = functional.quantize_4bit(torch.empty(64, 64, device="meta"))
    assert functional.linear_4bit(torch.empty(3, 64, device="meta"), packed, state).shape == (3, 64)
    assert type(formats.levels("nf4", CPU)) is torch.Tensor
    assert formats.levels("nf4", CPU).device == CPU


@pytest.mark.usefixtures("_no_tables")
@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8"])
def test_what_inference_mode_made_serves_a_later_backward(kind: str) -> None:
    torch.manual_seed(3)
    layer = Linear8bitLt(64, 24, has_fp16_weights=False) if kind == "int8" else LinearNF4(64, 24, True, None, True)
    with torch.inference_mode():
        layer.to("cpu")
        layer(torch.randn(1, 64))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_a_parameter_quantized_in_inference_mode_alone_serves_a_later_backward() -> None:
    weight, rows = Params4bit(torch.randn(24, 64)), Int8Params(torch.randn(24, 64), requires_grad=False)
    with torch.inference_mode():
        weight.to("cpu")
        rows.to("cpu")
    x = torch.randn(2, 64, requires_grad=True)
    y = functional.linear_4bit(x, weight, weight.quant_state) + functional.linear_int8(x, rows, rows.SCB)
    y.sum().backward()
    assert x.grad is not None


def test_a_derived_layout_first_made_in_inference_mode_serves_a_later_backward() -> None:
    weight = torch.randn(4, 4)
    with torch.inference_mode():
        layout = halfbyte.derived.derived(weight, "transposed", lambda: weight.T.contiguous())
    assert not layout.is_inference()
    x = torch.randn(2, 4, requires_grad=True)
    (x @ halfbyte.derived.derived(weight, "transposed", lambda: pytest.fail("built twice"))).sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_rules_forward_and_gradients_keep_their_dtype(kind: str) -> None:
    layer, x = LAYERS[kind](), torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == layer.bias.grad.dtype == torch.float32


# -- autograd ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    layer, x = LAYERS[kind](), torch.randn(2, 64)

    def gradients(call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        layer.zero_grad()
        own = x.clone().requires_grad_()
        call(own).square().sum().backward()
        return [own.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    plain = gradients(lambda own: torch.relu(layer(own)))
    again = gradients(lambda own: checkpoint(lambda z: torch.relu(layer(z)), own, use_reentrant=reentrant))
    assert len(plain) >= 2
    assert all(map(torch.equal, plain, again))


def test_backward_on_another_thread_keeps_the_choice_of_the_forward(counting: Any) -> None:
    layer, x = nf4(), torch.randn(2, 64, requires_grad=True)
    with halfbyte.use_backend("counting"):
        y = layer(x)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert Counter(counting.calls) == {"linear_4bit": 1, "linear_4bit_backward": 1}


def test_backward_inside_another_choice_keeps_that_of_the_forward(counting: Any) -> None:
    layer, x = nf4(), torch.randn(2, 64, requires_grad=True)
    y = layer(x)
    with halfbyte.use_backend("counting"):
        y.sum().backward()
    assert not counting.calls


def test_double_backward_gives_second_derivatives() -> None:
    layer, x = nf4(), torch.randn(2, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    weight = functional.dequantize_4bit(layer.weight, layer.required_state())
    expected = (2 * weight.T @ weight).sum(0).expand(2, -1)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)


# -- sizes ---------------------------------------------------------------------------------------------------

HUGE = (1 << 16, (1 << 16) + 64)  # 2^32 and more elements


def test_shapes_past_2_to_the_31_are_exact_on_meta() -> None:
    n = HUGE[0] * HUGE[1]
    x = torch.empty(HUGE, device="meta", dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(x, nested=True)
    assert packed.shape == (n // 2, 1)
    assert state.absmax.shape == (n // 64,)
    assert state.state2.absmax.shape == (-(-n // 64 // 256),)
    assert functional.dequantize_4bit(packed, state).shape == HUGE
    rows = torch.empty(1, HUGE[1], device="meta", dtype=torch.bfloat16)
    assert functional.linear_4bit(rows, packed, state).shape == (1, HUGE[0])
    codes, state = functional.quantize_8bit(x, blocksize=256)
    assert codes.shape == HUGE
    assert state.absmax.shape == (n // 256,)
    q, absmax, columns = functional.quantize_int8_rows(x)
    assert (q.shape, absmax.shape, columns.shape) == (HUGE, HUGE[:1], HUGE[1:])
    weight = torch.empty(HUGE, device="meta", dtype=torch.int8)
    assert functional.linear_int8(rows, weight, absmax).shape == (1, HUGE[0])


def test_shapes_past_2_to_the_31_are_exact_on_fake_tensors_and_in_backward() -> None:
    with FakeTensorMode():
        packed, state = functional.quantize_4bit(torch.empty(HUGE, dtype=torch.bfloat16))
        x = torch.empty(1 << 16, HUGE[1], dtype=torch.bfloat16, requires_grad=True)
        y = functional.linear_4bit(x, packed, state)
        y.sum().backward()
    assert y.shape == (1 << 16, HUGE[0])
    assert x.grad.shape == x.shape


def test_a_layer_past_2_to_the_31_loads_on_meta() -> None:
    packed, state = functional.quantize_4bit(torch.empty(HUGE, device="meta"))
    layer = LinearNF4(HUGE[1], HUGE[0], bias=False, compress_statistics=False, device="meta")
    layer.load_state_dict({"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}})
    assert layer.required_state().shape == HUGE
