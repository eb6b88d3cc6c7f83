"""Linear4bit, Params4bit: what bitsandbytes' users expect, and the faults of bitsandbytes that must not return."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import halfbyte
from halfbyte import functional
from halfbyte.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit


def layer(
    n: int = 48, k: int = 96, *, bias: bool = True, dtype: torch.dtype = torch.float32, **options: object
) -> Linear4bit:
    torch.manual_seed(n * 1000 + k)
    made = Linear4bit(k, n, bias, **{"quant_type": "nf4", **options})
    made.weight.data = torch.randn(n, k).to(dtype)
    return made.to(dtype).to("cpu")


def snapshot(module: nn.Module) -> dict[str, bytes]:
    return {
        key: bytes(value.contiguous().view(-1).view(torch.uint8).tolist()) for key, value in module.state_dict().items()
    }


def dequantized(module: Linear4bit) -> torch.Tensor:
    return functional.dequantize_4bit(module.weight, module.required_state())


@pytest.mark.parametrize("cls", [LinearNF4, LinearFP4])
def test_quantizes_on_the_first_move_and_only_once(cls: type[Linear4bit]) -> None:
    made = cls(64, 32)
    assert made.weight.dtype == torch.float32
    assert not made.weight.bnb_quantized
    made.to("cpu")
    assert made.weight.dtype == torch.uint8
    assert made.weight.shape == (32 * 64 // 2, 1)
    assert made.weight.bnb_quantized
    before = snapshot(made)
    made.to("cpu").to(torch.float16).cpu()
    after = snapshot(made)
    del before["bias"], after["bias"]
    assert before == after


def test_forward_before_quantizing_says_what_to_do() -> None:
    with pytest.raises(halfbyte.InputError, match=r"not quantized yet: .*\.to\(device\)"):
        Linear4bit(64, 32)(torch.zeros(1, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k"), [(48, 96), (33, 70), (1, 31), (5, 1), (40, 64)])
def test_forward_equals_linear_over_the_dequantized_weight(n: int, k: int, nested: bool, dtype: torch.dtype) -> None:
    made = layer(n, k, dtype=dtype, compress_statistics=nested)
    x = torch.randn(2, 3, k).to(dtype)
    expected = F.linear(x.double(), dequantized(made).double(), made.bias.double())
    rounding = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(made(x).double(), expected, rtol=rounding, atol=rounding)
    assert made(x).dtype == dtype


def test_a_weight_and_a_bias_that_are_plain_attributes_serve() -> None:  # as FSDP has them for a while
    made = layer(32, 64)
    x = torch.randn(3, 64)
    expected, weight, bias = made(x), made.weight, made.bias.detach()
    del made.weight, made.bias
    object.__setattr__(made, "weight", weight)
    object.__setattr__(made, "bias", bias)
    assert torch.equal(made(x), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_evaluating_changes_nothing_that_is_saved(nested: bool) -> None:  # bitsandbytes bug 1
    made = layer(32, 64, dtype=torch.bfloat16, compress_statistics=nested).eval()
    before = snapshot(made)
    with torch.inference_mode():
        made(torch.randn(1, 64, dtype=torch.bfloat16))
    assert snapshot(made) == before
    dequantized(made)
    assert snapshot(made) == before


def test_evaluate_then_train_gives_gradients_and_the_same_weight() -> None:  # bitsandbytes bug 2
    made = layer(32, 64, dtype=torch.bfloat16)
    weight = dequantized(made)
    with torch.no_grad():
        made.eval()(torch.randn(2, 64, dtype=torch.bfloat16))
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    made.train()(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), weight.float().sum(0).expand(2, -1), rtol=2e-2, atol=5e-2)
    assert torch.equal(dequantized(made), weight)


@pytest.mark.parametrize(("n", "k"), [(31, 64), (32, 65), (7, 33)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_odd_shapes_work_in_both_modes(n: int, k: int, nested: bool, training: bool) -> None:  # bitsandbytes bug 3
    made = layer(n, k, dtype=torch.bfloat16, compress_statistics=nested).train(training)
    y = made(torch.randn(3, k, dtype=torch.bfloat16))
    assert y.shape == (3, n)
    assert y.isfinite().all()
    assert made.required_state().nested is nested


def test_storage_that_does_not_divide_the_bytes_is_refused() -> None:  # bitsandbytes bug 13
    with pytest.raises(halfbyte.InputError, match=r"33 packed bytes cannot be viewed as bfloat16 \(2 bytes each\)"):
        functional.quantize_4bit(torch.randn(66), storage=torch.bfloat16)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float64])
def test_casts_never_touch_codes_stored_as_another_dtype(storage: torch.dtype) -> None:
    made = layer(32, 64, quant_storage=storage)
    expected, packed = made(torch.ones(1, 64)), functional.as_bytes(made.weight.data).clone()
    assert made.weight.dtype == storage
    for cast in (lambda m: m.half(), lambda m: m.float(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        cast(made)
        assert made.weight.dtype == storage
        assert torch.equal(functional.as_bytes(made.weight.data), packed)
    made.float()
    torch.testing.assert_close(made(torch.ones(1, 64)), expected, rtol=0, atol=2e-2)  # the bias went through half


def test_moving_to_meta_leaves_the_original_state_alone() -> None:  # bitsandbytes bug 15
    made = layer()
    weight, state = made.weight, made.required_state()
    on_meta = weight.to("meta")
    assert on_meta.is_meta
    assert state.absmax.device.type == "cpu"
    assert weight.quant_state is state
    made(torch.ones(1, 96))


def test_module_survives_a_trip_to_meta_when_its_data_returns() -> None:
    made = layer()
    expected, kept = made(torch.ones(1, 96)), made.weight.data.clone()
    bias = made.bias.data.clone()
    made.to("meta")
    assert made.weight.is_meta
    assert isinstance(made.weight, Params4bit)
    made.weight = Params4bit(kept, **made.weight.__dict__)  # as accelerate puts data back
    made.bias = nn.Parameter(bias)
    assert torch.equal(made(torch.ones(1, 96)), expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("cut", [lambda w: torch.chunk(w, 4), lambda w: torch.split(w, 32), lambda w: w.chunk(3)])
def test_chunks_are_quantized_tensors_of_their_own_elements(cut: object, nested: bool) -> None:  # bitsandbytes bug 15
    made = layer(64, 512, compress_statistics=nested)
    whole = dequantized(made).reshape(-1)
    pieces = cut(made.weight)
    values = torch.cat([functional.dequantize_4bit(p, p.quant_state) for p in pieces if p.quant_state is not None])
    assert all(isinstance(piece, Params4bit) for piece in pieces)
    assert all(piece.quant_state is not None for piece in pieces if piece.numel() % 32 == 0)
    assert torch.equal(values, whole[: values.numel()])
    assert torch.equal(torch.cat([p.data for p in pieces]), made.weight.data)


def test_chunks_that_begin_inside_a_block_have_no_state() -> None:
    pieces = torch.split(layer(64, 64).weight, 20)
    assert pieces[0].quant_state is not None
    assert pieces[1].quant_state is None


def test_deepcopy_shares_nothing_and_keeps_one_state_per_layer() -> None:
    made = layer()
    twin = copy.deepcopy(made)
    assert twin.weight.module is twin
    assert twin.weight.quant_state is twin.quant_state
    assert twin.quant_state is not made.quant_state
    twin.weight.data.zero_()
    twin.required_state().absmax.zero_()
    assert dequantized(made).abs().sum() > 0
    assert copy.deepcopy(made.weight).module is None  # alone, a copy belongs to no layer


def test_shallow_copy_shares_the_data() -> None:
    made = layer()
    twin = copy.copy(made.weight)
    assert twin.data_ptr() == made.weight.data_ptr()
    assert twin.quant_state is made.weight.quant_state


@pytest.mark.parametrize("nested", [False, True])
def test_pickle_and_torch_save_keep_every_value(nested: bool) -> None:
    made = layer(compress_statistics=nested)
    x = torch.randn(2, 96)
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), made(x))
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), made(x))


def test_state_dict_is_plain_tensors_that_load_weights_only() -> None:
    made, buffer = layer(compress_statistics=True), io.BytesIO()
    assert {type(value) for value in made.state_dict().values()} == {torch.Tensor}
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    other = layer(compress_statistics=True)
    other.weight.data.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(dequantized(other), dequantized(made))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dict_round_trip_through_safetensors(tmp_path: object, nested: bool, quant_type: str) -> None:
    model = nn.Sequential(layer(64, 64, quant_type=quant_type, compress_statistics=nested), layer(64, 64))
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # refuses tensors that share memory
    fresh = nn.Sequential(Linear4bit(64, 64), Linear4bit(64, 64))  # not quantized, of another type
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(2, 64)
    assert torch.equal(fresh(x), model(x))
    assert snapshot(fresh) == snapshot(model)


def test_state_dict_loads_into_a_module_on_meta_with_assign() -> None:
    made = layer()
    with torch.device("meta"):
        fresh = Linear4bit(96, 48)
    fresh.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(fresh(torch.ones(1, 96)), made(torch.ones(1, 96)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.update({"weight": sd["weight"][:-1]}), "packed bytes; got"),
        (lambda sd: sd.pop("weight.absmax"), "lacks absmax"),
        (lambda sd: sd.update({"weight.other": torch.zeros(1)}), "unknown entries in a quantization state: other"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(change: object, message: str) -> None:
    made = layer()
    stored, before = made.state_dict(), snapshot(made)
    change(stored)
    with pytest.raises(RuntimeError, match=message):
        made.load_state_dict(stored)
    assert snapshot(made) == before


def test_a_state_dict_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"shape must be \(48, 96\); got \(96, 48\)"):
        layer(48, 96).load_state_dict(layer(96, 48, bias=False).state_dict(), strict=False)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_compute_dtype_rules_the_product_and_leaves_the_bias_alone(compute_dtype: torch.dtype | None) -> None:
    made = layer(compute_dtype=compute_dtype)
    y = made(torch.randn(2, 96, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert made.bias.dtype == torch.float32  # bitsandbytes rebinds it


def test_autocast_decides_where_no_compute_dtype_is_set() -> None:
    x = torch.randn(2, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer()(x).dtype == torch.bfloat16
        assert layer(compute_dtype=torch.float32)(x).dtype == torch.float32


def test_gradients_reach_input_and_bias_but_not_the_weight() -> None:
    made = layer()
    x = torch.randn(2, 3, 96, requires_grad=True)
    made(x).square().sum().backward()
    twin = nn.Linear(96, 48)
    twin.weight.data, twin.bias.data = dequantized(made), made.bias.data.clone()
    x2 = x.detach().clone().requires_grad_()
    twin(x2).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-4)
    assert made.weight.grad is None


def test_rebuilding_a_parameter_from_its_dict_as_transformers_does() -> None:
    made = layer()
    value = torch.randn(48, 96)
    old = made.weight
    old.__dict__["_is_hf_initialized"] = True
    new = Params4bit(value, requires_grad=False, **{**old.__dict__, "bnb_quantized": False}).to("cpu")
    assert new.dtype == torch.uint8
    assert made.quant_state is new.quant_state  # the layer follows


def test_float_data_counts_as_unquantized_whatever_the_flag_says() -> None:
    old = layer().weight
    new = Params4bit(torch.randn(48, 96), requires_grad=False, **old.__dict__)  # as peft's randlora merges
    assert new.bnb_quantized
    assert new.to("cpu").dtype == torch.uint8


def test_a_state_lost_by_the_parameter_is_taken_from_the_module() -> None:
    made = layer()
    expected = made(torch.ones(1, 96))
    made.weight = nn.Parameter(made.weight.data, requires_grad=False)  # as FSDP leaves it
    assert torch.equal(made(torch.ones(1, 96)), expected)
    assert "weight.absmax" in made.state_dict()


def test_state_is_reachable_by_checkpoint_names_for_fsdp() -> None:
    weight = layer(compress_statistics=True).weight
    blob = weight.quant_state.bitsandbytes__nf4
    assert b'"quant_type": "nf4"' in bytes(blob.tolist())
    for name in ("absmax", "code", "quant_map", "offset", "state2"):
        assert getattr(weight, name) is not None
    for name in ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset"):
        assert getattr(weight, name) is not None
    assert not hasattr(layer(compress_statistics=False).weight, "nested_absmax")
    assert not hasattr(weight.quant_state, "bitsandbytes__fp4")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks_forward_and_backward(compiler: str) -> None:
    made = layer(compress_statistics=True)
    compiled = torch.compile(made, fullgraph=True, backend=compiler)
    x = torch.randn(2, 96, requires_grad=True)
    compiled(x).sum().backward()
    x2 = x.detach().clone().requires_grad_()
    made(x2).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x))


def test_transformer_encoder_does_not_take_its_fused_path_with_a_quantized_weight() -> None:
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 64)
    with torch.inference_mode():
        expected = encoder(x)
        for format in ("nf4", "int8"):
            twin = copy.deepcopy(encoder)
            halfbyte.quantize_(twin, format)
            assert isinstance(twin.self_attn.out_proj, nn.Linear)  # a subclass: F.multi_head_attention reads its weight
            assert (twin(x) - expected).norm() / expected.norm() < 0.1


def test_signatures_are_those_of_bitsandbytes() -> None:
    import inspect

    def names(cls: type) -> list[str]:
        call = cls.__new__ if issubclass(cls, nn.Parameter) else cls.__init__
        return [name for name in inspect.signature(call).parameters if name not in ("self", "cls")]

    assert names(Linear4bit) == [
        *("input_features", "output_features", "bias", "compute_dtype", "compress_statistics", "quant_type"),
        *("quant_storage", "device"),
    ]
    assert names(Params4bit) == [
        *("data", "requires_grad", "quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage"),
        *("module", "bnb_quantized", "kwargs"),
    ]
    assert names(halfbyte.nn.Linear8bitLt) == [
        *("input_features", "output_features", "bias", "has_fp16_weights", "threshold", "index", "device"),
    ]
    assert names(halfbyte.nn.Int8Params) == ["data", "requires_grad", "has_fp16_weights", "CB", "SCB", "kwargs"]
    assert names(halfbyte.nn.Embedding8bit) == ["num_embeddings", "embedding_dim", "device", "dtype"]
    assert names(halfbyte.nn.Embedding4bit) == [
        *("num_embeddings", "embedding_dim", "dtype", "quant_type", "quant_storage", "device"),
    ]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("floats", [False, True])
def test_a_weight_without_its_statistics_into_a_quantized_layer_is_refused(floats: bool, frozen: bool) -> None:
    made, other = nn.Sequential(layer()), nn.Sequential(layer())
    other[0].weight.data.add_(1)
    if frozen:
        halfbyte.freeze_(made)
    before = snapshot(made)
    weight = torch.randn(48, 96) if floats else other[0].weight.data
    found = "float32 (48, 96)" if floats else "uint8 (2304, 1)"
    message = f"0.weight: a quantized layer takes packed codes with statistics (weight.absmax, ...); got {found} alone"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        made.load_state_dict({"0.weight": weight, "0.bias": made[0].bias.data.clone()})
    assert snapshot(made) == before


def test_a_float_state_dict_loads_into_a_layer_that_is_not_quantized_yet() -> None:
    made = Linear4bit(96, 48)
    floats = {"weight": torch.randn(48, 96), "bias": torch.randn(48)}
    made.load_state_dict(floats)
    assert torch.equal(made.weight.data, floats["weight"])
    assert made.to("cpu").weight.bnb_quantized


def test_chunks_and_splits_of_a_float_parameter_stay_parameters() -> None:
    weight = Params4bit(torch.randn(8, 64), quant_type="nf4", blocksize=32)

    for part in (*torch.chunk(weight, 2), *torch.split(weight, 4)):
        assert isinstance(part, Params4bit)
        assert (part.shape, part.quant_type, part.quant_state) == ((4, 64), "nf4", None)
        assert part.to("cpu").quant_state.shape == (4, 64)
