"""linear_4bit on tensor cores: every variant, at sizes around its tiles, against float64."""

from __future__ import annotations

import pytest
import torch

import halfbyte
from halfbyte import formats, native_gpu
from halfbyte_cuda import linear4bit


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "needs sm_90"
    return "" if halfbyte.active().get("cuda:0") == "cuda" else "halfbyte_cuda does not serve cuda:0"


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())
SIZES = ((16, 256), (1, 256), (272, 768), (1000, 1280), (4096, 4096))  # (n, k): whole tiles, one row, tails of both
ROWS = (1, 3, 8, 9, 16, 17, 32, 40, 64, 100, 128, 129, 256, 300, 1100)


def weight(n, k, format="nf4", blocksize=64, nested=False, seed=0):
    """A random packed weight, its arguments as linear_4bit takes them, and its values in float64."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, device="cuda")

    packed = torch.randint(0, 256, (n * k // 2,), generator=generator, dtype=torch.uint8, device="cuda")
    blocks = n * k // blocksize
    tail = (None, None, None)
    if nested:
        absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8, device="cuda")
        tail = (rand((blocks + 255) // 256) * 0.01, torch.sort(rand(256)).values, rand(()) * 0.01)
        scale = tail[1][absmax.long()] * tail[0].repeat_interleave(256)[:blocks] + tail[2]
    else:
        absmax = scale = rand(blocks) * 0.02 + 0.01
    codes = torch.stack((packed >> 4, packed & 15), -1).reshape(-1).long()
    levels = formats.levels(format, codes.device).double()
    dense = (levels[codes] * scale.double().repeat_interleave(blocksize)).reshape(n, k)
    return (packed, absmax, *tail), dense


def check(choice, m, n, k, dtype=torch.bfloat16, bias=False, format="nf4", blocksize=64, nested=False):
    from halfbyte_cuda import _C

    arguments, dense = weight(n, k, format, blocksize, nested)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    b = torch.randn(n, device="cuda", dtype=dtype) if bias else None
    y = linear4bit.run(_C, choice, x, *arguments, b, format, blocksize, n)
    expected = x.double() @ dense.T + (b.double() if bias else 0)
    assert y.shape == (m, n)
    assert y.dtype == dtype
    error = ((y.double() - expected).norm() / expected.norm()).item()
    # Half an ulp of the weight's level and half of the result: one value may have both in full, many do not.
    few = 2 if m * n < 1000 else 1
    assert error < few * (3e-3 if dtype == torch.bfloat16 else 4e-4), (choice, m, n, k, error)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_every_variant_agrees_with_float64(m, n, k):
    for choice in linear4bit.candidates(m):
        check(choice, m, n, k)


@pytest.mark.parametrize("m", [1, 12, 33, 128, 257])
def test_bias_formats_block_sizes_and_dtypes_are_served(m):
    for choice in linear4bit.candidates(m):
        check(choice, m, 272, 4096, torch.float16, bias=True)
        check(choice, m, 272, 4096, bias=True, nested=True)
        check(choice, m, 272, 4096, format="fp4", blocksize=128, nested=True)
        check(choice, m, 272, 4096, torch.float16, blocksize=4096)
        check(choice, m, 272, 4096, blocksize=512, nested=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_wide_kernel_multiplies_the_weights_that_dequantizing_gives(dtype, format):
    from halfbyte_cuda import _C

    n, k = 264, 512
    arguments, _ = weight(n, k, format, nested=True)
    dense = native_gpu.dequantize_4bit(_C, *arguments, format, 64, (n, k), dtype)
    one_hot = torch.eye(k, device="cuda", dtype=dtype)
    wide = [choice for choice in linear4bit.candidates(k) if choice[0] == "wide"]
    assert wide
    for choice in wide:
        found = linear4bit.run(_C, choice, one_hot, *arguments, None, format, 64, n)
        assert torch.equal(found.T, dense), choice


def test_a_block_of_the_wide_kernel_takes_many_tiles():
    for choice in (("wide", 128, 1), ("wide", 256, 1)):
        check(choice, 2053, 8200, 512)
        check(choice, 2053, 8200, 512, torch.float16, bias=True, nested=True)


def test_the_wide_kernel_writes_rows_of_any_length():
    for choice in linear4bit.candidates(129):
        if choice[0] == "wide":
            check(choice, 129, 1003, 1280, bias=True)


def test_a_result_does_not_change_from_call_to_call():
    from halfbyte_cuda import _C

    arguments, _ = weight(1024, 4096)
    for m in (1, 16, 64, 128, 512):
        x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
        for choice in linear4bit.candidates(m):
            first, second = (linear4bit.run(_C, choice, x, *arguments, None, "nf4", 64, 1024) for _ in range(2))
            assert torch.equal(first, second), choice


def test_a_chain_in_a_graph_reads_what_the_kernel_before_wrote():
    from halfbyte_cuda import _C

    (first, dense1), (second, dense2) = weight(4096, 4096), weight(4096, 4096, seed=1)
    measured = [(m, linear4bit.choose(m, 4096, 4096)) for m in (1, 16, 64)]
    for m, choice in (*measured, (256, ("wide", 256, 2)), (1100, ("wide", 256, 1))):
        x = torch.zeros(m, 4096, device="cuda", dtype=torch.bfloat16)

        def chain(x=x, choice=choice):
            h = linear4bit.run(_C, choice, x, *first, None, "nf4", 64, 4096)
            return h, linear4bit.run(_C, choice, h, *second, None, "nf4", 64, 4096)

        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h, y = chain()
        for seed in range(3):
            x.copy_(torch.randn(m, 4096, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert ((h.double() - x.double() @ dense1.T).norm() / h.double().norm()).item() < 3e-3
            assert ((y.double() - h.double() @ dense2.T).norm() / y.double().norm()).item() < 3e-3


def test_sizes_that_no_tensor_core_kernel_takes_are_served_all_the_same():
    for m, n, k, blocksize in ((3, 33, 192, 64), (2, 16, 256, 32), (5, 7, 100, 64)):
        assert not linear4bit.takes(m, n, k, blocksize)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        packed, state = halfbyte.functional.quantize_4bit(w, blocksize=blocksize)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        y = halfbyte.functional.linear_4bit(x, packed, state)
        dense = halfbyte.functional.dequantize_4bit(packed, state, dtype=torch.float32).double()
        expected = x.double() @ dense.T
        assert ((y.double() - expected).norm() / expected.norm()).item() < 1e-2
