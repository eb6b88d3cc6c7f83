"""What is known of devices before any is used, on machines that this one is not."""

import pytest
import torch

import halfbyte
from halfbyte import DeviceFacts, probe

T4 = ((7, 5), "Tesla T4")
H200 = ((9, 0), "NVIDIA H200")
UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


@pytest.fixture
def nvidia(monkeypatch):
    """`nvidia([T4, H200], mask="1")`: a CUDA build of torch on such a machine."""

    def set(gpus, mask=None):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(probe, "_nvml", lambda: gpus)
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # NVML's; tests/system/test_device_mask.py has the others
        if mask is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)

    return set


def gpus():
    return [(device.index, device.arch, device.name) for device in probe.machine() if device.type == "cuda"]


def test_machine_lists_gpus_before_the_cpu(nvidia):
    nvidia([T4, H200])

    assert probe.machine() == (
        DeviceFacts("cuda", 0, "nvidia", "sm_75", (7, 5), 32, None, "Tesla T4"),
        DeviceFacts("cuda", 1, "nvidia", "sm_90", (9, 0), 32, None, "NVIDIA H200"),
        probe.cpu(),
    )


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("1", [(0, "sm_90", "NVIDIA H200")]),
        ("1,0", [(0, "sm_90", "NVIDIA H200"), (1, "sm_75", "Tesla T4")]),
        (" 0 , 1 ", [(0, "sm_75", "Tesla T4"), (1, "sm_90", "NVIDIA H200")]),
        ("0,7,1", [(0, "sm_75", "Tesla T4")]),
        ("0,-1,1", [(0, "sm_75", "Tesla T4")]),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        (UUID, [(0, "", "")]),
        (f"{UUID},MIG-{UUID[4:]}", [(0, "", "")]),  # CUDA does not mix the two kinds of names
    ],
)
def test_machine_follows_the_mask_of_cuda(nvidia, mask, expected):
    nvidia([T4, H200], mask)

    assert gpus() == expected


def test_machine_without_a_driver_has_a_cpu(nvidia, monkeypatch):
    def missing():
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    nvidia([])
    monkeypatch.setattr(probe, "_nvml", missing)

    assert probe.machine() == (probe.cpu(),)


def test_provisional_device_is_served_until_its_arch_is_known(nvidia, stub_backend):
    """A backend that answers by compute capability must take a device whose capability is not known yet."""
    nvidia([T4], UUID)
    stub_backend("acme", device_types=("cuda",))

    assert halfbyte.active()["cuda:0"] == "acme"


def test_confirmed_device_of_another_type_is_named_only():
    assert probe.confirmed(torch.device("meta")) == DeviceFacts("meta", None)
