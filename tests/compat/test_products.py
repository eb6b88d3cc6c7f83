"""matmul_4bit and matmul: against the real bitsandbytes, with gradients, and as vLLM calls them."""

import pytest
import torch

from halfbyte.compat.bitsandbytes import functional as F
from halfbyte.compat.bitsandbytes import nn, surface
from halfbyte.compat.bitsandbytes.autograd import _functions

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- 4 bit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_4bit_is_theirs_with_its_gradient(oracle, dtype, nested, transposed):
    packed, state = F.quantize_nf4(randn(48, 128, dtype=dtype), compress_statistics=nested)
    x, bias, grad = (randn(*shape, dtype=dtype, seed=1) for shape in ((2, 5, 128), (48,), (2, 5, 48)))

    leaf = x.clone().requires_grad_()
    y = surface.matmul_4bit(leaf, packed.t() if transposed else packed, state, bias=bias)
    y.backward(grad)
    theirs, gradient = oracle.matmul_4bit(x, packed, state.as_dict(), transposed, bias, grad)

    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(y.detach(), theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(leaf.grad, gradient, rtol=tolerance, atol=tolerance)


def test_matmul_4bit_has_a_gradient_for_the_bias_and_none_for_the_weight():
    packed, state = F.quantize_nf4(randn(48, 128))
    bias = torch.zeros(48, requires_grad=True)

    surface.matmul_4bit(randn(3, 128), packed, state, bias=bias).sum().backward()

    assert torch.equal(bias.grad, torch.full((48,), 3.0))


def test_matmul_4bit_casts_the_bias_and_writes_to_out():
    packed, state = F.quantize_nf4(randn(48, 128))
    x, out = randn(3, 128, dtype=torch.bfloat16), torch.empty(3, 48, dtype=torch.bfloat16)

    y = surface.matmul_4bit(x, packed, state, out, torch.ones(48))

    assert y is out
    assert torch.equal(y, surface.matmul_4bit(x, packed, state, bias=torch.ones(48, dtype=torch.bfloat16)))


@pytest.mark.parametrize("grad", [False, True])
def test_weights_quantized_the_other_way_round_warn_and_work(grad):
    weight = randn(128, 48)
    packed, state = F.quantize_nf4(weight, compress_statistics=True)
    x = randn(5, 128, seed=1).requires_grad_(grad)

    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        y = surface.matmul_4bit(x, packed, state, bias=torch.ones(48))

    whole = F.dequantize_4bit(packed, state)
    torch.testing.assert_close(y, x @ whole + 1, rtol=1e-4, atol=1e-4)
    if grad:
        y.sum().backward()
        torch.testing.assert_close(x.grad, whole.sum(1).expand(5, 128), rtol=1e-4, atol=1e-4)


def test_slices_of_a_plain_column_work_as_vllm_passes_them():
    parts = [F.quantize_nf4(randn(rows, 64, seed=rows), compress_statistics=True) for rows in (32, 16)]
    column = torch.cat([packed for packed, _ in parts])
    x, begin = randn(3, 64, dtype=torch.bfloat16), 0

    for packed, state in parts:
        piece = column[begin : begin + packed.numel()]
        begin += packed.numel()
        out = torch.empty(3, state.shape[0], dtype=torch.bfloat16)
        out[:] = surface.matmul_4bit(x, piece.t(), state)
        torch.testing.assert_close(out, x @ F.dequantize_4bit(packed, state).bfloat16().t(), rtol=4e-2, atol=4e-2)
        state.absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.nested = False
        state.offset = state.state2 = None
        torch.testing.assert_close(surface.matmul_4bit(x, piece.t(), state), out, rtol=4e-2, atol=4e-2)


def test_empty_batches_and_the_class_work():
    packed, state = F.quantize_nf4(randn(48, 128))

    assert surface.matmul_4bit(torch.empty(0, 128), packed, state).shape == (0, 48)
    x = randn(2, 128)
    y = _functions.MatMul4Bit.apply(x, packed, None, None, state)
    assert torch.equal(y, surface.matmul_4bit(x, packed, state))
    with pytest.raises(ValueError, match="quant_state=None"):
        surface.matmul_4bit(x, packed, None)


def test_evaluating_a_layer_changes_neither_its_weight_nor_later_gradients():
    layer = nn.Linear4bit(96, 33, quant_type="nf4").to("cpu").eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = randn(2, 96, dtype=torch.bfloat16, seed=1).requires_grad_()

    with torch.no_grad():
        layer(x)

    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    whole = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad.float(), whole.sum(0).expand(2, 96), rtol=4e-2, atol=4e-2)


# -- LLM.int8() ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_matmul_is_theirs(oracle, threshold, has_fp16_weights):
    x, weight, bias = (randn(*shape, dtype=torch.float16, seed=1) for shape in ((5, 64), (24, 64), (24,)))
    state = surface.MatmulLtState()
    state.has_fp16_weights = has_fp16_weights

    y = surface.matmul(x, weight, state=state, threshold=threshold, bias=bias)

    torch.testing.assert_close(
        y, oracle.matmul(x.clone(), weight, bias, threshold, has_fp16_weights), rtol=1e-2, atol=3e-2
    )
    assert state.threshold == threshold
    assert (state.CB is None) == has_fp16_weights


def test_matmul_has_gradients_for_three_dimensions_and_trained_weights():
    x, weight, bias = randn(2, 3, 64).requires_grad_(), randn(24, 64).requires_grad_(), torch.zeros(24)
    bias.requires_grad_()

    surface.matmul(x, weight, bias=bias).sum().backward()

    assert torch.equal(bias.grad, torch.full((24,), 6.0))
    torch.testing.assert_close(weight.grad, x.detach().reshape(-1, 64).sum(0).expand(24, 64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(2, 3, 64), rtol=0.1, atol=0.2)


def test_rows_come_from_the_state_or_the_parameter():
    weight = nn.Int8Params(randn(24, 64), requires_grad=False).to("cpu")
    x = randn(3, 64)
    expected = surface.matmul(x, weight, state=surface.MatmulLtState(has_fp16_weights=False))

    state = surface.MatmulLtState(CB=weight.data, SCB=weight.SCB, has_fp16_weights=False)
    state.use_pool = True
    state.is_training = False
    state.anything_else = 1

    assert torch.equal(surface.matmul(x, torch.empty(0), state=state), expected)
    assert state.CxB is None
    assert torch.equal(_functions.MatMul8bitLt.apply(x, weight, None, None, state), expected)
    state.reset_grads()
    assert state.CB is state.SCB is None
    with pytest.raises(ValueError, match=r"neither state\.SCB nor an Int8Params"):
        surface.matmul(x, weight.data.clone(), state=state)


def test_large_bfloat16_products_do_not_overflow():
    x = torch.full((2, 64), 1e4, dtype=torch.bfloat16)
    state = surface.MatmulLtState(has_fp16_weights=False)
    before = x.clone()

    y = surface.matmul(x, torch.ones(8, 64, dtype=torch.bfloat16), state=state)

    assert torch.equal(x, before)
    torch.testing.assert_close(y, torch.full((2, 8), 6.4e5, dtype=torch.bfloat16))
