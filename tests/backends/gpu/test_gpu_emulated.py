"""The portable GPU kernels, executed on the CPU at 32 and at 64 lanes: the conformance kit, and what it is too
small for: several rounds of a grid, slabs, long rows, codebooks that need a search."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

from halfbyte import formats, native_gpu, native_gpu_int8
from halfbyte._runtime import dispatcher
from halfbyte_cuda import linear4bit

BUILT = [lanes for lanes in emulated.LANES if emulated.module(lanes)]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.skipif(not BUILT, reason="built without HALFBYTE_EMULATE=ON")


@pytest.fixture(params=emulated.LANES)
def kernel(request):
    """`kernel("quantize_4bit")`: its function at 32 or 64 lanes."""
    found = {one.op: one.function for one in native_gpu.kernels(emulated.module(request.param))}
    return found.__getitem__


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(op, *args):
    return dispatcher.plugins.ops[op].reference(*args)


def close(op, found, expected):
    rtol, atol = dispatcher.plugins.ops[op].tolerance[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def normal(shape, dtype, generator):
    return torch.randn(shape, generator=generator).to(dtype)


def weight(n, k, blocksize, generator, *, nested=False, format="nf4"):
    """A packed weight: the arguments between x and bias, then format and blocksize."""
    packed, absmax = reference("quantize_4bit", normal((n, k), torch.float32, generator), format, blocksize)
    if not nested:
        return (packed, absmax, None, None, None), (format, blocksize)
    offset = absmax.mean()
    codebook = formats.codebook("dynamic", torch.device("cpu"))
    codes, scale = reference("quantize_8bit", absmax - offset, codebook, 256)
    return (packed, codes, scale, codebook, offset), (format, blocksize)


@pytest.mark.parametrize("lanes", emulated.LANES)
def test_emulated_kernels_pass_the_conformance_kit(lanes, tmp_path):
    """In a process of its own, as a user runs it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HALFBYTE_", "PYTEST_"))}
    paths = [str(Path(__file__).parent), *(one for one in sys.path if one)]
    name = f"emulated{lanes}"
    lean = ("-q", "-rs", "-W", "error", "-p", "no:cacheprovider", "-p", "no:logging")
    options = ("--backend", name, "--require", name)
    plugins = ("-p", "emulated", "-p", "halfbyte.testing.plugin")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *lean, *plugins, *options, "--pyargs", "halfbyte.testing.checks"],
        cwd=tmp_path,
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert f"backend {name} on cpu: checks passed, by block size" in done.stdout


def test_every_op_has_an_emulated_kernel_or_is_an_optimizer(kernel):
    missing = []
    for op in dispatcher.plugins.ops.values():
        try:
            kernel(op.name)
        except KeyError:
            missing.append(op.name)

    assert set(missing) <= {"update_32bit", "update_8bit"}


# -- more than one round of the grid -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_large_tensor_has_the_references_4bit_codes(kernel, generator, format, blocksize, dtype):
    x = normal(100_003, dtype, generator) * normal(100_003, dtype, generator)
    found, expected = kernel("quantize_4bit")(x, format, blocksize), reference("quantize_4bit", x, format, blocksize)

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    args = (*expected, None, None, None, format, blocksize, [100_003], dtype)
    assert torch.equal(kernel("dequantize_4bit")(*args), reference("dequantize_4bit", *args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", [16, 256, 4096, 37, 5000])
def test_large_tensor_has_the_references_8bit_codes(kernel, generator, blocksize, dtype):
    codebook = formats.codebook("dynamic", torch.device("cpu"))
    x = normal(70_001, dtype, generator) * torch.rand(70_001, generator=generator).to(dtype) ** 4
    x[5000::977] = float("nan")
    found, expected = (
        kernel("quantize_8bit")(x, codebook, blocksize),
        reference("quantize_8bit", x, codebook, blocksize),
    )

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    args = (*expected, codebook, blocksize, dtype)
    assert torch.equal(kernel("dequantize_8bit")(*args), reference("dequantize_8bit", *args))


def codebooks():
    """Maps that fit one midpoint a bin, and maps that do not."""
    steps = torch.arange(256, dtype=torch.float32)
    return {
        "unsigned": formats.codebook("dynamic_unsigned", torch.device("cpu")).clone(),
        "linear": steps / 127.5 - 1,
        "crowded": torch.cat((torch.linspace(0.5, 0.501, 200), torch.linspace(0.6, 1.0, 56))),
        "repeated": torch.sort(torch.cat((torch.zeros(100), torch.linspace(-1, 1, 156)))).values,
        "tiny": torch.linspace(-1e-9, 1e-9, 256),
        "beyond": torch.linspace(-3, 3, 256),
    }


@pytest.mark.parametrize("name", codebooks())
def test_any_codebook_has_the_references_codes(kernel, generator, name):
    codebook = codebooks()[name]
    midpoints = (codebook[:-1] + codebook[1:]) * 0.5
    near = torch.cat((midpoints, midpoints.nextafter(torch.tensor(9.0)), midpoints.nextafter(torch.tensor(-9.0))))
    x = torch.cat((near.clamp(-1, 1), torch.rand(4096 - 765 - 4, generator=generator) * 2 - 1))
    x = torch.cat((x, torch.tensor([1.0, -1.0, 0.0, -0.0])))  # one block, so that nothing is scaled

    assert torch.equal(kernel("quantize_8bit")(x, codebook, 4096)[0], reference("quantize_8bit", x, codebook, 4096)[0])


# -- parts, slabs, long rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("k", [96, 45])
@pytest.mark.parametrize("m", [3, 40])
def test_linear_by_small_slabs_agrees(kernel, generator, monkeypatch, one_thread, m, k, nested):
    monkeypatch.setattr(native_gpu, "SLAB", 5000)
    packed, rest = weight(200, k, 64, generator, nested=nested)
    x, bias, dy = (normal(shape, torch.float32, generator) for shape in ((m, k), (200,), (m, 200)))

    close("linear_4bit", kernel("linear_4bit")(x, *packed, bias, *rest, 200),
          reference("linear_4bit", x, *packed, bias, *rest, 200))  # fmt: skip
    close("linear_4bit_backward", kernel("linear_4bit_backward")(dy, *packed, *rest, k),
          reference("linear_4bit_backward", dy, *packed, *rest, k))  # fmt: skip


def test_slabs_stay_within_their_bound():
    for count, each in ((4096, 8192), (7, 1 << 20), (28672, 2 * 8192), (5, 3)):
        size = native_gpu._slab_size(count, each, multiple=1)
        assert size > 0  # or no slab would ever reach the last row
        largest = size * each
        assert largest <= max(native_gpu.SLAB, each)
        assert largest <= max(count * each / 2, 1 << 20)


@pytest.mark.parametrize("k", [2048, 5000, 16384, 16392, 20001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_long_rows_have_the_references_int8_codes(kernel, generator, k, dtype):
    x = normal((3, k), dtype, generator)
    for threshold in (0.0, 3.0):
        found, expected = kernel("quantize_int8_rows")(x, threshold), reference("quantize_int8_rows", x, threshold)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("m", [1, 6, 70])
@pytest.mark.parametrize("k", [512, 515])
@pytest.mark.parametrize("outliers", [0, 1, 200])
def test_linear_int8_agrees_for_any_number_of_outlier_columns(kernel, generator, one_thread, outliers, k, m):
    x = normal((m, k), torch.float32, generator).clamp(-2, 2)
    x[m // 2, torch.randperm(k, generator=generator)[:outliers]] = 6.5
    w = torch.randint(-127, 128, (72, k), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(72, generator=generator), normal(72, torch.float32, generator)
    for mode in ("exact", "w8a16"):
        args = (x, w, scale, bias, 6.0, mode)
        found, expected = kernel("linear_int8")(*args), reference("linear_int8", *args)
        # Sums of hundreds of products of order one in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("shape", [(70, 3, 130), (64, 64, 64), (17, 65, 4), (200, 5, 7)])
def test_tiles_of_an_integer_product_are_exact(kernel, generator, shape):
    m, n, k = shape
    a = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)

    assert torch.equal(kernel("matmul_int8")(a, b), reference("matmul_int8", a, b))


@pytest.mark.parametrize("lanes", emulated.LANES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_int8_layer_of_many_rows_may_use_torchs_product(lanes, threshold, dtype, generator):
    x = normal((40, 96), dtype, generator)
    x[:, [3, 50]] *= 30  # outlier columns
    codes = torch.randint(-127, 128, (48, 96), generator=generator, dtype=torch.int8)
    absmax, bias = torch.rand(48, generator=generator) + 0.1, normal((48,), dtype, generator)
    found = native_gpu_int8.exact_by_library(emulated.module(lanes), x, codes, absmax, bias, threshold)
    close("linear_int8", found, reference("linear_int8", x, codes, absmax, bias, threshold, "exact"))


@pytest.mark.parametrize("lanes", emulated.LANES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dequantizing_for_torchs_product_goes_by_slabs(lanes, nested, bias, generator, monkeypatch):
    monkeypatch.setattr(native_gpu, "SLAB", 256 * 4 * 48)  # of 48 rows, then 32
    packed, how = weight(80, 256, 64, generator, nested=nested)
    x = normal((2, 5, 256), torch.float32, generator)
    b = normal((80,), torch.float32, generator) if bias else None
    found = linear4bit.run(emulated.module(lanes), ("dequantize",), x, *packed, b, *how, 80)
    close("linear_4bit", found, reference("linear_4bit", x, *packed, b, *how, 80))


@pytest.mark.parametrize("lanes", emulated.LANES)
@pytest.mark.parametrize("bias", [False, True])
def test_autocast_does_not_choose_the_dtype_of_torchs_product(lanes, bias, generator):
    packed, how = weight(80, 256, 64, generator)
    x = normal((2, 20, 256), torch.float32, generator)
    b = normal((80,), torch.float32, generator) if bias else None
    with torch.autocast("cpu", torch.bfloat16):
        found = native_gpu.linear_4bit(emulated.module(lanes), x, *packed, b, *how, 80)
    close("linear_4bit", found, reference("linear_4bit", x, *packed, b, *how, 80))


@pytest.mark.parametrize("lanes", BUILT)
def test_managed_memory_can_be_written_and_freed(lanes):
    c = emulated.module(lanes)

    address = c.managed_alloc(64, -1)
    ctypes.memset(address, 7, 64)
    c.managed_prefetch(address, 64, -1, 0)

    assert ctypes.string_at(address, 64) == bytes([7] * 64)
    c.managed_free(address, -1)
