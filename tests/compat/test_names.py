"""The names of bitsandbytes: each is served with its signature, or listed here and in the docs with a reason."""

import importlib
import inspect
from pathlib import Path

import pytest

import halfbyte
from halfbyte.compat.bitsandbytes import functional as F

PAGE = Path(__file__).resolve().parents[2] / "docs/pages/drop-in.md"

MODULES = [
    "functional",
    "nn",
    "nn.modules",
    "nn.parametrize",
    "optim",
    "optim.adagrad",
    "optim.adam",
    "optim.adamw",
    "optim.ademamix",
    "optim.lamb",
    "optim.lars",
    "optim.lion",
    "optim.optimizer",
    "optim.rmsprop",
    "optim.sgd",
    "autograd",
    "autograd._functions",
    "cextension",
    "utils",
]

LIBRARY = "halfbyte's native modules are not that shared library"
MODULES_NOT_SERVED = {
    "_ops": "declares the operators, which `torch.ops.bitsandbytes` has",
    "backends": "bitsandbytes' kernels; halfbyte's backends are plugins",
    "consts": LIBRARY,
    "cuda_specs": LIBRARY,
    "diagnostics": "`python -m bitsandbytes` is `halfbyte doctor`",
}
NAMES_NOT_SERVED = {
    "functional.CUBLAS_Context": "a handle of that shared library",
    **dict.fromkeys(
        (
            *("cextension.BNBNativeLibrary", "cextension.CudaBNBNativeLibrary", "cextension.XpuBNBNativeLibrary"),
            *("cextension.ErrorHandlerMockBNBNativeLibrary", "cextension.get_native_library"),
            *("cextension.get_cuda_bnb_library_path", "cextension.get_xpu_bnb_library_path"),
            *("cextension.get_available_cuda_binary_versions", "cextension.parse_cuda_version"),
        ),
        LIBRARY,
    ),
}
# Constructed by `apply`; by its own arguments; the base of no other class.
OTHER_ARGUMENTS = {"MatMul4Bit", "MatMul8bitFp", "MatMul8bitLt", "QuantState", "Optimizer8bit"}
# Arguments of our own behind theirs.
OWN = {"dtype", "CxB", "threshold", "has_fp16_weights", "is_training", "use_pool"}
OWN_OPTIONS = {"fused_clip", "stochastic_rounding", "capturable"}


def named(module, name):
    path = f"halfbyte.compat.bitsandbytes.{module}"
    return getattr(__import__(path, fromlist=[name]), name)


def parameters(one):
    if inspect.isclass(one):
        made = one.__new__ if "__new__" in vars(one) and "__init__" not in vars(one) else one.__init__
        skip = 1
    else:
        made, skip = one, 0
    every = list(inspect.signature(made).parameters.values())[skip:]
    return [
        (one.name, "" if one.default is one.empty else repr(one.default))
        for one in every
        if one.kind is not one.VAR_KEYWORD and one.name not in OWN_OPTIONS
    ]


def test_every_module_is_served_or_listed_with_a_reason(oracle):
    found = {name.removeprefix("bitsandbytes.") for name in oracle.modules()}

    assert found == {*MODULES, *MODULES_NOT_SERVED}


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_served_with_its_signature(oracle, module):
    theirs = oracle.signatures(f"bitsandbytes.{module}")

    for name, expected in theirs.items():
        if f"{module}.{name}" in NAMES_NOT_SERVED:
            continue
        one = named(module, name)
        if name in OTHER_ARGUMENTS:
            continue
        found = parameters(one)
        plain = [one for one in expected if one[0] != "kwargs"]
        assert [key for key, _ in found[: len(plain)]] == [key for key, _ in plain], name
        assert {key for key, _ in found[len(plain) :]} <= OWN, name
        for (key, default), (_, wanted) in zip(found, plain):
            if (name, key) in {("from_prequantized", "device"), ("get_instance", "cls")}:
                continue
            assert default in (wanted, wanted.replace("<class 'bitsandbytes", "<class 'halfbyte")) or (
                float(default) == float(wanted)
            ), (name, key)


@pytest.mark.parametrize("name", MODULES_NOT_SERVED)
def test_module_that_is_not_served_is_missing_and_on_the_page(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"halfbyte.compat.bitsandbytes.{name}")
    assert f"| `bitsandbytes.{name}` | {MODULES_NOT_SERVED[name]} |" in PAGE.read_text()


@pytest.mark.parametrize("name", NAMES_NOT_SERVED)
def test_name_that_is_not_served_is_missing_and_on_the_page(oracle, name):
    module, _, attribute = name.rpartition(".")
    (row,) = [one for one in PAGE.read_text().splitlines() if f"`{attribute}`" in one]

    assert attribute in oracle.signatures(f"bitsandbytes.{module}")
    assert not hasattr(importlib.import_module(f"halfbyte.compat.bitsandbytes.{module}"), attribute)
    assert row.startswith(f"| `bitsandbytes.{module}`:")
    assert row.endswith(f"| {NAMES_NOT_SERVED[name]} |")


def test_classes_are_those_of_halfbyte():
    from halfbyte.compat.bitsandbytes import nn, optim, surface

    for name in halfbyte.nn.__all__:
        if name != "MatmulLtState":
            assert getattr(nn, name) is getattr(halfbyte.nn, name)
    assert surface.MatmulLtState is halfbyte.nn.MatmulLtState
    assert F.QuantState is halfbyte.QuantState
    assert optim.GlobalOptimManager is halfbyte.optim.GlobalOptimManager
    assert surface.features == {"multi_backend"}
    assert "cpu" in surface.supported_torch_devices
