"""Every op keeps torch's rules: opcheck, fake kernels, gradients, compile, and the same result on every path."""

import contextlib
import math
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import halfbyte
from halfbyte import formats
from halfbyte import functional as F
from halfbyte import ops as op_table
from halfbyte.calling import planned as callers
from halfbyte.testing import cases

ops = torch.ops.halfbyte
PURE = [op for op in op_table.ALL if not cases.written(op)]  # tests/ops/test_optimizer.py has those that write
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TESTS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


def randn(*shape, dtype=torch.float32, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)


def int8(*shape):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def weight(n, k, nested=False, dtype=torch.float32, format="nf4", blocksize=64):
    """(packed, absmax, nested_absmax, nested_codebook, offset) of a random weight."""
    with halfbyte.use_backend("reference"):
        packed, state = F.quantize_4bit(randn(n, k, dtype=dtype), format=format, blocksize=blocksize, nested=nested)
    return packed.reshape(-1), state.absmax, *state.nested_tensors()


def linear_4bit_samples():
    for dtype in DTYPES:
        yield randn(3, 64, dtype=dtype, grad=True), *weight(8, 64), randn(8, dtype=dtype, grad=True), "nf4", 64, 8
    yield randn(2, 3, 70, grad=True), *weight(9, 70, nested=True), None, "nf4", 64, 9
    yield randn(64), *weight(8, 64, format="fp4", blocksize=32), randn(8), "fp4", 32, 8
    yield randn(3, 64), *weight(8, 64), randn(8, grad=True), "nf4", 64, 8
    yield randn(0, 64, grad=True), *weight(8, 64), None, "nf4", 64, 8


def linear_int8_samples():
    for dtype in DTYPES:
        yield randn(3, 64, dtype=dtype, grad=True), int8(8, 64), randn(8).abs(), randn(8, dtype=dtype), 0.0, "exact"
    yield randn(2, 3, 65, grad=True), int8(9, 65), randn(9).abs(), randn(9, grad=True), 1.5, "exact"
    yield randn(3, 64, grad=True), int8(8, 64), randn(8).abs(), None, 0.0, "w8a16"
    yield randn(64), int8(8, 64), randn(8).abs(), None, 6.0, "exact"
    yield randn(0, 64, grad=True), int8(8, 64), randn(8).abs(), None, 0.0, "exact"


DYNAMIC = formats.codebook("dynamic", CPU).clone()

SAMPLES = {
    "quantize_4bit": [
        *((randn(5, 33, dtype=dtype), format, 64) for dtype in DTYPES for format in formats.FORMATS),
        (randn(64, 64).t(), "nf4", 4096),
        (randn(0), "nf4", 64),
    ],
    "dequantize_4bit": [
        *((*weight(8, 64), "nf4", 64, [8, 64], dtype) for dtype in DTYPES),
        (*weight(9, 70, nested=True), "nf4", 64, [9, 70], torch.float32),
        (*weight(9, 71, format="fp4", blocksize=32), "fp4", 32, [9 * 71], torch.bfloat16),
        (*weight(0, 64), "nf4", 64, [0, 64], torch.float32),
    ],
    "linear_4bit": list(linear_4bit_samples()),
    "linear_4bit_backward": [
        *((randn(3, 8, dtype=dtype, grad=True), *weight(8, 64), "nf4", 64, 64) for dtype in DTYPES),
        (randn(2, 3, 9), *weight(9, 70, nested=True), "nf4", 64, 70),
    ],
    "quantize_8bit": [
        *((randn(5, 33, dtype=dtype), DYNAMIC, 64) for dtype in DTYPES),
        (randn(64, 4).t(), DYNAMIC, 100),
        (randn(0), DYNAMIC, 256),
    ],
    "dequantize_8bit": [
        *((int8(5, 33).view(torch.uint8), randn(3).abs(), DYNAMIC, 64, dtype) for dtype in DTYPES),
        (int8(6, 5).view(torch.uint8).t(), randn(1), DYNAMIC, 64, torch.float32),
    ],
    "quantize_int8_rows": [
        *((randn(5, 33, dtype=dtype), threshold) for dtype in DTYPES for threshold in (0.0, 1.0)),
        (randn(2, 3, 4), 0.0),
        (randn(7), 6.0),
        (randn(4, 6).t(), 0.0),
    ],
    "dequantize_int8": [
        (int8(5, 33), randn(5), None, None, torch.float32),
        (int8(5, 33).int(), randn(5), randn(33), randn(33), torch.float16),
        (int8(2, 5, 7), randn(10), None, randn(7).bfloat16(), torch.bfloat16),
        (int8(6, 5).t(), randn(5), None, None, torch.float32),
    ],
    "matmul_int8": [(int8(5, 33), int8(7, 33)), (int8(1, 8), int8(1, 8)), (int8(33, 5).t(), int8(7, 33))],
    "linear_int8": list(linear_int8_samples()),
}

EVERY = [pytest.param(name, args, id=f"{name}-{i}") for name, many in SAMPLES.items() for i, args in enumerate(many)]


def test_sizes_past_31_bits_are_ordinary():  # bitsandbytes bug 14; the kernels themselves: csrc/cpu/check/far.cpp
    n = 2**31 + 2
    x, table = torch.empty(n, dtype=torch.bfloat16, device="meta"), DYNAMIC.to("meta")
    packed, absmax = ops.quantize_4bit(x, "nf4", 64)
    assert (packed.shape, absmax.shape) == ((n // 2,), (n // 64 + 1,))
    assert ops.dequantize_4bit(packed, absmax, None, None, None, "nf4", 64, [n], x.dtype).shape == (n,)
    codes, absmax = ops.quantize_8bit(x, table, 256)
    assert (codes.shape, absmax.shape) == ((n,), (n // 256 + 1,))
    assert ops.dequantize_8bit(codes, absmax, table, 256, x.dtype).shape == (n,)


def same(a, b):
    """Same values; NaN equals NaN."""
    return all(
        torch.equal(one, other) or torch.allclose(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)
        for one, other in zip(as_tuple(a), as_tuple(b), strict=True)
    )


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("op", PURE, ids=lambda op: op.name)
def test_op_has_samples(op):
    assert SAMPLES[op.name], f"add samples for {op.name}"


def test_op_samples_are_of_known_ops():
    assert set(SAMPLES) == {op.name for op in PURE}


@pytest.mark.parametrize("op", PURE, ids=lambda op: op.name)
def test_op_names_its_facts_from_arguments_it_has(op):
    facts = op.Facts(*op.facts(*SAMPLES[op.name][0]))

    assert isinstance(facts.device, torch.device)
    hash(facts)


@pytest.mark.parametrize(("name", "args"), EVERY)
def test_op_passes_opcheck(backend, name, args):
    torch.library.opcheck(getattr(ops, name).default, args, test_utils=TESTS)


@pytest.mark.parametrize(("name", "args"), EVERY)
def test_fake_kernel_tells_shape_dtype_and_strides(backend, name, args):
    op = getattr(ops, name).default
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for one, other, real in zip(as_tuple(fake), as_tuple(meta), as_tuple(op(*args)), strict=True):
        described = real.shape, real.dtype, real.stride()
        assert (one.shape, one.dtype, one.stride()) == described
        assert (other.shape, other.dtype, other.stride()) == described
        assert one.device == real.device


@pytest.mark.parametrize(("name", "args"), EVERY)
def test_op_leaves_its_inputs_alone(backend, name, args):
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    before = [(t.detach().clone(), t._version) for t in tensors]

    getattr(ops, name)(*args)

    for tensor, (values, version) in zip(tensors, before):
        assert torch.equal(tensor, values)
        assert tensor._version == version


@pytest.mark.parametrize(("name", "args"), EVERY)
def test_result_shares_no_memory_with_an_input(backend, name, args):
    inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}

    for result in as_tuple(getattr(ops, name)(*args)):
        assert result.untyped_storage()._cdata not in inputs


@pytest.mark.parametrize(("name", "args"), EVERY)
def test_op_gives_the_same_in_every_mode(backend, name, args):
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    expected = getattr(ops, name)(*plain)

    assert same(callers[name](*plain), expected)  # the fast path of the functional layer
    assert same(tuple(t.detach() for t in as_tuple(getattr(ops, name)(*args))), expected)
    with torch.inference_mode():
        inside = [a.clone() if isinstance(a, torch.Tensor) else a for a in plain]
        assert same(getattr(ops, name)(*plain), expected)
        assert same(getattr(ops, name)(*inside), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(getattr(ops, name)(*plain), expected)
        assert same(callers[name](*plain), expected)


@pytest.mark.parametrize(("name", "args"), EVERY)
def test_op_is_deterministic(backend, name, args):
    assert same(getattr(ops, name)(*args), getattr(ops, name)(*args))


@pytest.mark.parametrize(("name", "args"), EVERY)
def test_op_agrees_with_the_reference(backend, name, args):
    record = next(op for op in PURE if op.name == name)
    found = as_tuple(getattr(ops, name)(*args))
    with halfbyte.use_backend("reference"):
        expected = as_tuple(getattr(ops, name)(*args))

    for one, other in zip(found, expected, strict=True):
        rtol, atol = record.tolerance.get(one.dtype, (0, 0))
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


def test_op_schema_has_no_defaults_and_aliases_only_what_it_writes():
    for op in op_table.ALL:
        schema = getattr(ops, op.name).default._schema
        assert not any(argument.has_default_value() for argument in schema.arguments)
        aliased = [argument.name for argument in schema.arguments if argument.alias_info]
        assert aliased == [schema.arguments[i].name for i in cases.written(op)]
        assert torch.Tag.pt2_compliant_tag in getattr(ops, op.name).default.tags


# -- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3)])
def test_linear_4bit_gradients_are_those_of_the_dequantized_weight(backend, leading, bias, nested, dtype):
    packed, state = F.quantize_4bit(randn(33, 70, dtype=dtype) / 8, nested=nested)
    x = randn(*leading, 70, dtype=dtype, seed=1, grad=True)
    b = randn(33, dtype=dtype, seed=2, grad=True) if bias else None
    dy = randn(*leading, 33, dtype=dtype, seed=3)

    F.linear_4bit(x, packed, state, b).backward(dy)

    w = F.dequantize_4bit(packed, state, dtype=torch.float32).double()
    exact = x.detach().double().requires_grad_()
    exact_b = b.detach().double().requires_grad_() if bias else None
    torch.nn.functional.linear(exact, w, exact_b).backward(dy.double())
    rtol, atol = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-2, 2e-2), torch.bfloat16: (4e-2, 8e-2)}[dtype]
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=rtol, atol=atol)
    if bias:
        torch.testing.assert_close(b.grad.double(), exact_b.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode", ["exact", "w8a16"])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_linear_int8_gradients_pass_straight_through_the_quantization(backend, leading, threshold, mode):
    q, absmax = int8(33, 70), randn(33).abs()
    x, b = randn(*leading, 70, seed=1, grad=True), randn(33, seed=2, grad=True)
    dy = randn(*leading, 33, seed=3)

    F.linear_int8(x, q, absmax, b, threshold=threshold, mode=mode).backward(dy)

    w = q.double() * absmax.double()[:, None] / 127
    torch.testing.assert_close(x.grad.double(), dy.double() @ w, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(b.grad.double(), dy.double().reshape(-1, 33).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["x", "bias"])
def test_linear_gradient_is_computed_only_where_wanted(backend, which):
    packed, state = F.quantize_4bit(randn(8, 64))
    x, b = randn(3, 64, grad=which == "x"), randn(8, grad=which == "bias")

    F.linear_4bit(x, packed, state, b).sum().backward()

    assert (x.grad is not None) == (which == "x")
    assert (b.grad is not None) == (which == "bias")


def test_linear_4bit_has_a_second_derivative(backend):
    packed, state = F.quantize_4bit(randn(8, 64))
    x = randn(3, 64, grad=True)
    dy = randn(3, 8, seed=1, grad=True)

    (dx,) = torch.autograd.grad(F.linear_4bit(x, packed, state), x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx, dy, torch.ones_like(dx))

    torch.testing.assert_close(ddy, F.linear_4bit(torch.ones(3, 64), packed, state))


def test_linear_4bit_passes_gradcheck_through_a_non_contiguous_gradient(backend):
    packed, state = F.quantize_4bit(randn(8, 64))
    x = randn(3, 64, grad=True)

    F.linear_4bit(x, packed, state).t().sum().backward()  # an expanded gradient, then transposed

    expected = F.dequantize_4bit(packed, state).sum(0).expand(3, 64)
    torch.testing.assert_close(x.grad, expected)


def test_quantize_has_no_gradient():
    x = randn(64, grad=True)

    packed, state = F.quantize_4bit(x)

    assert not packed.requires_grad
    assert not state.absmax.requires_grad
    assert not F.dequantize_4bit(packed, state).requires_grad


# -- compile -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    yield
    if "compile" in request.node.name:
        torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("nested", [False, True])
def test_compile_linear_4bit_in_one_graph(backend, nested):
    packed, state = F.quantize_4bit(randn(8, 64), nested=nested)
    bias = randn(8, grad=True)

    def f(x):
        return F.linear_4bit(x, packed, state, bias).relu()

    for x in (randn(3, 64, grad=True), randn(5, 64, grad=True)):
        found, expected = compiled(f)(x), f(x)
        torch.testing.assert_close(found, expected)
        grads = torch.autograd.grad(found.sum(), (x, bias)), torch.autograd.grad(expected.sum(), (x, bias))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", ["exact", "w8a16"])
def test_compile_linear_int8_in_one_graph(backend, mode):
    q, absmax = int8(8, 64), randn(8).abs()

    def f(x):
        return F.linear_int8(x, q, absmax, threshold=1.5, mode=mode) * 2

    x = randn(3, 64, grad=True)
    found, expected = compiled(f)(x), f(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", list(formats.FORMATS))
def test_compile_quantize_and_dequantize_4bit_in_one_graph(backend, format, nested):
    def f(x):
        packed, state = F.quantize_4bit(x, format=format, nested=nested)
        return packed, state.absmax, F.dequantize_4bit(packed, state)

    x = randn(33, 65)
    for one, other in zip(compiled(f)(x), f(x)):
        assert torch.equal(one, other)


def test_compile_quantize_8bit_and_int8_rows_in_one_graph(backend):
    def f(x):
        codes, state = F.quantize_8bit(x)
        q, absmax, _ = F.quantize_int8_rows(x, threshold=1.0)
        return F.dequantize_8bit(codes, state) + F.dequantize_int8(q, absmax)

    x = randn(33, 65)
    assert torch.equal(compiled(f)(x), f(x))


def test_compile_with_dynamic_batch_does_not_recompile(backend):
    packed, state = F.quantize_4bit(randn(8, 64))
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    f = torch.compile(lambda x: F.linear_4bit(x, packed, state), fullgraph=True, backend=counting, dynamic=True)
    for m in (2, 3, 5, 8):
        assert f(randn(m, 64)).shape == (m, 8)

    assert len(graphs) == 1


def test_compiled_graph_follows_use_backend_without_recompiling(stub_backend):
    acme, graphs = stub_backend("acme", ops=("linear_4bit",)), []
    packed, state = F.quantize_4bit(randn(8, 64))
    x = randn(3, 64)

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    f = torch.compile(lambda x: F.linear_4bit(x, packed, state), fullgraph=True, backend=counting)
    with halfbyte.use_backend("reference"):
        f(x)
    assert acme.calls == []
    with halfbyte.use_backend("acme"):
        f(x)
    assert acme.calls == ["linear_4bit"]
    halfbyte.set_backend("acme")
    f(x)
    assert acme.calls == ["linear_4bit"] * 2
    halfbyte.set_backend(None)
    with halfbyte.use_backend("reference"):
        f(x)

    assert acme.calls == ["linear_4bit"] * 2
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_export_keeps_one_op(backend):
    packed, state = F.quantize_4bit(randn(8, 64))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", packed)
            self.register_buffer("absmax", state.absmax)

        def forward(self, x):
            return ops.linear_4bit(x, self.packed, self.absmax, None, None, None, None, "nf4", 64, 8)

    layer = Layer()
    exported = torch.export.export(layer, (randn(3, 64),))

    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == [ops.linear_4bit.default]
    assert torch.equal(exported.module()(randn(3, 64)), layer(randn(3, 64)))


# -- the fast path of the functional layer -------------------------------------------------------------------


class Recording(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("watched", [False, True])
def test_functional_shows_its_op_to_a_dispatch_mode(backend, watched):
    packed, state = F.quantize_4bit(randn(8, 64))
    x = randn(3, 64)
    with Recording() if watched else contextlib.nullcontext() as mode:
        y = F.linear_4bit(x, packed, state)

    assert torch.equal(y, ops.linear_4bit(x, packed.reshape(-1), state.absmax, None, None, None, None, "nf4", 64, 8))
    assert not watched or ops.linear_4bit.default in mode.seen


def test_functional_on_fake_tensors_runs_no_kernel(stub_backend):
    acme = stub_backend("acme")
    with FakeTensorMode():
        packed, state = F.quantize_4bit(torch.empty(8, 64), nested=True)
        y = F.linear_4bit(torch.empty(3, 64), packed, state)
        codes, state8 = F.quantize_8bit(torch.empty(8, 64))
        F.dequantize_8bit(codes, state8)

    assert y.shape == (3, 8)
    assert acme.calls == []
    assert type(formats.levels("nf4", CPU)) is torch.Tensor  # no fake table was remembered
    assert type(formats.codebook("dynamic", CPU)) is torch.Tensor


def test_functional_on_meta_tensors_runs_no_kernel(stub_backend):
    acme = stub_backend("acme", device_types=("cpu", "meta"))
    packed, state = F.quantize_4bit(torch.empty(8, 64, device="meta"))

    y = F.linear_4bit(torch.empty(3, 64, device="meta"), packed, state)

    assert (y.shape, y.device.type) == ((3, 8), "meta")
    assert acme.calls == []


def test_functional_traces_its_op_under_make_fx(backend):
    packed, state = F.quantize_4bit(randn(8, 64))
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: F.linear_4bit(x, packed, state))(randn(3, 64))

    assert any(node.target is ops.linear_4bit.default for node in traced.graph.nodes)


def test_functional_under_a_default_device_keeps_the_tensors_device(backend):
    with torch.device("meta"):
        formats._build.cache_clear()
        packed, state = F.quantize_4bit(torch.ones(64, device="cpu"))

    assert packed.device == state.absmax.device == state.code.device == CPU


def test_functional_in_inference_mode_gives_what_later_serves_training(backend):
    with torch.inference_mode():
        packed, state = F.quantize_4bit(randn(8, 64))
    x = randn(3, 64, grad=True)

    with pytest.raises(RuntimeError, match="nference"):  # torch's own rule: saved tensors may not be of that mode
        F.linear_4bit(x, packed, state)
    packed, state.absmax = packed.clone(), state.absmax.clone()
    F.linear_4bit(x, packed, state).sum().backward()

    assert x.grad is not None


def test_ops_run_from_several_threads(backend):
    packed, state = F.quantize_4bit(randn(64, 64))
    expected, wrong = F.dequantize_4bit(packed, state), []

    def work():
        for _ in range(50):
            if not torch.equal(F.dequantize_4bit(packed, state), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong


@pytest.mark.parametrize("call", ["quantize_4bit", "quantize_8bit", "quantize_int8_rows"])
def test_functional_takes_parameters(backend, call):
    parameter = torch.nn.Parameter(randn(8, 64))

    found = getattr(F, call)(parameter)[0]

    assert torch.equal(found, getattr(F, call)(parameter.detach())[0])
    assert math.prod(found.shape) > 0
