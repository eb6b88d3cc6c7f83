"""The built wheel, really installed: what starts halfbyte in every interpreter, and what is left when it is gone.

The environment sees this one's packages (torch, ...) through a .pth file of its own, and no checkout.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
import textwrap
import timeit
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import halfbyte_boot

pytest.importorskip("scikit_build_core", reason="builds halfbyte's wheel with scikit-build-core")
# By metadata: importing pip, or even importlib.util.find_spec("pip"), makes setuptools' _distutils_hack leave this
# process with the standard library's distutils, which warns.
if [one for one in importlib.metadata.distributions(name="pip") if int(one.version.partition(".")[0]) >= 23] == []:
    pytest.skip("installs the wheel with pip --python, which came with pip 22.3", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
OUTER = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
# Without a look at what is installed: halfbyte may be, among the outer packages.
FROM_A_FILE = ("--no-deps", "--no-index", "--ignore-installed")
STARTERS = ["halfbyte.pth", "halfbyte.start"]

# How a wheel without native modules comes about: asked for, and because the compiler fails.
BUILDS = {
    "pure": (["--config-settings=wheel.cmake=false"], {}),
    "failed": ([], {"CXX": "false", "HALFBYTE_PIP_NVCC": ""}),
}


def call(*command: object, cwd: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    dropped = ("HALFBYTE_", "PYTEST_", "PYTHON", "COV_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=280,
    )
    if check:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`wheel("pure")`: the wheel of one of BUILDS, built once."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            folder = tmp_path_factory.mktemp(f"wheel-{name}")
            settings, variables = BUILDS[name]
            offline = ("--quiet", "--no-build-isolation", "--no-deps", "--disable-pip-version-check")
            place = (f"--config-settings=build-dir={folder / 'build'}", "--wheel-dir", folder)
            call(sys.executable, "-m", "pip", "wheel", *offline, *settings, *place, ROOT, cwd=folder, **variables)
            (built[name],) = folder.glob("halfbyte-*.whl")
        return built[name]

    return build


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`pip("install", wheel)` in an environment of its own; `pip.python` and `pip.purelib` are that environment's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    purelib = call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).stdout.strip()
    Path(purelib, "outer.pth").write_text("\n".join(OUTER) + "\n")

    def run(command: str, *words: object) -> None:
        pip = (sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check")
        call(*pip, command, *words, cwd=folder)

    run.python, run.purelib = python, Path(purelib)  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="module")
def installed(pip: Any, wheel: Callable[[str], Path]) -> Any:
    pip("install", *FROM_A_FILE, wheel("pure"))
    assert [name for name in STARTERS if not (pip.purelib / name).is_file()] == []
    return pip


@pytest.fixture
def run(installed: Any, tmp_path: Path) -> Callable[..., str]:
    """`run(code, "-I", HALFBYTE_BITSANDBYTES="1")`: what the code prints in the environment."""

    def run(code: str, *flags: str, **variables: str) -> str:
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(code))
        done = call(installed.python, *flags, file, cwd=tmp_path, **variables)
        assert done.stderr == ""
        return done.stdout

    return run


# -- what is in it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
def test_wheel_has_the_starters_at_its_root_and_in_its_record(wheel, build):
    file = wheel(build)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        recorded = [line.split(",")[0] for line in archive.read(record).decode().splitlines()]

    assert file.name.endswith("-none-any.whl")
    assert [name for name in STARTERS if name not in names or name not in recorded] == []
    assert sorted(name for name in names if "/" not in name) == STARTERS
    assert {"halfbyte_boot/finder.py", "halfbyte/compat/bitsandbytes/__init__.py"} <= set(names)
    assert {name.split("/")[0] for name in names if not name.startswith("halfbyte")} == set()


def test_starters_are_files_of_the_installed_distribution():
    """Of the one that these tests run on: a native wheel, an editable installation."""
    try:
        files = importlib.metadata.files("halfbyte") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("halfbyte is not installed, only on the path")

    assert [str(file) for file in files if str(file) in STARTERS] == STARTERS


def lines(wheel: Path, name: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [line for line in archive.read(name).decode().splitlines() if line]


def test_start_file_names_the_function_that_the_pth_file_calls(wheel):
    """Python 3.15 reads `package.module:callable` from it, and calls that without arguments."""
    (entry,) = lines(wheel("pure"), "halfbyte.start")
    (line,) = lines(wheel("pure"), "halfbyte.pth")

    assert pkgutil.resolve_name(entry) is halfbyte_boot.start
    assert line.startswith("import ")
    assert '__import__("halfbyte_boot").start()' in line


def test_start_does_what_the_variable_says(monkeypatch, recwarn):
    calls = []
    monkeypatch.setattr(halfbyte_boot, "activate", lambda: calls.append("activated"))
    for value in ("", "0", "1", "yes"):
        monkeypatch.setenv("HALFBYTE_BITSANDBYTES", value)
        halfbyte_boot.start()
        calls.append(value)

    assert calls == ["", "0", "activated", "1", "yes"]
    (warning,) = recwarn
    assert str(warning.message) == "HALFBYTE_BITSANDBYTES must be 1 or 0; got 'yes', so bitsandbytes stays as it is"


# -- what it does --------------------------------------------------------------------------------------------

WHO = """
import bitsandbytes, importlib.metadata
print(bitsandbytes.__halfbyte_version__, importlib.metadata.version("bitsandbytes"))
"""
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
HALFBYTE = f"{VERSION} {halfbyte_boot.VERSION}\n"


def test_variable_reaches_the_interpreter_and_loads_nothing_else(run):
    code = """
        import sys
        print(type(sys.meta_path[0]).__name__, {"torch", "halfbyte", "importlib.metadata"} & sys.modules.keys())
    """
    assert run(code + WHO.replace("\n", "\n" + " " * 8), HALFBYTE_BITSANDBYTES="1") == "Finder set()\n" + HALFBYTE


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_loaded_when_it_is_off(run, value):
    variables = {} if value is None else {"HALFBYTE_BITSANDBYTES": value}
    code = "import sys; print([name for name in sys.modules if 'halfbyte' in name], sys.meta_path[0].__name__)"

    assert run(code, **variables) == run(code, "-S", **variables) == "[] BuiltinImporter\n"


def test_pth_line_costs_nothing_when_it_is_off(wheel, monkeypatch):
    """Microseconds; starting an interpreter takes some ten milliseconds."""
    monkeypatch.delenv("HALFBYTE_BITSANDBYTES", raising=False)
    (line,) = lines(wheel("pure"), "halfbyte.pth")

    assert min(timeit.repeat(lambda: exec(line), number=100, repeat=5)) / 100 < 1e-3


def test_wrong_value_warns_and_changes_nothing(installed, tmp_path):
    code = "import sys; print(len(sys.meta_path))"
    done = call(installed.python, "-c", code, cwd=tmp_path, HALFBYTE_BITSANDBYTES="true")

    assert done.stdout == "3\n"
    assert "HALFBYTE_BITSANDBYTES must be 1 or 0; got 'true'" in done.stderr


def test_children_are_reached(run):
    code = """
        import multiprocessing, subprocess, sys

        def who(_):
            import bitsandbytes
            return bitsandbytes.__halfbyte_version__

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(who, [0]))
            child = "import bitsandbytes; print(bitsandbytes.__halfbyte_version__)"
            print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
    """
    assert run(code, HALFBYTE_BITSANDBYTES="1") == f"['{VERSION}']\n{VERSION}\n\n"


def test_interpreter_without_site_is_not_reached(run):
    """As the page says."""
    code = "import sys; print([name for name in sys.modules if 'halfbyte' in name])"

    assert run(code, "-S", HALFBYTE_BITSANDBYTES="1") == "[]\n"


def test_console_script_runs_a_script_and_its_children(installed, tmp_path):
    child = "import bitsandbytes, sys; print('child', bitsandbytes.__halfbyte_version__, flush=True); sys.exit(4)"
    (tmp_path / "train.py").write_text(
        "import subprocess, sys\nprint('torch' in sys.modules, sys.argv[1:], flush=True)\n"
        + WHO.replace(")\n", ", flush=True)\n")
        + f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)\n"
    )
    halfbyte = installed.python.with_name("halfbyte.exe" if os.name == "nt" else "halfbyte")

    done = call(halfbyte, "run", "train.py", "--help", "-m", cwd=tmp_path, check=False)

    assert done.stdout == f"False ['--help', '-m']\n{HALFBYTE}child {VERSION}\n", done.stderr
    assert done.returncode == 4


def test_doctor_of_the_environment_names_the_variable(installed, tmp_path):
    halfbyte = installed.python.with_name("halfbyte.exe" if os.name == "nt" else "halfbyte")

    done = call(halfbyte, "doctor", "--json", cwd=tmp_path, HALFBYTE_BITSANDBYTES="1")

    (one,) = (one for one in json.loads(done.stdout)["variables"] if one["name"] == "HALFBYTE_BITSANDBYTES")
    assert (one["value"], one["owner"]) == ("1", "halfbyte")


def test_uninstalling_leaves_nothing(wheel, installed):
    installed("uninstall", "--yes", "halfbyte")
    try:
        assert [file.name for file in installed.purelib.iterdir() if "halfbyte" in file.name] == []
        code = "import sys; print(sys.meta_path[0].__name__)"
        done = call(installed.python, "-c", code, cwd=installed.purelib, HALFBYTE_BITSANDBYTES="1")
        assert (done.stdout, done.stderr) == ("BuiltinImporter\n", "")
    finally:
        installed("install", *FROM_A_FILE, wheel("pure"))
