"""What the XPU backend says about a machine, a line for each piece that is missing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import halfbyte_xpu
from halfbyte_xpu import plugin


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(needs="libsycl.so.9", ...)`: what torch, the module and the process show, without looking."""

    def pretend(*, xpu="20250301", needs="libsycl.so.9", loaded="libsycl.so.9", driver=True, lanes=None):
        monkeypatch.setattr(torch.version, "xpu", xpu, raising=False)
        module, maps = tmp_path / "_C.so", tmp_path / "maps"
        module.write_bytes(b"\x7fELF\0libstdc++.so.6\0" + (needs or "").encode() + b"\0")
        maps.write_text(f"7f00-7f01 r-xp 0000 00:00 0 /env/lib/{loaded}.0.0\n" if loaded else "7f00-7f01 rw-p\n")
        monkeypatch.setattr(plugin, "_module", lambda: module if needs else None)
        monkeypatch.setattr(plugin, "MAPS", maps)
        monkeypatch.setattr(plugin, "DRIVER", tmp_path if driver else plugin.Path("/no/such/folder"))
        if lanes:
            monkeypatch.setenv(plugin.LANES, lanes)
        return plugin.XpuBackend().why_not()

    return pretend


def test_complete_machine_can_run_it(machine):
    assert machine() == ()
    assert machine(lanes="16") == ()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"xpu": None}, f"torch {torch.__version__} is built without XPU"),
        ({"needs": None}, "halfbyte_xpu._C is not built: install the intel-sycl-rt that torch requires, then"),
        ({"driver": False}, "there is no Intel GPU driver: /no/such/folder does not exist"),
        ({"loaded": None}, "there is no SYCL runtime: torch has loaded no libsycl"),
        ({"loaded": "libsycl.so.8"}, "halfbyte_xpu._C was built for libsycl.so.9, torch has loaded libsycl.so.8:"),
    ],
)
def test_each_missing_piece_is_one_reason(machine, given, reason):
    reasons = machine(**given)

    assert len(reasons) == 1
    assert reasons[0].startswith(reason)
    assert "\n" not in reasons[0]


@pytest.mark.parametrize(("value", "lanes"), [(None, 0), ("", 0), ("16", 16), ("32", 32)])
def test_env_HALFBYTE_XPU_LANES(machine, monkeypatch, value, lanes):
    asked = []
    kernels = SimpleNamespace(all_kernels=lambda lanes: asked.append(lanes) or ())
    monkeypatch.setattr(halfbyte_xpu, "kernels", kernels, raising=False)  # the true one needs the compiled module
    if value is not None:
        monkeypatch.setenv(plugin.LANES, value)

    assert machine() == ()
    assert [kernel.variant for kernel in plugin.XpuBackend().kernels()] == ["ipex"]
    assert asked == [lanes]
    assert machine(lanes="8") == ("HALFBYTE_XPU_LANES must be one of 16, 32; got '8'",)


def test_backend_comes_before_triton_and_serves_xpu_alone():
    from halfbyte_triton.plugin import TritonBackend

    assert plugin.XpuBackend.device_types == {"xpu"}
    assert TritonBackend.priority < plugin.XpuBackend.priority
    assert "xpu" in TritonBackend.device_types
