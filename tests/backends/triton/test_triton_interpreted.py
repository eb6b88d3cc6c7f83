"""The conformance kit passes on every kernel in Triton's interpreter: in processes of their own, which it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FAMILIES = {
    "4bit and not linear": {"quantize_4bit", "dequantize_4bit"},
    "linear_4bit": {"linear_4bit", "linear_4bit_backward"},
    "8bit and not update": {"quantize_8bit", "dequantize_8bit"},
    "int8": {"quantize_int8_rows", "dequantize_int8", "matmul_int8", "linear_int8"},
    "update_32bit": {"update_32bit"},
    "update_8bit": {"update_8bit"},
}


def conformance(selection, tmp_path):
    """What the kit prints, run on the tests that `pytest -k` selects."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "PYTEST_"))}
    path = os.pathsep.join([str(Path(__file__).parent), *(one for one in sys.path if one)])
    variables = {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    plugins = ("-p", "halfbyte.testing.plugin", "-p", "interpreted", "-p", "no:cacheprovider", "-p", "no:logging")
    backend = ("--backend", "triton_interpreted", "--require", "triton_interpreted")
    checks = ("--pyargs", "halfbyte.testing.checks")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", *plugins, *backend, "-k", selection, *checks],
        cwd=tmp_path,
        env={**clean, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout


@pytest.mark.timeout(900)  # minutes on a busy machine
@pytest.mark.parametrize("selection", FAMILIES)
def test_kernels_conform(selection, tmp_path):
    printed = conformance(selection, tmp_path)

    assert {op for op in FAMILIES[selection] if f"\n{op} " in printed} == FAMILIES[selection], printed[-4000:]


@pytest.mark.timeout(900)
def test_backend_conforms(tmp_path):
    """What concerns no op alone."""
    assert "passed" in conformance("not (4bit or 8bit or 32bit or int8)", tmp_path)


def test_every_kernel_is_in_a_family():
    from halfbyte_triton import plugin

    assert {kernel.op for kernel in plugin.all_kernels()} == set().union(*FAMILIES.values())
