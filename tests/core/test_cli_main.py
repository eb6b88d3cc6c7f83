"""The command line itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import halfbyte
from halfbyte.__main__ import main


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
