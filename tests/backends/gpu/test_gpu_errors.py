"""A launcher that reports a device error: one exception with the driver's words, inputs as they were, nothing kept.

The module here raises what csrc/gpu/binding.h makes of a launcher's text, and otherwise computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch

import halfbyte
from halfbyte import formats, functional, native_gpu, native_gpu_optimizer, nn, optim

SAID = "an illegal memory access was encountered"


class Module:
    """A _C whose functions raise while `broken`."""

    few_rows, UPDATE_FIELDS, UPDATE_TENSOR_BYTES, COEFFICIENTS_BYTES = 16, 9, 128, 64

    def __init__(self) -> None:
        self.broken = True

    def __getattr__(self, name: str) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            if self.broken:
                raise RuntimeError(SAID)

        return launch

    def int8_workspace(self, m: int, k: int) -> int:
        return 1

    def update_chunks(self, fields: int, count: int) -> int:
        return 1


@pytest.fixture
def device(stub_backend):
    """The module of the backend that serves every op."""
    module = Module()
    kernels = [*native_gpu.kernels(module), *native_gpu_optimizer.kernels(module)]
    stub_backend("faulty", kernels=kernels)
    return module


def weight(nested=False):
    with halfbyte.use_backend("reference"):
        return functional.quantize_4bit(torch.randn(32, 64), nested=nested)


def packed_arguments(nested=False):
    packed, state = weight(nested)
    return packed.view(-1), state.absmax, *state.nested_tensors()


def update_arguments(quantized):
    lists = [[torch.randn(300)] for _ in range(2)]
    hyper = torch.tensor(1.0), torch.tensor(0.1), None, [0.9, 0.99, 0.0], 1e-8, 0.0, 0.0, 0, 0, 0.0, False, []
    if not quantized:
        return "adam", *lists, [torch.zeros(300)], [torch.zeros(300)], *hyper
    signed, unsigned = (formats.codebook(name, torch.device("cpu")) for name in ("dynamic", "dynamic_unsigned"))
    codes, absmax = ([torch.zeros(300, dtype=torch.uint8)] for _ in range(2)), ([torch.zeros(2)] for _ in range(2))
    first, second = zip(codes, absmax, strict=True)
    return "adam", *lists, *first, signed, *second, unsigned, 256, *hyper


ROWS = torch.ones(32, 64, dtype=torch.int8)
CALLS = {
    "quantize_4bit": lambda: (torch.randn(64), "nf4", 64),
    "dequantize_4bit": lambda: (*packed_arguments(), "nf4", 64, [32, 64], torch.float32),
    "dequantize_4bit nested": lambda: (*packed_arguments(True), "nf4", 64, [32, 64], torch.float32),
    "linear_4bit of few rows": lambda: (torch.randn(2, 64), *packed_arguments(), torch.randn(32), "nf4", 64, 32),
    "linear_4bit of many rows": lambda: (torch.randn(40, 64), *packed_arguments(), torch.randn(32), "nf4", 64, 32),
    "linear_4bit_backward": lambda: (torch.randn(2, 32), *packed_arguments(), "nf4", 64, 64),
    "quantize_8bit": lambda: (torch.randn(256), formats.codebook("dynamic", torch.device("cpu")), 256),
    "dequantize_8bit": lambda: (
        *(torch.zeros(256, dtype=torch.uint8), torch.ones(1)),
        *(formats.codebook("dynamic", torch.device("cpu")), 256, torch.float32),
    ),
    "quantize_int8_rows": lambda: (torch.randn(4, 64), 6.0),
    "dequantize_int8": lambda: (ROWS.clone(), torch.ones(32), None, None, torch.float32),
    "matmul_int8": lambda: (ROWS.clone(), ROWS.clone()),
    "linear_int8 exact": lambda: (torch.randn(4, 64), ROWS.clone(), torch.ones(32), torch.randn(32), 6.0, "exact"),
    "linear_int8 w8a16": lambda: (torch.randn(40, 64), ROWS.clone(), torch.ones(32), None, 0.0, "w8a16"),
    "update_32bit": lambda: update_arguments(False),
    "update_8bit": lambda: update_arguments(True),
}


def tensors(args):
    flat = [one for arg in args for one in (arg if isinstance(arg, list) else [arg])]
    return [one for one in flat if isinstance(one, torch.Tensor)]


def test_every_native_op_is_here():
    module = Module()
    native = {one.op for one in (*native_gpu.kernels(module), *native_gpu_optimizer.kernels(module))}
    assert {name.split()[0] for name in CALLS} == native


@pytest.mark.parametrize("name", CALLS)
def test_a_device_error_is_one_exception_and_changes_no_input(device, name):
    op = name.split()[0]
    args = CALLS[name]()
    before = [(one.clone(), one._version) for one in tensors(args)]

    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.halfbyte, op).default(*args)

    assert str(caught.value) == SAID
    assert caught.value.__cause__ is caught.value.__context__ is None
    for one, (values, version) in zip(tensors(args), before, strict=True):
        assert torch.equal(one, values)
        assert one._version == version or op.startswith("update")  # of what an op may write torch counts the call
    assert halfbyte.explain(op, *args).backend == "faulty"  # not a reason to compute with something slower

    device.broken = False
    getattr(torch.ops.halfbyte, op).default(*args)


@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_a_layer_raises_it_in_each_call_until_the_device_works(device, kind, wants_gradient):
    with halfbyte.use_backend("reference"):
        made = nn.LinearNF4(64, 32) if kind == "4 bits" else nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        layer = made.to("cpu")
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(2, 64, requires_grad=wants_gradient)
    for broken in (False, True, True, False):  # a first call would not have been bound to the weight yet
        device.broken = broken
        with torch.set_grad_enabled(wants_gradient):
            if not broken:
                layer(x)
                continue
            with pytest.raises(RuntimeError, match=f"^{SAID}$"):
                layer(x)
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


def test_a_backward_raises_it_and_leaves_no_gradient(device):
    with halfbyte.use_backend("reference"):
        layer = nn.LinearNF4(64, 32).to("cpu")
    device.broken = False
    x = torch.randn(2, 64, requires_grad=True)
    y = layer(x)
    device.broken = True

    with pytest.raises(RuntimeError, match=f"^{SAID}$"):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("bits", [8, 32])
def test_a_step_that_the_device_failed_is_not_counted(device, bits):
    params = [torch.nn.Parameter(torch.randn(5000)) for _ in range(2)]
    optimizer = optim.AdamW(params, lr=0.1, optim_bits=bits)
    for param in params:
        param.grad = torch.randn(5000)
    with halfbyte.use_backend("reference"):
        optimizer.step()
    kept = [(param.detach().clone(), {**optimizer.state[param]}) for param in params]

    with pytest.raises(RuntimeError, match=f"^{SAID}$"):
        optimizer.step()

    for param, (values, state) in zip(params, kept, strict=True):
        assert torch.equal(param, values)
        assert optimizer.state[param]["step"] == state["step"] == 1
    with halfbyte.use_backend("reference"):
        optimizer.step()
    assert all(optimizer.state[param]["step"] == 2 for param in params)


@pytest.mark.parametrize("lanes", emulated.LANES)
def test_a_launcher_that_refuses_is_a_runtime_error_with_its_words(lanes):
    c = emulated.module(lanes)
    if c is None:
        pytest.skip("built without HALFBYTE_EMULATE=ON")
    with pytest.raises(RuntimeError, match=r"^dtype must be float32, float16 or bfloat16$"):
        c.quantize_4bit(0, 7, 64, 0, 64, 0, 0, -1, 0)
