"""linear_int8 on tensor cores: sizes around its tiles, with and without outlier columns, against the reference."""

from __future__ import annotations

import pytest
import torch

import halfbyte
from halfbyte.ops import int8
from halfbyte_cuda import linear8bit


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "needs sm_90"
    return "" if halfbyte.active().get("cuda:0") == "cuda" else "halfbyte_cuda does not serve cuda:0"


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())
SIZES = ((1, 16), (33, 48), (136, 1040), (1000, 2064), (4096, 4096))  # (n, k): tails of everything, whole tiles
ROWS = (1, 3, 16, 17, 32, 40, 64, 65, 128, 129, 256, 300, 700)  # up to each kernel's tile, and one more


def layer(m, n, k, outliers=0, dtype=torch.bfloat16, bias=False, seed=0):
    """x with so many outlier columns at a threshold of 6, weight, its absmax, bias."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    x = torch.randn(m, k, generator=generator, device="cuda").clamp(-5, 5)
    columns = torch.randperm(k, generator=generator, device="cuda")[:outliers]
    rows = torch.randint(0, m, (len(columns),), generator=generator, device="cuda")
    x[rows, columns] = 20.0 + rows % 7
    weight = torch.randint(-127, 128, (n, k), generator=generator, device="cuda", dtype=torch.int8)
    absmax = torch.rand(n, generator=generator, device="cuda") * 0.1 + 0.01
    b = torch.randn(n, generator=generator, device="cuda").to(dtype) if bias else None
    return x.to(dtype), weight, absmax, b


def run(arguments, threshold=6.0):
    from halfbyte_cuda import _C

    return linear8bit.linear_int8(_C, *arguments, threshold, "exact")


def check(y, arguments, threshold=6.0):
    x, weight, absmax, bias = arguments
    expected = int8.linear_int8(x.float(), weight, absmax, None if bias is None else bias.float(), threshold, "exact")
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    # One rounding of the result; what the integers miss of x in an outlier's column is rounded to x's dtype, too.
    half = torch.finfo(x.dtype).eps / 2
    spread = weight.float().norm(dim=1) * absmax / 127  # of a sum of such weights, for each value of x
    off = (y.float() - expected).abs()
    assert (off <= 1.01 * half * expected.abs() + 1e-3 * half * spread + 1e-6).all(), off.max()


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_every_size_agrees_with_the_reference(m, n, k):
    arguments = layer(m, n, k)
    check(run(arguments), arguments)
    check(run(arguments, 0.0), arguments, 0.0)


@pytest.mark.parametrize("outliers", [1, 8, 9, 40, 1000, 4112])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 16, 64, 100, 200, 257, 600])
def test_outlier_columns_agree_with_the_reference(m, dtype, outliers):
    arguments = layer(m, 1000, 4112, outliers, dtype, bias=True)
    x, weight, absmax, bias = arguments
    y = run(arguments)
    expected = int8.linear_int8(x.float(), weight, absmax, bias.float(), 6.0, "exact")
    error = ((y.float() - expected).norm() / expected.norm()).item()
    assert error < torch.finfo(dtype).eps / 2, error
    touched = (x.abs() >= 6).any(1)
    left_out = x.float().masked_fill((x.abs() >= 6).any(0), 0.0)
    without = int8.linear_int8(left_out, weight, absmax, bias.float(), 6.0, "exact")
    shown = ((without - expected)[touched].norm() / expected[touched].norm()).item()
    assert shown > 10 * torch.finfo(dtype).eps, shown


def test_columns_beyond_what_the_workspace_has_room_for_count_too():
    n, k = 1 << 17, 768
    room = (128 << 20) // 2 // n
    assert room < k
    for outliers in (room, room + 1, k):
        arguments = x, weight, absmax, _ = layer(300, n, k, outliers)
        expected = int8.linear_int8(x.float(), weight[-1000:], absmax[-1000:], None, 6.0, "exact")
        error = ((run(arguments)[:, -1000:].float() - expected).norm() / expected.norm()).item()
        assert error < torch.finfo(x.dtype).eps / 2, (outliers, error)


def test_a_result_does_not_change_from_call_to_call():
    for m in (1, 64, 128, 512):
        arguments = layer(m, 4096, 4096, 50)
        assert torch.equal(run(arguments), run(arguments)), m


def test_a_graph_sees_the_outliers_of_each_replay():
    for m in (1, 40, 300):
        x, *rest = layer(m, 1024, 4096)
        run((x, *rest))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h = run((x, *rest))
        for outliers in (0, 1, 100, 8, 9, 0):
            x.copy_(layer(m, 1024, 4096, outliers, seed=outliers)[0])
            graph.replay()
            assert torch.equal(h, run((x, *rest))), (m, outliers)


def test_the_dispatcher_chooses_it():
    x, weight, absmax, _ = layer(4, 128, 256)
    chosen = halfbyte.explain("linear_int8", x, weight, absmax, None, 6.0, "exact")
    assert "sm_90a" in str(chosen)


def test_sizes_that_no_tensor_core_kernel_takes_are_served_all_the_same():
    for m, n, k in ((3, 33, 100), (20, 16, 40000)):
        assert not linear8bit.takes(m, n, k)
        arguments = layer(m, n, k, 3)
        expected = int8.linear_int8(*arguments, 6.0, "exact")
        assert torch.allclose(run(arguments).float(), expected.float(), rtol=2e-2, atol=2e-2)
