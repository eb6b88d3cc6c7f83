"""The benchmarks in docs/benchmarks run: of whole models with a tiny one, on the CPU; and what it makes of figures."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

for needed in ("transformers", "accelerate", "peft"):  # looked for, not imported: peft imports bitsandbytes at once
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parents[2] / "docs/benchmarks/llama.py"


@pytest.fixture(scope="module")
def llama() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llama", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama"] = module  # its records look there
    spec.loader.exec_module(module)
    return module


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return script(SCRIPT, "--size", "tiny", "--device", "cpu", "--folder", str(folder), *words)


def script(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(one for one in sys.path if one)
    return subprocess.run(
        [sys.executable, str(file), *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def figures(table: str) -> dict[str, list[str]]:
    """Of each row its cells."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in found}


def test_every_kind_of_case_runs(tmp_path):
    cases = "^train, (nf4|int8, prepared)$|^decode, nf4, batch 1$|^load|^example, generate.py model --bits 4$"
    done = run(tmp_path, "--libraries", "halfbyte", "--cases", cases)

    assert done.returncode == 0, done.stderr
    rows = figures(done.stdout)
    assert list(rows)[1:] == ["train, nf4, ms", "train, int8, prepared, ms", "decode, nf4, batch 1, ms", "load, nf4, s"]
    assert all(float(cell) >= 0 for cells in list(rows.values())[1:] for cell in cells)
    assert re.search(r"^generate.py model --bits 4: \d+ .*\(\d+ s\)$", done.stdout, re.MULTILINE)


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_every_case_runs_with_every_library(llama, real_bitsandbytes, tmp_path):
    done = run(tmp_path, "--profile", str(tmp_path / "profile"))

    assert done.returncode == 0, done.stderr
    rows = list(figures(done.stdout).values())[1:]
    assert len(rows) == len(llama.CASES)
    assert all(len(cells) == 5 and all(cells) for cells in rows)
    assert len([*(tmp_path / "profile").iterdir()]) == 3 * len(llama.CASES)


def test_case_that_does_not_exist_and_library_that_does_not_exist_are_told(tmp_path):
    assert "matches none of: train, nf4; " in run(tmp_path, "--cases", "decoding").stderr
    assert "must list some of torch, bitsandbytes, halfbyte; got 'gpt'" in run(tmp_path, "--libraries", "gpt").stderr


def test_process_that_fails_is_told_at_the_end(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    done = run(tmp_path, "--libraries", "halfbyte", "--cases", "^load")

    assert done.returncode == 1
    assert done.stderr.startswith("load, nf4, halfbyte: exit code 1\n")


def test_limits_hold_against_another_library_or_a_number(llama):
    times, number = llama.Limit("ms", 1.15, "torch"), llama.Limit("ms", 3.8)

    assert times.missed({"torch": {"ms": 100.0}, "halfbyte": {"ms": 114.0}}) is None
    assert times.missed({"halfbyte": {"ms": 115.0}}) is None
    sentence = times.missed({"torch": {"ms": 100.0}, "halfbyte": {"ms": 120.0}})
    assert sentence == "ms is 1.200 times that of torch, at most 1.15 is wanted"
    assert number.missed({"halfbyte": {"ms": 3.8}}) is None
    assert number.missed({"halfbyte": {"ms": 4.0}}) == "ms is 4.000, at most 3.8 is wanted"


def test_rows_have_ratios_and_leave_out_what_was_not_measured(llama):
    case = llama.Case("decode")
    found = {"torch": {"ms": 6.0, "peak GB": None}, "halfbyte": {"ms": 3.0, "peak GB": None}}

    assert llama.rows(case, ["torch", "halfbyte"], found) == ["| decode, ms | 6.00 | 3.00 | 0.50 |"]


def test_host_time_of_calls_is_told():
    done = script(SCRIPT.with_name("host_time.py"), "--cases", "^(eval|train), Linear4bit, nested$|tensors: 1$")

    assert done.returncode == 0, done.stderr
    rows = figures(done.stdout)
    assert list(rows)[1:] == ["eval, Linear4bit, nested", "train, Linear4bit, nested", "AdamW8bit, tensors: 1"]
    assert all(float(cell) > 0 for cells in list(rows.values())[1:] for cell in cells[:2])
