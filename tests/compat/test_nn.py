"""Parametrized parameters, outlier tracing and the helpers of utils."""

import copy
import sys

import pytest
import torch
import torch.nn.utils.parametrize as P
from torch import nn

import halfbyte
from halfbyte.compat.bitsandbytes import functional as F
from halfbyte.compat.bitsandbytes import utils
from halfbyte.compat.bitsandbytes.nn import Linear4bit, OutlierAwareLinear, modules
from halfbyte.compat.bitsandbytes.nn import parametrize as parametrize_4bit
from halfbyte.outliers import OutlierTracer


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Experts(nn.Module):
    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        self.experts = nn.Parameter(randn(4, 32, 64, dtype=dtype, seed=seed))
        self.scale = nn.Parameter(torch.ones(64))
        self.plain = torch.zeros(3)

    def forward(self, x):
        return x @ self.experts[0] + (x @ self.experts[1]) * self.scale


# -- parametrize ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameter_reads_as_its_dequantized_self(nested, quant_type, dtype):
    module = Experts(dtype)
    packed, state = F.quantize_4bit(module.experts.data, quant_type=quant_type, compress_statistics=nested)

    parametrize_4bit.replace_parameter_4bit(module, "experts", nested, quant_type)

    assert torch.equal(module.experts, F.dequantize_4bit(packed, state))
    assert module.parametrizations.experts.original.dtype == torch.uint8
    assert module.parametrizations.experts[0].quant_state == state


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint_is_that_of_a_quantized_weight_and_loads_again(nested):
    module, other = Experts(), Experts(seed=1)
    for one in (module, other):
        parametrize_4bit.replace_parameter_4bit(one, "experts", nested, blocksize=128)
    wrapped = nn.ModuleDict({"layer": module})
    saved = wrapped.state_dict()
    entries = ["absmax", "quant_map", "quant_state.bitsandbytes__nf4"]
    entries += ["nested_absmax", "nested_quant_map"] * nested
    assert set(saved) == {"layer.experts", "layer.scale", *(f"layer.experts.{one}" for one in entries)}

    nn.ModuleDict({"layer": other}).load_state_dict(saved)

    assert torch.equal(other.experts, module.experts)
    plain = Experts()
    plain.experts = nn.Parameter(saved["layer.experts"], requires_grad=False)
    statistics = {key: value for key, value in saved.items() if key.startswith("layer.experts.")}
    parametrize_4bit.replace_parameter_4bit_prequantized(plain, "experts", statistics, torch.device("cpu"))
    assert torch.equal(plain.experts, module.experts)


def test_checkpoint_of_another_shape_is_refused_and_nothing_is_written():
    module, other = Experts(), Experts()
    other.experts = nn.Parameter(randn(2, 64, 64))
    for one in (module, other):
        parametrize_4bit.replace_parameter_4bit(one, "experts")
    before = module.experts.clone()

    with pytest.raises(RuntimeError, match=r"experts: shape must be \(4, 32, 64\); got \(2, 64, 64\)"):
        module.load_state_dict(other.state_dict())
    assert torch.equal(module.experts, before)


def test_parametrized_module_moves_copies_and_casts():
    module = Experts()
    parametrize_4bit.replace_parameter_4bit(module, "experts", True)
    expected = module.experts.clone()

    module.half()
    twin = copy.deepcopy(module)

    assert torch.equal(module.experts, expected)
    assert torch.equal(twin.experts, expected)
    assert (
        twin.parametrizations.experts[0].quant_state.absmax is not module.parametrizations.experts[0].quant_state.absmax
    )
    module.to("meta")
    assert module.parametrizations.experts[0].quant_state.absmax.device.type == "cpu"


def test_parameter_is_dequantized_once_in_a_forward(monkeypatch):
    module, calls = Experts(), []
    parametrize_4bit.replace_parameter_4bit(module, "experts")
    forward = parametrize_4bit.Bnb4bitParametrization.forward
    monkeypatch.setattr(
        parametrize_4bit.Bnb4bitParametrization,
        "forward",
        lambda self, packed: calls.append(1) or forward(self, packed),
    )

    module(randn(2, 32))

    assert calls == [1]
    assert not P._cache_enabled
    assert not P._cache
    with pytest.raises(RuntimeError, match="shape"):
        module(randn(2, 31))
    assert not P._cache_enabled
    parametrize_4bit._disable_parametrization_cache(module, (), None)
    assert P._cache_enabled == 0


def test_gradients_pass_by_a_parametrized_parameter():
    module = Experts()
    parametrize_4bit.replace_parameter_4bit(module, "experts")
    x = randn(2, 32).requires_grad_()

    module(x).sum().backward()

    torch.testing.assert_close(x.grad, (module.experts[0] + module.experts[1]).sum(1).expand(2, 32))


@pytest.mark.parametrize(("name", "kind"), [("nothing", AttributeError), ("plain", TypeError)])
def test_what_is_no_parameter_is_refused_as_there(name, kind):
    with pytest.raises(kind, match=name):
        parametrize_4bit.replace_parameter_4bit(Experts(), name)
    with pytest.raises(kind, match=name):
        parametrize_4bit.replace_parameter_4bit_prequantized(Experts(), name, {}, torch.device("cpu"))


# -- states that FSDP drops ----------------------------------------------------------------------------------


def test_state_of_a_weight_can_be_restored_from_its_layer():
    layer = Linear4bit(64, 32).to("cpu")
    state, layer.weight.quant_state = layer.weight.quant_state, None

    modules.fix_4bit_weight_quant_state_from_module(layer)

    assert layer.weight.quant_state is state
    with pytest.raises(halfbyte.InputError, match="not quantized yet"):
        modules.fix_4bit_weight_quant_state_from_module(Linear4bit(64, 32))


# -- outliers ------------------------------------------------------------------------------------------------


@pytest.fixture
def tracer():
    tracer = OutlierTracer.get_instance()
    yield tracer
    for hook in tracer.__dict__.pop("hooks", ()):
        hook.remove()


@pytest.mark.parametrize("options", [{}, {"reduction_dim": 1}, {"topk": 3}, {"zscore": 1.0}])
def test_outlier_dims_are_theirs(oracle, options):
    weight = randn(64, 48)
    weight[:, 5] *= 40
    weight[7] *= 60

    found = utils.find_outlier_dims(weight, **options)

    theirs = oracle.find_outlier_dims(weight, **options)
    assert sorted(found.tolist()) == sorted(theirs.tolist())


def test_random_dims_need_a_number():
    assert utils.find_outlier_dims(randn(8, 16), topk=3, rdm=True).shape == (3,)
    with pytest.raises(halfbyte.InputError, match="rdm needs topk"):
        utils.find_outlier_dims(randn(8, 16), rdm=True)


def test_tracer_tells_the_inputs_that_the_layer_before_writes(tracer):
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    with torch.no_grad():
        model[0].weight[11] *= 200
    assert not tracer.is_initialized()
    tracer.initialize(model)
    x = randn(4, 32)
    x[:, 3] = 9.0

    model(x)

    assert 3 in tracer.get_outliers(model[0].weight)
    assert tracer.get_outliers(model[2].weight).tolist() == [11]
    assert tracer.get_outliers(torch.zeros(1)) is None
    assert utils.OutlierTracer is modules.OutlierTracer is OutlierTracer
    with pytest.raises(RuntimeError, match="get_instance"):
        OutlierTracer()


def test_outlier_aware_layer_quantizes_once_around_its_outliers(tracer):
    class Halved(OutlierAwareLinear):
        def quantize_weight(self, w, outlier_idx):
            return w / 2

        def forward_with_outliers(self, x, outlier_idx):
            return nn.functional.linear(x, self.weight, self.bias), outlier_idx

    layer = Halved(16, 8)
    with pytest.raises(halfbyte.InputError, match="initialize"):
        layer(randn(2, 16))
    tracer.initialize(nn.Sequential(layer))
    expected = layer.weight / 2
    x = randn(2, 16)
    x[0, 2] = 50.0

    for _ in range(2):
        y, outliers = layer(x)

    assert torch.equal(layer.weight, expected)
    assert 2 in outliers
    assert torch.equal(y, nn.functional.linear(x, expected, layer.bias))
    for method, args in (("quantize_weight", 2), ("forward_with_outliers", 2)):
        with pytest.raises(NotImplementedError, match=method):
            getattr(OutlierAwareLinear(4, 4), method)(*[None] * args)


# -- utils ---------------------------------------------------------------------------------------------------


def test_dictionaries_are_packed_into_tensors():
    packed = utils.pack_dict_to_tensor({"a": 1, "b": [1.5, "ä"]})

    assert packed.dtype == torch.uint8
    assert utils.unpack_tensor_to_dict(packed) == {"a": 1, "b": [1.5, "ä"]}
    for bad in (torch.zeros(3, dtype=torch.uint8), utils.pack_dict_to_tensor([1])):
        with pytest.raises(ValueError, match="JSON"):
            utils.unpack_tensor_to_dict(bad)


def test_replace_linear_replaces_all_but_the_named():
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2, bias=False)), "lm_head": nn.Linear(8, 8)}
    )
    weight = model["a"][0].weight

    done = utils.replace_linear(model, lambda n, m, bias: Linear4bit(n, m, bias=bias), copy_weights=True)

    assert done is model
    assert type(model["lm_head"]) is nn.Linear
    assert type(model["a"][0]) is type(model["a"][1]) is Linear4bit
    assert model["a"][0].weight is weight
    assert model["a"][1].bias is None


def test_sync_gpu_is_nothing_on_the_host():
    utils.sync_gpu(torch.zeros(1))


def test_command_is_run_without_a_shell_and_its_output_comes_back(tmp_path):
    script = tmp_path / "say it.py"
    script.write_text("import sys; print(sys.argv[1:]); print('ä;', file=sys.stderr)")

    found = utils.execute_and_return(f'{sys.executable} -X utf8 "{script}" "a b" $HOME ;')

    assert found == ("['a b', '$HOME', ';']", "ä;")


@pytest.mark.parametrize("layout", [0, "row", torch.tensor(0, dtype=torch.uint8)])
def test_layout_of_rows_is_taken_out_of_a_checkpoint(layout):
    checkpoint = {"a.weight": torch.zeros(2, 4, dtype=torch.int8), "a.weight_format": layout}

    modules.maybe_rearrange_weight(checkpoint, "a.", {}, True, [], [], [])

    assert list(checkpoint) == ["a.weight"]


@pytest.mark.parametrize("layout", ["col32", 2, torch.tensor(3)])
def test_layout_of_columns_is_refused(layout):
    checkpoint = {"a.weight": torch.zeros(2, 4, dtype=torch.int8), "a.weight_format": layout}

    with pytest.raises(ValueError, match="weight_format must be 0 or 'row'"):
        modules.maybe_rearrange_weight(checkpoint, "a.", {}, True, [], [], [])


def test_checkpoint_without_the_layer_is_left_as_it_is():
    checkpoint = {"a.weight_format": "col32"}

    modules.maybe_rearrange_weight(checkpoint, "a.", {}, True, [], [], [])

    assert checkpoint == {"a.weight_format": "col32"}
