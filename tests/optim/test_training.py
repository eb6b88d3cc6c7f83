"""The script behind the loss plot of the optimizers' page: shorter and smaller, but the same."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs/benchmarks/train_adamw8bit.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_adamw8bit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in (("WIDTH", 32), ("BATCH", 8), ("CONTEXT", 32)):
        monkeypatch.setattr(module, name, value)
    return module


def test_8bit_run_of_the_plot_ends_within_one_percent_of_32bit(script, capsys):
    found = script.main(["--steps", "60"])

    (plain, held_plain), (quantized, held_quantized) = (found[name] for name in script.NAMES)
    assert plain != quantized
    assert held_plain < plain[0] - 1.5
    assert held_quantized == pytest.approx(held_plain, rel=0.01)
    assert "AdamW8bit ends at" in capsys.readouterr().out


def test_plot_is_a_small_picture_of_both_runs(script, tmp_path):
    script.plot({name: ([3.0, 2.5, 2.0] * 100, 2.0) for name in script.NAMES}, tmp_path / "plot.svg")

    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f"{name}, held out 2.000" in drawn for name in script.NAMES)
    assert len(drawn) < 50_000
