"""What the backends cuda and rocm say about machines and devices, without any."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import halfbyte_cuda.plugin as cuda
import halfbyte_rocm.plugin as rocm
from halfbyte.kernel import DeviceFacts


@pytest.fixture
def machine(monkeypatch):
    """`machine(cuda="13.0", built=True, driver=True)`: what torch, the import system and the loader show."""

    def pretend(*, cuda_version=None, hip_version=None, built=True, driver=True):
        monkeypatch.setattr(torch.version, "cuda", cuda_version)
        monkeypatch.setattr(torch.version, "hip", hip_version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if built else None)
        monkeypatch.setattr(cuda, "driver_is_there", lambda: driver)
        monkeypatch.setattr(rocm, "DRIVER", rocm.Path("/dev/null" if driver else "/no/such/file"))

    return pretend


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, f"torch {torch.__version__} is built without CUDA"),
        ({"hip_version": "6.4"}, f"torch {torch.__version__} is built without CUDA"),
        ({"cuda_version": "13.0", "built": False}, "halfbyte_cuda._C is not built: reinstall halfbyte with nvcc"),
        ({"cuda_version": "13.0", "driver": False}, "there is no NVIDIA driver: libcuda.so.1 cannot be loaded"),
        ({"cuda_version": "13.0"}, None),
    ],
)
def test_cuda_says_what_the_machine_lacks(machine, given, reason):
    machine(**given)
    reasons = cuda.CudaBackend().why_not()

    assert (reason is None and reasons == ()) or reasons[0].startswith(reason)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, f"torch {torch.__version__} is built without ROCm"),
        ({"cuda_version": "13.0"}, f"torch {torch.__version__} is built without ROCm"),
        ({"hip_version": "6.4", "built": False}, "halfbyte_rocm._C is not built: reinstall halfbyte with HIPCXX"),
        ({"hip_version": "6.4", "driver": False}, "there is no AMD GPU driver: /no/such/file does not exist"),
        ({"hip_version": "6.4"}, None),
    ],
)
def test_rocm_says_what_the_machine_lacks(machine, given, reason):
    machine(**given)
    reasons = rocm.RocmBackend().why_not()

    assert (reason is None and reasons == ()) or reasons[0].startswith(reason)


RELEASE = "75-real,80-real,86-real,89-real,90-real,90a-real,100-real,120"


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (RELEASE, [(7, 5), (8, 0), (8, 7), (9, 0), (10, 3), (12, 0), (12, 1), (13, 0)], [(7, 0), (7, 2), (11, 0)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0)]),
        ("80-virtual", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("80", [(8, 0), (9, 0)], [(7, 5)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_code_runs_where_its_architecture_says(archs, runs, does_not):
    assert [cc for cc in runs if not cuda.runs_on(archs, cc)] == []
    assert [cc for cc in does_not if cuda.runs_on(archs, cc)] == []


def test_device_that_the_module_was_not_built_for_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(cuda, "built_for", lambda: "80-real,90a-real")
    monkeypatch.setattr(rocm, "built_for", lambda: "gfx90a:sramecc+,gfx942")
    t4 = DeviceFacts("cuda", 0, "nvidia", "sm_75", (7, 5), 32, 40, "T4")
    navi = DeviceFacts("cuda", 1, "amd", "gfx1100", None, 32)
    mi250 = DeviceFacts("cuda", 0, "amd", "gfx90a", None, 64)

    assert cuda.CudaBackend().why_not_device(t4) == ("halfbyte_cuda was built for 80-real, 90a-real; cuda:0 is sm_75",)
    assert rocm.RocmBackend().why_not_device(navi) == (
        "halfbyte_rocm was built for gfx90a:sramecc+, gfx942; cuda:1 is gfx1100",
    )
    assert rocm.RocmBackend().why_not_device(mi250) == ()


def test_device_that_is_not_known_yet_is_not_refused():
    for backend in (cuda.CudaBackend(), rocm.RocmBackend()):
        assert backend.why_not_device(DeviceFacts("cuda", 0)) == ()
