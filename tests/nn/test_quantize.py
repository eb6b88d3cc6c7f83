"""quantize_ and dequantize_ on models."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import halfbyte
from halfbyte.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt

IDS = torch.arange(12).reshape(3, 4)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            table=nn.Embedding(40, 128),
            up=nn.Linear(128, 96),
            act=nn.GELU(),
            down=nn.Linear(96, 64, bias=False),
            lm_head=nn.Linear(64, 40),
        )
    ).eval()


def fingerprint(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = dict(model.named_parameters())
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


@pytest.mark.parametrize(
    ("format", "options", "bound"),
    [
        ("nf4", {}, 0.2),
        ("nf4", {"nested": True}, 0.2),
        ("nf4", {"blocksize": 32}, 0.2),
        ("nf4", {"blocksize": 4096}, 0.3),
        ("fp4", {}, 0.25),
        ("int8", {}, 0.03),
        ("int8", {"threshold": 0.0}, 0.03),
    ],
)
def test_output_stays_close_and_the_report_adds_up(format: str, options: dict[str, object], bound: float) -> None:
    model = build()
    expected = model(IDS)
    report = halfbyte.quantize_(model, format, **options)
    error = (model(IDS) - expected).norm() / expected.norm()
    assert error < bound
    assert [layer.name for layer in report.layers] == ["up", "down"]
    assert report.skipped == {"lm_head": "named in skip"}
    up = report.layers[0]
    assert (up.kind, up.shape, up.bytes_before) == ("linear", (96, 128), 96 * 128 * 4)
    kept = model.up.state_dict()
    stored = sum(kept[key].nbytes for key in kept if key.split(".")[-1] in ("weight", "absmax", "SCB", "nested_absmax"))
    assert up.bytes_after == stored + 4 * bool(options.get("nested"))  # the offset lies in the blob
    restored = copy.deepcopy(model)
    halfbyte.dequantize_(restored)
    original = build().up.weight
    torch.testing.assert_close(
        torch.tensor(up.relative_error), (restored.up.weight - original).norm() / original.norm(), rtol=1e-4, atol=1e-6
    )
    assert "2 layers to" in str(report)


@pytest.mark.parametrize(
    ("format", "linear", "table"), [("nf4", Linear4bit, Embedding4bit), ("int8", Linear8bitLt, Embedding8bit)]
)
def test_embeddings_too(format: str, linear: type, table: type) -> None:
    model = build()
    report = halfbyte.quantize_(model, format, embeddings=True)
    assert isinstance(model.table, table)
    assert isinstance(model.up, linear)
    assert [layer.kind for layer in report.layers] == ["embedding", "linear", "linear"]


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_dequantize_undoes_it(format: str) -> None:
    model = build()
    kinds = [type(module) for module in model]
    halfbyte.quantize_(model, format, embeddings=True)
    quantized = model(IDS)
    assert halfbyte.dequantize_(model) == ["table", "up", "down"]
    assert [type(module) for module in model] == kinds
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    bound = 1e-5 if format != "int8" else 2e-2  # int8 quantizes activations too
    assert (model(IDS) - quantized).norm() / quantized.norm() < bound


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_dequantize_follows_a_cast_of_the_model(format: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    halfbyte.quantize_(model, format)
    model.half()
    halfbyte.dequantize_(model)
    assert model(torch.ones(1, 64).half()).dtype == torch.float16


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantized_models_exchange_state_dicts(format: str) -> None:
    model, other = build(), build()
    for parameter in other.parameters():
        parameter.data.mul_(2)
    halfbyte.quantize_(model, format, nested=format == "nf4", embeddings=True)
    halfbyte.quantize_(other, format, embeddings=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("skip", [["up"], ["u.*"], "up"])
def test_skip_takes_names_and_regular_expressions(skip: object) -> None:
    model = build()
    halfbyte.quantize_(model, "nf4", skip=skip)
    assert type(model.up) is nn.Linear
    assert isinstance(model.lm_head, Linear4bit)


def test_skip_matches_the_full_path_or_its_last_part() -> None:
    model = nn.ModuleDict({"a": build(), "b": build()})
    halfbyte.quantize_(model, "nf4", skip=[r"a\.up", "down"])
    assert type(model["a"].up) is nn.Linear
    assert isinstance(model["b"].up, Linear4bit)
    assert type(model["b"].down) is nn.Linear


def test_filter_decides_on_name_and_module() -> None:
    model = build()
    report = halfbyte.quantize_(model, "nf4", filter=lambda name, module: module.in_features == 96)
    assert [layer.name for layer in report.layers] == ["down"]
    assert report.skipped["up"] == "left out by the filter"


def test_a_module_with_two_names_is_quantized_once_under_both() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = halfbyte.quantize_(model, "nf4")
    assert len(report.layers) == 1
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], Linear4bit)


def test_a_shared_weight_stays_shared() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(40, 64), "head": nn.Linear(64, 40), "up": nn.Linear(64, 64)})
    model["head"].weight = model["table"].weight
    report = halfbyte.quantize_(model, "nf4")
    assert report.skipped == {"head": "its weight is shared with table"}
    assert model["head"].weight is model["table"].weight


COMPUTED = {
    "weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "prune of the bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "parametrizations.weight_norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "parametrizations.spectral_norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    "parametrizations.orthogonal": lambda layer: nn.utils.parametrizations.orthogonal(layer),
    "parametrization of the bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Identity()),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_from_others_stays_as_it_is(kind: str, format: str) -> None:
    model = build()
    COMPUTED[kind](model.up)
    before, layer = model.up.state_dict(), model.up
    report = halfbyte.quantize_(model, format)
    assert report.skipped == {"up": "its weight or bias is computed from others", "lm_head": "named in skip"}
    assert model.up is layer
    assert model.up.state_dict().keys() == before.keys()
    assert isinstance(model.down, Linear4bit if format == "nf4" else Linear8bitLt)


def test_bias_and_training_mode_are_kept() -> None:
    model = build().train()
    bias = model.up.bias
    halfbyte.quantize_(model, "nf4")
    assert model.up.bias is bias
    assert model.up.training


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_hooks_go_along_there_and_back(format: str) -> None:
    model, called = build(), []
    handles = [
        model.up.register_forward_pre_hook(lambda *args: called.append("before")),
        model.up.register_forward_hook(lambda *args, **kwargs: called.append("after"), with_kwargs=True),
        model.up.register_forward_hook(lambda *args: called.append("always"), always_call=True),
        model.up.register_full_backward_pre_hook(lambda *args: called.append("backward before")),
        model.up.register_full_backward_hook(lambda *args: called.append("backward")),
    ]
    for change in (lambda: halfbyte.quantize_(model, format), lambda: halfbyte.dequantize_(model)):
        change()
        called.clear()
        model(IDS).sum().backward()
        assert called == ["before", "after", "always", "backward before", "backward"]
    halfbyte.quantize_(model, format)
    for handle in handles:
        handle.remove()
    called.clear()
    model(IDS)
    assert called == []


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_dequantized_layers_train_as_they_did_before(format: str) -> None:
    model = build()
    model.up.weight.requires_grad_(False)
    model.table = nn.Embedding(40, 128, padding_idx=3, norm_type=1.0, scale_grad_by_freq=True, sparse=True)
    halfbyte.quantize_(model, format, embeddings=True)
    halfbyte.dequantize_(copy.deepcopy(model))
    halfbyte.freeze_(model)
    halfbyte.dequantize_(model)
    assert [model.up.weight.requires_grad, model.down.weight.requires_grad] == [False, True]
    kept = model.table
    assert (kept.padding_idx, kept.norm_type, kept.scale_grad_by_freq, kept.sparse) == (3, 1.0, True, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    expected = model(IDS)
    halfbyte.quantize_(model, "nf4")
    assert model(IDS).dtype == dtype
    assert (model(IDS) - expected).norm() / expected.norm() < 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4"}, "format must be one of nf4, fp4, int8; got 'int4'"),
        ({"blocksize": 100}, "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096; got 100"),
        ({"blocksize": 64.0}, "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096; got 64.0"),
        ({"device": "bogus"}, "device 'bogus' cannot be used: "),
        ({"device": "meta"}, "device 'meta' cannot be used: "),
        ({"device": torch.device("meta"), "format": "int8"}, "device 'meta' cannot be used: "),
        ({"format": "int8", "nested": True}, "nested absmax is for nf4 and fp4; got format='int8'"),
        ({"format": "int8", "threshold": -1.0}, r"threshold must be 0 \(no outliers\) or positive; got -1.0"),
        ({"skip": ["("]}, "'\\(' is not a regular expression"),
        ({"skip": [".*"]}, "there is nothing to quantize: 3 layers skipped"),
        ({"filter": lambda name, module: False}, "there is nothing to quantize: 3 layers skipped"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(options: dict[str, object], message: str) -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(halfbyte.InputError, match=message):
        halfbyte.quantize_(model, **options)
    assert unchanged(model, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_changes_nothing() -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(halfbyte.InputError, match="device 'cuda' cannot be used: "):
        halfbyte.quantize_(model, device="cuda")
    assert unchanged(model, before)


def test_models_that_cannot_be_quantized_are_refused_and_stay_as_they_are() -> None:
    cases = [
        (nn.Sequential(nn.GELU()), "there is nothing to quantize: no Linear in this model"),
        (nn.Linear(64, 64), "a layer cannot be replaced in itself"),
        (
            nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).double()),
            "weights must be float32, float16, bfloat16; 1 is float64",
        ),
        (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta")), "1 is on meta"),
    ]
    for model, message in cases:
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(halfbyte.InputError, match=message):
            halfbyte.quantize_(model, "nf4")
        assert [type(module) for module in model.modules()] == kinds


def test_an_already_quantized_model_is_refused() -> None:
    model = build()
    halfbyte.quantize_(model, "nf4")
    before = fingerprint(model)
    with pytest.raises(halfbyte.InputError, match="quantized already: call dequantize_ first"):
        halfbyte.quantize_(model, "int8")
    assert unchanged(model, before)


def test_dequantizing_a_plain_model_is_refused() -> None:
    with pytest.raises(halfbyte.InputError, match="no quantized layer"):
        halfbyte.dequantize_(build())


def test_progress_bar_is_drawn_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    halfbyte.quantize_(build(), "nf4", progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    halfbyte.quantize_(build(), "nf4")
    assert capsys.readouterr().err == ""
