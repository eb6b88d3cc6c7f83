"""HALFBYTE_CPU_ISA: what it takes, and what is said of another value."""

import pytest
from levels import kernels

LEVELS = [level for level, _ in kernels("quantize_4bit")]

CODE = """
import halfbyte, torch
decision = halfbyte.explain("quantize_4bit", torch.zeros(64), "nf4", 64)
print(decision.backend, decision.variant)
print([reason for info in halfbyte.backends() if info.name == "cpu" for reason in info.reasons])
"""


@pytest.mark.skipif(not LEVELS, reason="halfbyte_cpu._C is not built")
def test_env_HALFBYTE_CPU_ISA(python):
    def said(value):
        return python(CODE, HALFBYTE_PLUGINS="none", HALFBYTE_CPU_ISA=value).stdout.splitlines()

    assert said("scalar") == ["cpu scalar", "[]"]
    assert said("")[0].startswith("cpu ")
    backend, reasons = said("sse9")
    assert backend.startswith("reference")
    assert "HALFBYTE_CPU_ISA must be one of scalar, avx2, avx512, avx512vnni, avx512bf16; got 'sse9'" in reasons
