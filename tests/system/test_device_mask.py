"""A GPU mask set after import counts until CUDA starts; then torch's word does.  Everything of the GPU is simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import probe

H100, A100 = ((9, 0), "NVIDIA H100"), ((8, 0), "NVIDIA A100")
CPU = {"cpu": halfbyte.active()["cpu"]}
MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine(H100, H100)`: a machine with these NVIDIA GPUs, CUDA not started."""
    for name in (*MASKS, "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)

    def build(*gpus: tuple[tuple[int, int], str]) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(probe, "_nvml", lambda: list(gpus))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)

        def never(*_: Any) -> Any:
            raise AssertionError("looking at the machine must not start CUDA")

        for name in ("is_available", "device_count", "init", "get_device_properties"):
            monkeypatch.setattr(torch.cuda, name, never)

    return build


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`started(A100)`: CUDA runs, and torch shows these GPUs."""

    def start(*gpus: tuple[tuple[int, int], str]) -> None:
        def properties(device: torch.device) -> Any:
            (major, minor), name = gpus[device.index]
            return SimpleNamespace(major=major, minor=minor, name=name, multi_processor_count=108)

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        probe.confirmed.cache_clear()

    yield start
    probe.confirmed.cache_clear()


def shown() -> list[tuple[str, tuple[int, int] | None]]:
    return [(str(device), device.cc) for device in probe.machine() if device.type == "cuda"]


@pytest.mark.parametrize(
    ("mask", "ccs"),
    [
        (None, [(9, 0), (8, 0)]),
        ("1", [(8, 0)]),
        ("1,0", [(8, 0), (9, 0)]),
        (" 1 , 0 ", [(8, 0), (9, 0)]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [(9, 0)]),
        ("7,0", []),
        ("0,7,1", [(9, 0)]),
        ("0,0", []),
        ("1gpu", [(8, 0)]),
        ("none", []),
        ("GPU-7e3a", [None]),
        ("GPU-7e3a,GPU-11,0", [None, None]),
        ("GPU-7e3a,GPU-7e3a", []),
        ("MIG-51c0", [None]),
    ],
)
def test_mask_is_read_as_cuda_reads_it(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, mask: str | None, ccs: list[Any]
) -> None:
    machine(H100, A100)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert shown() == [(f"cuda:{index}", cc) for index, cc in enumerate(ccs)]


def test_order_of_different_gpus_is_provisional_unless_it_is_by_bus(machine: Callable[..., None]) -> None:
    machine(H100, A100)
    assert shown() == [("cuda:0", None), ("cuda:1", None)]
    machine(H100, H100)
    assert shown() == [("cuda:0", (9, 0)), ("cuda:1", (9, 0))]


def test_active_follows_a_mask_set_after_import(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, stub_backend: Callable[..., Any]
) -> None:
    machine(H100, H100)
    stub_backend("acme", device_types=("cuda",))
    assert halfbyte.active() == {"cuda:0": "acme", "cuda:1": "acme", **CPU}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert halfbyte.active() == {"cuda:0": "acme", **CPU}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert halfbyte.active() == CPU


def test_torch_has_the_word_once_cuda_runs(
    machine: Callable[..., None],
    started: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    stub_backend: Callable[..., Any],
) -> None:
    machine(H100, A100)
    stub_backend(
        "acme",
        device_types=("cuda",),
        why_not_device=lambda device: ("needs sm_90",) if device.cc and device.cc < (9, 0) else (),
    )
    assert halfbyte.active()["cuda:0"] == "acme"  # provisional: which GPU comes first is not known
    started(A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # too late
    found = halfbyte.active()
    assert list(found) == ["cuda:0", *CPU]
    assert found["cuda:0"] != "acme"


def test_first_op_corrects_a_provisional_choice(
    machine: Callable[..., None],
    started: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    stub_backend: Callable[..., Any],
) -> None:
    machine(A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7e3a")
    stub_backend(
        "acme",
        device_types=("cuda",),
        why_not_device=lambda device: ("needs sm_90",) if device.cc and device.cc < (9, 0) else (),
    )
    assert halfbyte.active()["cuda:0"] == "acme"
    started(A100)
    op = halfbyte._runtime.dispatcher.plugins.ops["matmul_int8"]
    decision = halfbyte.explain("matmul_int8", op.Facts(torch.device("cuda", 0)))
    assert decision.backend == "reference"
    assert ("acme", ("needs sm_90",)) in decision.tried
    assert halfbyte.active()["cuda:0"] == "reference"


def test_amd_masks_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in MASKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(probe, "_kfd", lambda: [("gfx90a", 64), ("gfx942", 64), ("gfx1100", 32)])

    def archs() -> list[str]:
        return [device.arch for device in probe.machine() if device.type == "cuda"]

    assert archs() == ["gfx90a", "gfx942", "gfx1100"]
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "2,1")
    assert archs() == ["gfx1100", "gfx942"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert archs() == ["gfx942"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    assert archs() == ["gfx1100"]
