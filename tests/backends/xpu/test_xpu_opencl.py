"""The SYCL kernels on the CPU's OpenCL device, with sub-groups of 16 and 32: the conformance kit, and the tests of the
portable kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import opencl
import pytest

# Tests that take `kernel`: here it is that of this file.
from test_gpu_emulated import (  # noqa: F401
    one_thread,
    test_any_codebook_has_the_references_codes,
    test_large_tensor_has_the_references_4bit_codes,
    test_large_tensor_has_the_references_8bit_codes,
    test_linear_by_small_slabs_agrees,
    test_linear_int8_agrees_for_any_number_of_outlier_columns,
    test_long_rows_have_the_references_int8_codes,
    test_tiles_of_an_integer_product_are_exact,
)
from test_gpu_optimizer import (  # noqa: F401
    test_many_small_tensors_are_one_call,
    test_update_8bit_rounds_quotients_correctly_at_all_magnitudes,
    test_update_8bit_rounds_ties_like_the_reference,
    test_update_8bit_takes_any_codebook,
)

from halfbyte import KernelUnusable

# Whole families, so that processes side by side compile each kernel once.
FAMILIES = (
    "4bit",
    "8bit and not update",
    "int8",
    "update_32bit",
    "update_8bit",
    "not (4bit or 8bit or 32bit or int8)",  # what concerns no op alone
)

pytestmark = pytest.mark.skipif(bool(opencl.why_not()), reason="; ".join(opencl.why_not()) or "can run")


@pytest.fixture(params=opencl.LANES)
def kernel(request):
    """`kernel("quantize_4bit")`: its function for 16 or 32 lanes."""
    from halfbyte_xpu import kernels

    found = {one.op: one.function for one in kernels.all_kernels(request.param)}
    return found.__getitem__


@pytest.mark.timeout(900)  # minutes on a busy machine
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lanes", opencl.LANES)
def test_kernels_conform(lanes, family, tmp_path):
    """In a process of its own, as a user runs it; not optimized, which the other tests are."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HALFBYTE_", "PYTEST_"))}
    path = os.pathsep.join([str(Path(__file__).parent), *(one for one in sys.path if one)])
    plugins = ("-p", "opencl", "-p", "halfbyte.testing.plugin", "-p", "no:cacheprovider", "-p", "no:logging")
    backend = ("--backend", f"opencl{lanes}", "--require", f"opencl{lanes}")
    checks = ("-k", family, "--pyargs", "halfbyte.testing.checks")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-W", "error", *plugins, *backend, *checks],
        cwd=tmp_path,
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "passed" in done.stdout


def test_kernel_that_does_not_compile_is_left_to_the_next_backend(monkeypatch):
    from halfbyte_xpu import kernels

    def refuse(*args):
        raise RuntimeError("SYCL cannot compile halfbyte::gpu::f<float>: error: no such thing")

    with pytest.raises(KernelUnusable, match=r"f<float>: error: no such thing"):
        kernels.falling_through(refuse)()


def test_error_while_a_kernel_runs_stays_one():
    from halfbyte_xpu import kernels

    def fail(*args):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        kernels.falling_through(fail)()
    assert not isinstance(caught.value, KernelUnusable)


def test_lanes_that_no_kernel_is_written_for_are_refused():
    from halfbyte_xpu import _C

    with pytest.raises(ValueError, match="lanes must be 0, 16 or 32"):
        _C.set_options(8, True)


def test_runtime_without_a_gpu_says_so():
    from halfbyte_xpu import _C

    count, why = _C.device_count()
    if count:
        pytest.skip(f"there are {count} GPUs")
    assert why == "the SYCL runtime shows no GPU"
