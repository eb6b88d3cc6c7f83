"""Linear8bitLt and Int8Params."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import halfbyte
from halfbyte.nn import Embedding8bit, Int8Params, Linear8bitLt


def layer(n: int = 48, k: int = 96, *, threshold: float = 0.0, bias: bool = True) -> Linear8bitLt:
    torch.manual_seed(n * 1000 + k)
    return Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=threshold).to("cpu")


def dequantized(made: Linear8bitLt) -> torch.Tensor:
    return made.weight.data.float() * made.weight.SCB[:, None] / 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_forward_is_close_to_the_float_product(dtype: torch.dtype, threshold: float) -> None:
    made = layer(threshold=threshold)
    x = torch.randn(2, 3, 96).to(dtype)
    x[..., 5] = 40.0
    kept = x.clone()
    y = made(x)
    expected = x.float() @ dequantized(made).T + made.bias
    error = (y.float() - expected).norm() / expected.norm()
    assert error < (0.012 if threshold else 0.2)  # without outliers the column of 40 spoils every row's scale
    assert y.dtype == dtype
    assert torch.equal(x, kept)  # bitsandbytes bug 21


def test_a_weight_and_a_bias_that_are_plain_attributes_serve() -> None:  # as FSDP has them for a while
    made = layer(32, 64)
    x = torch.randn(3, 64)
    expected, weight, bias = made(x), made.weight, made.bias.detach()
    del made.weight, made.bias
    object.__setattr__(made, "weight", weight)
    object.__setattr__(made, "bias", bias)
    assert torch.equal(made(x), expected)


def test_large_activations_do_not_overflow() -> None:  # bitsandbytes bug 21
    made = layer(bias=False)
    y = made(torch.full((2, 96), 1e5, dtype=torch.bfloat16))
    assert y.isfinite().all()


def test_quantizes_on_the_first_move_and_never_again() -> None:
    made = Linear8bitLt(96, 48, has_fp16_weights=False)
    assert made.weight.dtype == torch.float32
    made.to("cpu")
    rows, absmax = made.weight.data.clone(), made.weight.SCB.clone()
    assert rows.dtype == torch.int8
    assert made.weight.CB.data_ptr() == made.weight.data_ptr()
    for move in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.cpu(), lambda m: m.float()):
        move(made)
        assert torch.equal(made.weight.data, rows)
        assert torch.equal(made.weight.SCB, absmax)
        assert made.weight.SCB.dtype == torch.float32


def test_forward_before_quantizing_says_what_to_do() -> None:
    with pytest.raises(halfbyte.InputError, match=r"not quantized yet: .*\.to\(device\)"):
        Linear8bitLt(64, 32, has_fp16_weights=False)(torch.zeros(1, 64))


def test_weights_beyond_float16_are_quantized_without_the_detour() -> None:
    weight = torch.randn(8, 16)
    weight[0, 0] = 1e6
    made = Int8Params(weight, requires_grad=False).to("cpu")
    assert made.SCB[0] == 1e6
    assert made.data[0, 0] == 127


def test_state_dict_round_trip_through_safetensors(tmp_path: object) -> None:
    model = nn.Sequential(layer(64, 64), layer(64, 64, bias=False))
    stored = model.state_dict()
    assert set(stored) == {"0.weight", "0.bias", "0.SCB", "0.weight_format", "1.weight", "1.SCB", "1.weight_format"}
    assert stored["0.weight_format"].dtype == torch.uint8
    assert stored["0.weight_format"].ndim == 0
    save_file(stored, tmp_path / "model.safetensors")
    fresh = nn.Sequential(*(Linear8bitLt(64, 64, bias, has_fp16_weights=False) for bias in (True, False)))
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(3, 64)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda sd: sd.update({"weight_format": torch.tensor(2, dtype=torch.uint8)}),
            "weight_format must be 0 or 'row'",
        ),
        (lambda sd: sd.update({"SCB": sd["SCB"][:-1]}), r"SCB must be float32 \(48,\)"),
        (lambda sd: sd.update({"weight": sd["weight"][:-1]}), r"weight must be int8 \(48, 96\)"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change: object, message: str) -> None:
    made = layer()
    rows, stored = made.weight.data.clone(), made.state_dict()
    change(stored)
    with pytest.raises(RuntimeError, match=message):
        made.load_state_dict(stored)
    assert torch.equal(made.weight.data, rows)


def test_copies_pickles_and_meta_keep_every_value() -> None:
    made = layer()
    x = torch.randn(2, 96)
    expected = made(x)
    twin = copy.deepcopy(made)
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), expected)
    made.weight.data.zero_()
    made.weight.SCB.zero_()
    assert torch.equal(twin(x), expected)
    on_meta = twin.weight.to("meta")
    assert on_meta.is_meta
    assert torch.equal(twin(x), expected)


def test_gradients_reach_input_and_bias() -> None:
    made = layer()
    x = torch.randn(2, 3, 96, requires_grad=True)
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, dequantized(made).sum(0).expand(2, 3, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.bias.grad, torch.full((48,), 6.0))
    assert made.weight.grad is None


def test_float_weights_train_through_quantized_products() -> None:  # bitsandbytes bug 16: 3-D inputs
    made = Linear8bitLt(96, 48).to("cpu")
    assert made.weight.is_floating_point()
    x = torch.randn(2, 3, 96, requires_grad=True)
    y = made(x)
    expected = x @ made.weight.T + made.bias
    assert (y - expected).norm() / expected.norm() < 0.02
    y.sum().backward()
    torch.testing.assert_close(made.weight.grad, x.detach().reshape(-1, 96).sum(0).expand(48, -1), rtol=1e-4, atol=1e-4)
    assert (x.grad - made.weight.detach().sum(0)).norm() / x.grad.norm() < 0.02
    assert made.bias.grad is not None


def test_autocast_rules_the_dtype() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer()(torch.randn(2, 96)).dtype == torch.bfloat16


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks_forward_and_backward(compiler: str, threshold: float) -> None:
    made = layer(threshold=threshold)
    compiled = torch.compile(made, fullgraph=True, backend=compiler)
    x = torch.randn(4, 96, requires_grad=True)
    compiled(x).sum().backward()
    gradient, x.grad = x.grad, None
    made(x).sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    torch.testing.assert_close(compiled(x), made(x))


def test_settings_that_peft_reads_are_there() -> None:
    made = layer(threshold=6.0)
    assert (made.state.threshold, made.state.has_fp16_weights, made.index) == (6.0, False, None)
    made.state.SCB = torch.ones(48)
    assert made.state.SCB.sum() == 48
    made.state.reset_grads()
    assert torch.equal(made.state.SCB, made.weight.SCB)


def test_state_shows_the_weight_as_it_is() -> None:
    made = layer()
    shallow = copy.copy(made)  # which shares its parameters
    copies = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    made.weight = Int8Params(torch.randn(48, 96), requires_grad=False).to("cpu")
    assert torch.equal(made.state.CB, made.weight)
    for one in copies:
        assert torch.equal(one.state.CB, one.weight)
        assert torch.equal(one.state.SCB, one.weight.SCB)
        assert not torch.equal(one.state.CB, made.state.CB)
        assert one.state == made.state
    assert torch.equal(shallow.state.CB, made.weight)
    made.to("meta")
    assert made.state.CB.is_meta
    assert Linear8bitLt(8, 8).state.CB is None
    assert repr(made.state).startswith("LayerState(")


def test_rebuilding_a_parameter_from_its_dict_as_transformers_does() -> None:
    made = layer()
    attributes = {**made.weight.__dict__}
    attributes.pop("SCB")
    new = Int8Params(torch.randn(48, 96), requires_grad=False, **attributes).to("cpu")
    assert new.dtype == torch.int8
    assert new.SCB is not None


def saved(made: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in made.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def embedding8() -> Embedding8bit:
    torch.manual_seed(0)
    return Embedding8bit(48, 96).to("cpu")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("build", [layer, embedding8])
def test_a_float_state_dict_into_a_quantized_layer_is_refused(build: object, frozen: bool) -> None:
    model = nn.Sequential(build())
    if frozen:
        halfbyte.freeze_(model)
    stored = saved(model)
    floats = {"0.weight": torch.rand(48, 96), **({"0.bias": stored["0.bias"]} if "0.bias" in stored else {})}
    with pytest.raises(
        RuntimeError, match=r"0.weight: a quantized layer takes int8 rows with SCB; got float32 \(48, 96\)"
    ):
        model.load_state_dict(floats)
    assert same(saved(model), stored)


@pytest.mark.parametrize("quantized", [False, True])
def test_int8_rows_without_statistics_are_refused(quantized: bool) -> None:
    made = layer(bias=False) if quantized else Linear8bitLt(96, 48, bias=False, has_fp16_weights=False)
    stored = saved(made)
    rows = {"weight": torch.full((48, 96), 3, dtype=torch.int8), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    with pytest.raises(
        RuntimeError, match=r"weight: a quantized layer takes int8 rows with SCB; got int8 \(48, 96\) alone"
    ):
        made.load_state_dict(rows)
    assert same(saved(made), stored)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_int8_state_dict_into_a_weight_that_stays_a_float_is_refused(frozen: bool) -> None:
    made = Linear8bitLt(96, 48, has_fp16_weights=True).to("cpu")
    if frozen:
        halfbyte.freeze_(made)
    stored = saved(made)
    with pytest.raises(RuntimeError, match="a layer with has_fp16_weights=True takes floats; got int8 rows"):
        made.load_state_dict({**saved(layer()), "bias": stored["bias"]})
    assert same(saved(made), stored)


def test_a_float_state_dict_loads_into_a_layer_that_is_not_quantized_yet() -> None:
    floats = {"weight": torch.randn(48, 96), "bias": torch.randn(48)}
    for stays in (False, True):
        made = Linear8bitLt(96, 48, has_fp16_weights=stays)
        made.load_state_dict(floats)
        assert torch.equal(made.weight.data, floats["weight"])
