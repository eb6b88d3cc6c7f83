"""The GPU benchmark, as far as it needs no GPU: its cases, its table, and what it says where there is none."""

from __future__ import annotations

import pytest
import torch

from halfbyte.__main__ import main
from halfbyte.bench import gpu


def test_cases_have_names_of_their_own_and_known_kinds():
    cases = gpu.cases()

    assert len({case.name for case in cases}) == len(cases)
    assert {case.kind for case in cases} == {"graph", "stream", "host"}


def test_least_bytes_of_a_layer_are_codes_scales_and_activations():
    (case,) = [case for case in gpu.cases() if case.name == "nf4 linear 4096x4096, bf16, M=8"]

    assert case.bytes == 4096 * 4096 // 2 + 4 * 4096 * 4096 // 64 + 2 * 8 * (4096 + 4096)


def test_table_has_medians_shares_and_ratios_and_leaves_out_what_was_not_timed():
    row = gpu.Row("a layer", "graph", 4_000_000, {"halfbyte": [1.0, 2.0, 9.0], "torch": [6.0, 6.0, 6.0]})

    table = gpu.markdown([row], ["halfbyte", "bitsandbytes", "torch"], "on a GPU", 4e12)

    assert table.splitlines()[-1] == "| a layer | 2.0 |  | 6.0 | 50 % |  | 3.00x |"


def test_library_that_lacks_a_case_is_left_out_and_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(gpu, "_timer", lambda kind, calls: lambda: 5.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    case = gpu.Case("x", "stream", 0, lambda library: [print] if library == "halfbyte" else [])
    (row,) = gpu.run([case], ["halfbyte", "torch"], 2)
    assert row.times == {"halfbyte": [5.0, 5.0]}

    unasked = gpu.Case("x", "stream", 0, lambda library: [print], ("halfbyte",))
    (row,) = gpu.run([unasked], ["halfbyte", "humming"], 1)
    assert row.times == {"halfbyte": [5.0]}

    def broken(library):
        raise KeyError("inside a library")

    with pytest.raises(KeyError, match="inside a library"):
        gpu.run([gpu.Case("x", "stream", 0, broken)], ["halfbyte"], 1)


def test_only_plain_layers_of_four_bits_have_a_case_for_humming(capsys):
    asked = [case.name for case in gpu.cases() if "humming" in case.libraries]

    assert asked == [case.name for case in gpu.cases() if case.name.startswith("nf4 linear")]
    assert main(["bench", "--libraries", "halfbyte,humming"]) == 2
    assert "--libraries humming needs --device cuda; got cpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_benchmark_says_so(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda needs a CUDA GPU; torch finds none" in capsys.readouterr().err
