"""The scripts in docs/examples run, unchanged, on the drop-in: with a tiny model of random weights, on the CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for needed in ("transformers", "accelerate", "peft"):  # looked for, not imported: peft imports bitsandbytes at once
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)

FOLDER = Path(__file__).resolve().parents[2] / "docs/examples"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run("generate.py", "--bits", 4)`: the last line that it prints; all run in one folder, where model/ is."""
    folder = tmp_path_factory.mktemp("examples")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "PYTEST_"))}
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(one for one in sys.path if one)

    def run(name: str, *words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "halfbyte", "run", str(FOLDER / name), *map(str, words)],
            cwd=folder,
            env={**clean, **quiet, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout.splitlines()[-1]

    assert run("make_model.py", "model") == "2,623,744 parameters in model"
    return run


@pytest.fixture(scope="module")
def adapter(run: Run) -> str:
    """What qlora.py prints; its adapter lies in adapter/."""
    return run("qlora.py", "model", "adapter")


def numbers(text: str) -> list[float]:
    return [float(one) for one in re.findall(r"\d+\.\d+|\d+", text)]


def test_every_script_is_tested_and_on_its_page():
    names = {file.name for file in FOLDER.glob("*.py")}
    page = (FOLDER / "README.md").read_text()

    assert {name for name in names if f'"{name}"' in Path(__file__).read_text()} == names
    assert {name for name in names if f"halfbyte run {name} " in page} == names


@pytest.mark.parametrize("bits", [4, 8])
def test_generate(run, bits):
    tokens = numbers(run("generate.py", "model", "--bits", bits, "--tokens", 12))

    assert len(tokens) == 12
    assert len(set(tokens)) > 1


def test_qlora_learns(adapter):
    first, last = numbers(adapter)

    assert last < first - 0.2


def test_merge_keeps_most_of_the_logits(run, adapter):
    """Merged weights are quantized anew, which moves so small a model far; a wrong merge moves it all the way."""
    (error,) = numbers(run("merge.py", "model", "adapter", "merged"))

    assert 0 < error < 0.6


@pytest.mark.parametrize("bits", [4, 8])
def test_save_reload_is_exact(run, bits):
    said = run("save_reload.py", "model", f"quantized{bits}", "--bits", bits)

    assert said.endswith("the same logits: True")
    assert numbers(said)[0] < (2 if bits == 4 else 3)  # 5.0 MiB in bfloat16


def test_train_8bit_optimizer_learns_with_small_states(run):
    first, last, size = numbers(run("train_8bit_optimizer.py", "model"))

    assert last < 0.5 * first
    assert 2 < size < 3  # 2.03, and 8 for the embeddings; 32-bit states are 8 everywhere


def test_offload_changes_nothing(run):
    said = run("offload.py", "model")

    away, every = numbers(said.partition(";")[0])
    assert 0 < away < every
    assert said.endswith("the same logits: True")


def test_offload_says_where_nothing_fits(run):
    with pytest.raises(AssertionError, match="--memory 1KiB has no room for any module of the model"):
        run("offload.py", "model", "--memory", "1KiB")


def test_scripts_know_nothing_of_halfbyte():
    assert [file.name for file in FOLDER.glob("*.py") if "halfbyte" in file.read_text()] == []
