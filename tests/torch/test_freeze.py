"""freeze_: plain parameters and buffers on the same classes; nothing else changes, and torch.export works."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte.nn import Embedding4bit, Embedding8bit, Int8Params, Linear4bit, Linear8bitLt, LinearNF4, Params4bit

KINDS = ("nf4", "nf4 nested", "nf4 as bfloat16", "int8", "int8 with outliers")


def linear(kind: str, n: int = 40, k: int = 66) -> nn.Module:
    torch.manual_seed(5)
    if kind.startswith("int8"):
        threshold = 1.5 if kind.endswith("outliers") else 0.0
        return Linear8bitLt(k, n, has_fp16_weights=False, threshold=threshold).to("cpu")
    storage = torch.bfloat16 if kind.endswith("bfloat16") else torch.uint8
    return LinearNF4(k, n, compress_statistics=kind.endswith("nested"), quant_storage=storage).to("cpu")


def model(kind: str) -> nn.Module:
    return nn.Sequential(linear(kind), nn.ReLU(), linear(kind, 5, 40))


def table(kind: str, count: int = 12, width: int = 64) -> nn.Module:
    torch.manual_seed(6)
    made = Embedding8bit(count, width) if kind == "int8" else Embedding4bit(count, width, quant_type="nf4")
    return made.to("cpu")


def saved(module: nn.Module) -> dict[str, bytes]:
    return {key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in flat(module).items()}


def flat(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.reshape(-1) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_are_plain_parameters_and_buffers(kind: str) -> None:
    made = model(kind)
    classes = [type(module) for module in made.modules()]
    assert halfbyte.freeze_(made) == ["0", "2"]
    assert [type(module) for module in made.modules()] == classes
    for layer in (made[0], made[2]):
        assert type(layer.weight) is nn.Parameter
        assert not layer.weight.requires_grad
        assert layer.weight.dtype == (torch.int8 if kind.startswith("int8") else torch.uint8)
        expected = {"weight_absmax"}
        if kind.endswith("nested"):
            expected |= {"weight_nested_absmax", "weight_nested_codebook", "weight_offset"}
        assert set(dict(layer.named_buffers())) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_checkpoints_stay_as_they_are(kind: str) -> None:
    made = model(kind)
    frozen = copy.deepcopy(made)
    halfbyte.freeze_(frozen)
    assert saved(frozen) == saved(made)

    x = torch.randn(3, 66)
    gradients = []
    for one in (made, frozen):
        own = x.clone().requires_grad_()
        y = one(own)
        y.square().sum().backward()
        gradients.append((y.detach(), own.grad, one[0].bias.grad))
    for before, after in zip(*gradients, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_frozen_tables_look_up_the_same(kind: str) -> None:
    made = table(kind)
    frozen = copy.deepcopy(made)
    halfbyte.freeze_(nn.ModuleList([frozen]))
    indices = torch.tensor([[0, 3], [11, 3]])
    assert torch.equal(frozen(indices), made(indices))
    assert saved(frozen) == saved(made)
    exported = torch.export.export(frozen, (indices,)).module()
    assert torch.equal(exported(indices), made(indices))


@pytest.mark.parametrize("frozen_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_live_layers_load_each_other(kind: str, frozen_first: bool) -> None:
    source, target = model(kind), model(kind)
    halfbyte.freeze_(source if frozen_first else target)
    for layer in (source[0], source[2]):
        layer.load_state_dict({**layer.state_dict(), "bias": torch.randn_like(layer.bias)})
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert saved(target) == saved(source)
    live = (Params4bit, Int8Params)
    assert isinstance(target[0].weight, live) == frozen_first
    x = torch.randn(2, 66)
    assert torch.equal(target(x), source(x))


def test_a_checkpoint_that_does_not_fit_a_frozen_layer_is_refused() -> None:
    made, other = model("nf4"), nn.Sequential(linear("nf4", 40, 64))
    halfbyte.freeze_(made)
    before = saved(made)
    with pytest.raises(RuntimeError, match="shape must be"):
        made.load_state_dict(other.state_dict(), strict=False)
    after = saved(made)
    assert all(after[key] == before[key] for key in before if ".weight" in key)


@pytest.mark.parametrize("kind", KINDS)
def test_casts_reach_the_bias_only(kind: str) -> None:
    made = model(kind)
    halfbyte.freeze_(made)
    before = saved(made)
    made.to(torch.bfloat16)
    assert made[0].bias.dtype == torch.bfloat16
    made.half().float()
    after = saved(made)
    for key in before:
        assert key.endswith("bias") or after[key] == before[key], key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda module: _torch_saved(module)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_equal_the_original_and_share_nothing(kind: str, through: Callable[[nn.Module], nn.Module]) -> None:
    made = model(kind)
    halfbyte.freeze_(made)
    copied = through(made)
    assert saved(copied) == saved(made)
    mine = {tensor.data_ptr() for tensor in (*made.parameters(), *made.buffers())}
    assert not mine & {tensor.data_ptr() for tensor in (*copied.parameters(), *copied.buffers())}
    x = torch.randn(2, 66)
    assert torch.equal(copied(x), made(x))


def _torch_saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_model_returns_from_meta_with_its_checkpoint(kind: str) -> None:
    made = model(kind)
    halfbyte.freeze_(made)
    before, state = saved(made), {key: value.clone() for key, value in made.state_dict().items()}
    made.to("meta")
    assert made[0].weight.is_meta
    assert made[0].weight_absmax.is_meta
    assert set(made.state_dict()) == set(state)
    made.load_state_dict(state, assign=True)
    assert saved(made) == before
    assert made[0].weight_absmax.device.type == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_freezing_twice_changes_nothing(kind: str) -> None:
    made = model(kind)
    halfbyte.freeze_(made)
    weight, before = made[0].weight, saved(made)
    assert halfbyte.freeze_(made) == ["0", "2"]
    assert made[0].weight is weight
    assert saved(made) == before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_parameter_put_over_a_frozen_one_counts(kind: str) -> None:
    made, other = linear(kind), linear(kind)
    halfbyte.freeze_(nn.ModuleList([made]))
    other.load_state_dict(_negated(other))
    made.weight = other.weight
    x = torch.randn(2, 66)
    assert torch.equal(made(x), other(x))
    halfbyte.freeze_(nn.ModuleList([made]))
    assert torch.equal(made(x), other(x))


def _negated(layer: nn.Module) -> dict[str, torch.Tensor]:
    state = layer.state_dict()
    return {key: -value if key in ("weight.absmax", "SCB") else value for key, value in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_undoes_a_frozen_model(kind: str) -> None:
    made, frozen = model(kind), model(kind)
    halfbyte.freeze_(frozen)
    assert halfbyte.dequantize_(frozen) == halfbyte.dequantize_(made)
    assert torch.equal(frozen[0].weight, made[0].weight)


def test_a_model_with_nothing_quantized_is_refused() -> None:
    with pytest.raises(halfbyte.InputError, match="no quantized layer"):
        halfbyte.freeze_(nn.Sequential(nn.Linear(4, 4)))


def test_a_layer_that_is_not_quantized_yet_is_refused_before_anything_changes() -> None:
    made = nn.Sequential(linear("nf4"), Linear4bit(40, 5))
    with pytest.raises(halfbyte.InputError, match="not quantized yet"):
        halfbyte.freeze_(made)
    assert isinstance(made[0].weight, Params4bit)


def test_int8_over_float_weights_becomes_a_plain_parameter_and_trains_on() -> None:
    made = nn.Sequential(Linear8bitLt(16, 8, has_fp16_weights=True).to("cpu"))
    halfbyte.freeze_(made)
    assert type(made[0].weight) is nn.Parameter
    x = torch.randn(2, 16)
    made(x).sum().backward()
    assert made[0].weight.grad is not None
    assert torch.equal(torch.export.export(made, (x,)).module()(x), made(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_exports_and_the_program_computes_the_same(kind: str, strict: bool) -> None:
    made = model(kind).eval()
    halfbyte.freeze_(made)
    x = torch.randn(3, 66)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(made, (x,), dynamic_shapes=(batch,), strict=strict)
    ops = {str(node.target) for node in program.graph.nodes}
    assert ("halfbyte.linear_int8.default" if kind.startswith("int8") else "halfbyte.linear_4bit.default") in ops
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (3, 7):
        x = torch.randn(rows, 66)
        assert torch.equal(loaded(x), made(x))


def test_a_quantized_model_exports_in_the_default_mode() -> None:
    made = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 4))
    halfbyte.quantize_(made, "nf4", nested=True, embeddings=True)
    halfbyte.freeze_(made)
    indices = torch.tensor([[1, 9, 4]])
    program = torch.export.export(made, (indices,))
    assert torch.equal(program.module()(indices), made(indices))
