"""The command line itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import halfbyte
from halfbyte.__main__ import main
from halfbyte.cli.output import require_writable


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"halfbyte {halfbyte.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in ("doctor", "quantize", "demo"))


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["quantize"], ["quantize", "a", "b", "--format"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: halfbyte" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["doctor", "quantize", "demo"])
def test_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: halfbyte {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["doctor", "--json"], ["doctor"]])
def test_a_reader_that_goes_away_is_no_error(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    paths = os.pathsep.join(one for one in sys.path if one)
    with os.fdopen(write, "w") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "halfbyte", *command],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("command", [["bench", "--json"], ["bench", "--markdown"], ["demo", "--json"]])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.bench.run.run", lambda *_: pytest.fail("it worked"))
    monkeypatch.setattr("halfbyte.cli.demo.load", lambda *_: pytest.fail("it worked"))
    assert main([*command, str(tmp_path / "missing" / "file")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("kept")
    require_writable(str(kept), None, str(new))
    assert kept.read_text() == "kept"
    assert not new.exists()


def test_module_runs_and_imports_nothing_heavy_for_an_error() -> None:
    code = """
import sys
from halfbyte.__main__ import main
code = main(["quantize", "missing", "out", "--format", "nf4"])
assert not {"transformers", "bitsandbytes"} & sys.modules.keys()
sys.exit(code)
"""
    paths = os.pathsep.join(one for one in sys.path if one)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "halfbyte: the model must be a folder" in done.stderr
    assert "Traceback" not in done.stderr
