"""The adapter of IPEX's weight-only linear, on its CPU build: `nox -s ipex`."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from halfbyte_xpu import ipex

CODE = """
import itertools
import intel_extension_for_pytorch, torch
from halfbyte._runtime import dispatcher
from halfbyte.errors import KernelUnusable
from halfbyte_xpu import ipex

assert ipex.why_not(None) == ()
op, quantize = (dispatcher.plugins.ops[name] for name in ("linear_4bit", "quantize_4bit"))
generator = torch.Generator().manual_seed(0)
for dtype, blocksize, m in itertools.product((torch.float32, torch.bfloat16), (32, 64, 128), (1, 5, 40)):
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((48, 256), (m, 256), (48,)))
    packed, absmax = quantize.reference(weight, "nf4", blocksize)
    for b in (None, bias.to(dtype)):
        args = (x.to(dtype), packed, absmax, None, None, None, b, "nf4", blocksize, 48)
        rtol, atol = op.tolerance[dtype]
        torch.testing.assert_close(ipex.linear_4bit(*args), op.reference(*args), rtol=rtol, atol=atol)

packed.fill_(0xFF)  # all weights are absmax: what was derived must not be used again
args = (x, packed, absmax, None, None, None, None, "nf4", 128, 48)
torch.testing.assert_close(ipex.linear_4bit(*args), op.reference(*args), rtol=1e-4, atol=1e-4)
try:
    ipex.linear_4bit(torch.randn(1, 100), packed, absmax, None, None, None, None, "nf4", 64, 2)
except KernelUnusable as error:
    print(error)
"""


def test_adapter_agrees_with_the_reference(python):
    if importlib.util.find_spec(ipex.MODULE) is None:
        pytest.skip(f"{ipex.MODULE} is not installed")
    if not torch.__version__.startswith("2.8."):
        pytest.skip(f"{ipex.MODULE} 2.8 needs torch 2.8; this is {torch.__version__}")

    assert python(CODE).stdout.endswith("in_features=100 is no multiple of blocksize=64\n")


def test_it_is_offered_to_programs_that_have_imported_it(monkeypatch):
    monkeypatch.delitem(sys.modules, ipex.MODULE, raising=False)
    assert ipex.why_not(None) == ("intel_extension_for_pytorch is not imported",)

    monkeypatch.setitem(sys.modules, ipex.MODULE, object())
    monkeypatch.setattr(torch.ops, "torch_ipex", object(), raising=False)
    assert ipex.why_not(None) == ("this build of intel_extension_for_pytorch has no weight-only linear",)
