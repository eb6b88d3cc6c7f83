"""Codes and scales against the real bitsandbytes on the same GPU, at more block sizes than test_golden_cuda.py has."""

import pytest
import torch

from halfbyte import formats
from halfbyte import functional as F

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA or ROCm device")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights(dtype, seed):
    """Enough of them that one in 10,000 is many: they come in clumps, as a block shares its reciprocal."""
    return (torch.randn(4096, 4096, generator=torch.Generator().manual_seed(seed)) * 0.02).cuda().to(dtype)


def assert_few_differ_by_one(ours, theirs, usual):
    """bitsandbytes scales by an approximate reciprocal, which moves what lies on a threshold.

    usual  whether the blocks have their usual size; in larger ones more values share a reciprocal
    """
    away = (ours.int() - theirs.int()).abs()
    assert away.max() <= 1
    assert away.count_nonzero().item() <= (1e-4 if usual else 1e-3) * away.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_4bit_codes_and_scales_are_those_of_bitsandbytes(gpu_oracle, format, blocksize, dtype):
    x = weights(dtype, blocksize)
    packed, state = F.quantize_4bit(x, format=format, blocksize=blocksize)
    theirs, their_state = gpu_oracle.quantize_4bit(x, format, blocksize)

    assert torch.equal(state.absmax, their_state["absmax"])
    if format == "nf4" and dtype != torch.float32:
        assert torch.equal(packed.reshape(-1), theirs.reshape(-1))
    else:
        ours, theirs = (torch.stack((one >> 4, one & 15)) for one in (packed.reshape(-1), theirs.reshape(-1)))
        order = formats.levels(format, x.device).argsort().argsort()  # the codes of fp4 are not in order
        assert_few_differ_by_one(order[ours.long()], order[theirs.long()], blocksize == 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_8bit_codes_and_scales_are_those_of_bitsandbytes(gpu_oracle, blocksize, dtype):
    x = weights(dtype, blocksize)
    codes, state = F.quantize_8bit(x, blocksize=blocksize)
    theirs, absmax = gpu_oracle.quantize_blockwise(x, formats.codebook("dynamic", x.device), blocksize)

    assert torch.equal(state.absmax, absmax)
    assert_few_differ_by_one(codes, theirs, blocksize <= 256)
