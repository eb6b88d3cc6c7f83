"""However a module is moved, cast, copied, saved and loaded, its dequantized values never change."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import halfbyte
from halfbyte import functional
from halfbyte.nn import Embedding4bit, Embedding8bit, Linear8bitLt, LinearNF4

BUILD: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: LinearNF4(66, 10, compress_statistics=False),
    "nf4 nested": lambda: LinearNF4(70, 300, compress_statistics=True),
    "nf4 as float32": lambda: LinearNF4(64, 10, quant_storage=torch.float32),
    "nf4 as bfloat16": lambda: LinearNF4(64, 10, quant_storage=torch.bfloat16),
    "int8": lambda: Linear8bitLt(66, 10, has_fp16_weights=False),
    "table nf4": lambda: Embedding4bit(10, 64, quant_type="nf4"),
    "table int8": lambda: Embedding8bit(10, 33),
}


def values(module: nn.Module) -> torch.Tensor:
    """The dequantized weight of the only layer in a container."""
    plain = copy.deepcopy(module)
    halfbyte.dequantize_(plain, dtype=torch.float32)
    return plain[0].weight.detach()


def through_meta(module: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.to("meta")
    module.load_state_dict(state, assign=True)
    return module


def through_data(module: nn.Module) -> nn.Module:
    """Away and back by assignment to the parameter, as accelerate does when it offloads."""
    layer = module[0]
    if type(layer.weight) is nn.Parameter:
        return module
    data, kwargs = layer.weight.data.clone(), layer.weight.__dict__
    layer.weight = type(layer.weight)(layer.weight.to("meta"), requires_grad=False, **kwargs)
    layer.weight = type(layer.weight)(data, requires_grad=False, **kwargs)
    return module


def through_state_dict(module: nn.Module) -> nn.Module:
    options = {"has_fp16_weights": False} if isinstance(module[0], Linear8bitLt) else {}
    fresh = nn.Sequential(type(module[0])(*_sizes(module[0]), **options)).to("cpu")
    fresh.load_state_dict(module.state_dict(), strict=False)
    return fresh


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.in_features, layer.out_features


def torch_saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def forwarded(module: nn.Module) -> nn.Module:
    layer = module[0]
    with torch.no_grad():
        if isinstance(layer, nn.Embedding):
            layer(torch.tensor([0, 3]))
        else:
            layer(torch.randn(2, layer.in_features))
    return module


def frozen(module: nn.Module) -> nn.Module:
    halfbyte.freeze_(module)
    return module


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to cpu": lambda module: module.to("cpu"),
    "cpu": lambda module: module.cpu(),
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double().float(),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "train": lambda module: module.train(),
    "eval": lambda module: module.eval(),
    "no gradients": lambda module: module.requires_grad_(False),
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": torch_saved,
    "share memory": lambda module: module.share_memory(),
    "meta": through_meta,
    "data": through_data,
    "state dict": through_state_dict,
    "forward": forwarded,
    "freeze": frozen,
}


@pytest.mark.parametrize("kind", BUILD)
@given(moves=st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=6))
def test_no_sequence_of_moves_changes_a_value(kind: str, moves: list[str]) -> None:  # bitsandbytes bug 17
    torch.manual_seed(len(kind))
    module = nn.Sequential(BUILD[kind]()).to("cpu")
    before, keys = values(module), set(module.state_dict())
    for move in moves:
        module = MOVES[move](module)
        assert torch.equal(values(module), before), move
        assert set(module.state_dict()) == keys, move
    forwarded(module.float())


@pytest.mark.parametrize("kind", ["nf4 nested", "int8"])
def test_a_trip_to_meta_without_reloading_has_lost_the_codes_only(kind: str) -> None:
    layer = BUILD[kind]().to("cpu")
    statistics = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "weight"}
    layer.to("meta")
    assert layer.weight.is_meta
    for name, tensor in layer.state_dict().items():
        if name in statistics and name != "bias":
            assert torch.equal(tensor, statistics[name]), name


# -- accelerate ----------------------------------------------------------------------------------------------


def small_model(format: str, freeze: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 64))
    halfbyte.quantize_(model, format, nested=format != "int8", embeddings=True)
    if freeze:
        halfbyte.freeze_(model)
    return model.eval()


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_accelerate_offloads_and_returns_the_same(tmp_path: object, place: str, format: str, freeze: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = small_model(format, freeze), torch.tensor([[1, 19, 4]])
    with torch.no_grad():
        expected = model(ids)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model[1].weight.is_meta
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(ids), expected)
    assert model[1].weight.is_meta


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_set_module_tensor_to_device_away_and_back(format: str, freeze: bool) -> None:
    place = pytest.importorskip("accelerate.utils").set_module_tensor_to_device
    model, ids = small_model(format, freeze), torch.tensor([[1, 19, 4]])
    expected, data = model(ids), model[1].weight.data.clone()
    place(model, "1.weight", "meta")
    assert model[1].weight.is_meta
    place(model, "1.weight", "cpu", value=data)
    assert torch.equal(model(ids), expected)


def test_values_are_those_that_functional_dequantizes() -> None:
    layer = BUILD["nf4"]().to("cpu")
    expected = functional.dequantize_4bit(layer.weight, layer.required_state(), dtype=torch.float32)
    assert torch.equal(values(nn.Sequential(layer)), expected)
