"""What can be known of the machine's devices, without a device context and without spoiling fork().

NVML knows NVIDIA GPUs and the KFD files know AMD's; where neither answers for the devices that torch will show
(masks by UUID, MIG, other vendors) the answer is provisional: a device without arch and compute capability.
`confirmed` asks torch itself and is used from the first op on.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from .kernel import DeviceFacts

log = logging.getLogger("halfbyte.probe")


def machine() -> tuple[DeviceFacts, ...]:
    """The devices of this process as far as they are known before any is used; the CPU comes last."""
    return (*_accelerators(), cpu())


def cpu() -> DeviceFacts:
    return DeviceFacts("cpu", arch=platform.machine())


@functools.cache
def confirmed(device: torch.device) -> DeviceFacts:
    """One device as torch sees it.  Creates the device's context: only for a device that holds a tensor."""
    if device.type == "cpu":
        return cpu()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        if torch.version.hip:
            arch = properties.gcnArchName.split(":")[0]
            return DeviceFacts(
                "cuda",
                index,
                "amd",
                arch,
                None,
                getattr(properties, "warp_size", None),
                properties.multi_processor_count,
                properties.name,
            )
        cc = (properties.major, properties.minor)
        return _nvidia(index, cc, properties.name, properties.multi_processor_count)
    if device.type == "xpu":
        return DeviceFacts("xpu", device.index or 0, "intel", name=torch.xpu.get_device_name(device))
    return DeviceFacts(device.type, device.index)


def _nvidia(index: int, cc: tuple[int, int] | None, name: str, sms: int | None = None) -> DeviceFacts:
    arch = f"sm_{cc[0]}{cc[1]}" if cc else ""
    return DeviceFacts("cuda", index, "nvidia", arch, cc, 32, sms, name)


def _accelerators() -> Iterator[DeviceFacts]:
    if torch.version.cuda:
        yield from _nvidia_devices()
    elif torch.version.hip:
        yield from _amd_devices()
    if getattr(torch.version, "xpu", None) and Path("/dev/dri").exists():
        yield DeviceFacts("xpu", 0, "intel")


def _nvidia_devices() -> Iterator[DeviceFacts]:
    if torch.cuda.is_initialized():  # CUDA has read the mask: only torch knows what it was
        yield from (confirmed(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
        return
    try:
        known = _nvml()
    except OSError as error:
        log.debug("NVML is not usable: %s", error)
        return
    for index, physical in enumerate(_visible(os.environ.get("CUDA_VISIBLE_DEVICES"), len(known))):
        facts = None if physical is None else known[physical]
        if facts is None or (_order_is_unknown() and len(set(known)) > 1):
            yield _nvidia(index, None, "")
        else:
            yield _nvidia(index, *facts)


def _visible(mask: str | None, count: int) -> list[int | None]:
    """Physical numbers of the GPUs that a mask leaves, in its order; None for one named by UUID (GPU or MIG).

    Read anew at each call, because a mask may be set until CUDA starts.  As CUDA does: whatever follows a word
    that is no GPU is ignored, and a GPU named twice hides all.
    Source: CUDA C++ Programming Guide, section CUDA Environment Variables; torch.cuda._parse_visible_devices.
    """
    if mask is None:
        return list(range(count))
    words = [word.strip() for word in mask.split(",")]
    if words[0].startswith(("GPU-", "MIG-")):
        words = list(itertools.takewhile(lambda word: word.startswith(words[0][:4]), words))
        return [] if len(set(words)) < len(words) else [None] * len(words)
    found: list[int | None] = []
    for word in words:
        digits = re.match(r"\+?(\d+)", word)  # like strtoul: "1gpu" is 1
        if digits is None or int(digits[1]) >= count:
            break
        if int(digits[1]) in found:
            return []
        found.append(int(digits[1]))
    return found


def _order_is_unknown() -> bool:
    """Whether CUDA may number GPUs otherwise than NVML, which goes by PCI bus: fastest first is CUDA's default."""
    return os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"


def _nvml() -> list[tuple[tuple[int, int], str]]:
    """Compute capability and name of each GPU, in NVML's (PCI bus) order.

    Source: NVML API reference, nvmlDeviceGetCudaComputeCapability.  Raises OSError where there is no driver.
    """
    nvml = ctypes.CDLL("libnvidia-ml.so.1" if os.name == "posix" else "nvml.dll")

    def call(name: str, *arguments: object) -> None:
        if status := getattr(nvml, name)(*arguments):
            raise OSError(f"{name} answered {status}")

    call("nvmlInit_v2")
    try:
        count = ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        found = []
        for index in range(count.value):
            handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            name = ctypes.create_string_buffer(96)
            call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
            call("nvmlDeviceGetName", handle, name, ctypes.c_uint(96))
            found.append(((major.value, minor.value), name.value.decode(errors="replace")))
        return found
    finally:
        nvml.nvmlShutdown()


def _amd_devices() -> Iterator[DeviceFacts]:
    if torch.cuda.is_initialized():
        yield from (confirmed(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
        return
    known = _kfd()
    inner = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    outer = [None if i is None else known[i] for i in _visible(os.environ.get("ROCR_VISIBLE_DEVICES"), len(known))]
    for index, among in enumerate(_visible(inner, len(outer))):
        facts = None if among is None else outer[among]
        arch, lanes = facts or ("", None)
        yield DeviceFacts("cuda", index, "amd", arch, None, lanes)


def _kfd() -> list[tuple[str, int | None]]:
    """Arch and lanes of each GPU that the amdgpu driver lists.

    Source: Linux kernel, drivers/gpu/drm/amd/amdkfd/kfd_topology.c.
    """
    found = []
    for path in sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties"), key=_node_number):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        properties = dict(line.split(" ", 1) for line in lines if " " in line)
        version = int(properties.get("gfx_target_version", 0))
        if version:  # not a CPU node
            major, minor, step = version // 10000, version // 100 % 100, version % 100
            found.append((f"gfx{major}{minor}{step:x}", int(properties.get("wave_front_size", 0)) or None))
    return found


def _node_number(path: Path) -> int:
    return int(path.parent.name) if path.parent.name.isdigit() else 0
