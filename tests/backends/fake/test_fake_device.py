"""A device type nobody thought of: the reference serves it with a warning, and a plugin can claim it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no way to make a device in Python",
)

BEGIN = """
import json, warnings
import simxpu, torch, halfbyte

simxpu.install()
host = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
x = host.to("simxpu")
weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).to("simxpu")
"""

USE = """
def same(found, expected):
    return found.device.type == "simxpu" and torch.equal(found.cpu(), expected)

def result():
    packed, absmax = torch.ops.halfbyte.quantize_4bit(weight, "nf4", 64)
    expected = torch.ops.halfbyte.quantize_4bit(weight.cpu(), "nf4", 64)
    args = (None, None, None, None, "nf4", 64, 16)
    y = torch.ops.halfbyte.linear_4bit(x, packed, absmax, *args)
    codes, state = halfbyte.functional.quantize_8bit(x)
    with halfbyte.use_backend("reference"):
        on_host = torch.ops.halfbyte.linear_4bit(host, *expected, *args)
        codes_on_host, _ = halfbyte.functional.quantize_8bit(host)
    return [same(packed, expected[0]), same(absmax, expected[1]), same(y, on_host), same(codes, codes_on_host)]
"""


def run(python, code):
    done = python(BEGIN + USE + code, path=(Path(__file__).parent,), HALFBYTE_PLUGINS="none")
    return json.loads(done.stdout)


def test_reference_serves_it_with_one_warning_per_op(python):
    found = run(
        python,
        """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    equal = result() + result()
told = [str(one.message) for one in caught if one.category is halfbyte.HalfbytePerformanceWarning]
chosen = halfbyte.explain("quantize_4bit", x, "nf4", 64)
print(json.dumps({"equal": equal, "told": sorted(told), "chosen": str(chosen).split()[0]}))
""",
    )

    assert all(found["equal"])
    assert found["told"] == [
        f"{op} on simxpu:0 runs the slow reference (no backend serves it)"
        for op in ("linear_4bit", "quantize_4bit", "quantize_8bit")
    ]
    assert found["chosen"] == "reference"


def test_plugin_can_claim_it(python):
    found = run(
        python,
        """
from types import SimpleNamespace
from halfbyte._runtime import dispatcher

calls = []

def quantize_4bit(x, format, blocksize):
    calls.append(str(x.device))
    return dispatcher.plugins.ops["quantize_4bit"].reference(x, format, blocksize)

class Nobody(halfbyte.Backend):
    name = "nobody"
    device_types = frozenset({"simxpu"})
    priority = 50

    def kernels(self):
        yield halfbyte.Kernel("quantize_4bit", quantize_4bit, limits={"format": {"nf4"}})

plugin = SimpleNamespace(halfbyte_backends=halfbyte.hookimpl(lambda: [Nobody()]))
dispatcher.plugins.add("nobody", "nobody 1.0", lambda: plugin)
dispatcher.forget()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    equal = result()
told = [str(one.message) for one in caught if one.category is halfbyte.HalfbytePerformanceWarning]
try:
    with halfbyte.use_backend("nobody"):
        torch.ops.halfbyte.quantize_4bit(x, "fp4", 64)
except halfbyte.NoKernel as error:
    refused = str(error)
torch.ops.halfbyte.quantize_4bit(host, "nf4", 64)  # the CPU is not the plugin's
print(json.dumps({"equal": equal, "told": sorted(told), "calls": calls, "refused": refused}))
""",
    )

    assert all(found["equal"])
    assert found["calls"] == ["simxpu:0"]
    assert [one.split()[0] for one in found["told"]] == ["linear_4bit", "quantize_8bit"]
    assert "nobody: format=fp4 (takes nf4)" in found["refused"]
