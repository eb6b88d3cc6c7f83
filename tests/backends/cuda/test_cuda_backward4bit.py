"""linear_4bit's gradient through torch's cuBLAS: the same as by torch's own products, on any stream and in a graph."""

from __future__ import annotations

import pytest
import torch

import halfbyte
from halfbyte import functional, native_gpu


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs sm_80 or newer"
    return "" if halfbyte.active().get("cuda:0") == "cuda" else "halfbyte_cuda does not serve cuda:0"


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


def gradient(dy, packed, state):
    """By the kernel for cuBLAS."""
    from halfbyte_cuda import _C, backward4bit

    tensors = (packed.view(-1), state.absmax, *(state.nested_tensors() if state.state2 else (None,) * 3))
    return backward4bit.linear_4bit_backward(_C, dy, *tensors, state.quant_type, state.blocksize, state.shape[1])


def expected(dy, packed, state):
    return dy.double() @ functional.dequantize_4bit(packed, state, dtype=torch.float32).to(dy.dtype).double()


def check(dx, dy, packed, state):
    exact = expected(dy, packed, state)
    assert dx.shape == exact.shape
    assert dx.dtype == dy.dtype
    assert ((dx.double() - exact).norm() / exact.norm()).item() < torch.finfo(dy.dtype).eps


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 64, 64), (7, 33, 320), (2048, 1024, 4096), (100, 4096, 1000), (64, 8192, 14336)]
)
def test_every_size_agrees_with_float64(m, n, k, dtype, nested):
    weight = torch.randn(n, k, device="cuda", dtype=dtype)
    packed, state = functional.quantize_4bit(weight, nested=nested)
    dy = torch.randn(m, n, device="cuda", dtype=dtype)

    check(gradient(dy, packed, state), dy, packed, state)


def test_the_weight_is_never_whole():
    n = k = 8192
    packed, state = functional.quantize_4bit(torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
    dy = torch.randn(16, n, device="cuda", dtype=torch.bfloat16)
    gradient(dy, packed, state)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    dx = gradient(dy, packed, state)

    assert torch.cuda.max_memory_allocated() - before <= native_gpu.SLAB + dx.nbytes + 2**20


def test_the_dispatcher_chooses_it_and_autograd_reaches_it():
    packed, state = functional.quantize_4bit(torch.randn(256, 512, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(3, 5, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(3, 5, 256, device="cuda", dtype=torch.bfloat16)
    arguments = (dy, packed.view(-1), state.absmax, None, None, None, "nf4", 64, 512)

    assert "cublas" in str(halfbyte.explain("linear_4bit_backward", *arguments))
    for _ in range(2):  # the second call is bound to the weight
        (dx,) = torch.autograd.grad(
            functional.linear_4bit(x, packed, state), x, dy.transpose(0, 1).contiguous().transpose(0, 1)
        )
        check(dx, dy, packed, state)


def test_side_streams_and_graphs():
    packed, state = functional.quantize_4bit(torch.randn(1024, 2048, device="cuda", dtype=torch.bfloat16))
    dy = torch.zeros(128, 1024, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        dy.normal_()
        dx = gradient(dy, packed, state)
    side.synchronize()
    check(dx, dy, packed, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient(dy, packed, state)
    dy.normal_()
    graph.replay()
    check(captured, dy, packed, state)


def test_a_program_that_forbids_reduced_sums_gets_torchs_product(monkeypatch):
    packed, state = functional.quantize_4bit(torch.randn(256, 512, device="cuda", dtype=torch.bfloat16))
    dy = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16)
    called = []
    monkeypatch.setattr(native_gpu.torch, "mm", lambda *args, **rest: called.append(1) or torch.matmul(*args, **rest))
    gradient(dy, packed, state)
    assert not called
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)

    check(gradient(dy, packed, state), dy, packed, state)

    assert called


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_device_that_is_not_the_current_one_gets_torchs_product():
    packed, state = functional.quantize_4bit(torch.randn(256, 512, device="cuda:1", dtype=torch.bfloat16))
    dy = torch.randn(16, 256, device="cuda:1", dtype=torch.bfloat16)

    assert torch.cuda.current_device() == 0
    check(gradient(dy, packed, state), dy, packed, state)
