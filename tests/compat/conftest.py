"""Fresh interpreters with the drop-in, beside another bitsandbytes or none; and the real one, as the oracle."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent

# Before anything else: no bitsandbytes is installed, whether or not one is.
HIDDEN = """
from importlib.machinery import PathFinder

def hide(find_spec, find_distributions):
    def spec(cls, name, path=None, target=None):
        return None if name == "bitsandbytes" else find_spec(name, path, target)

    def distributions(cls, context):
        return (one for one in find_distributions(context) if one.metadata["Name"] != "bitsandbytes")

    PathFinder.find_spec, PathFinder.find_distributions = classmethod(spec), classmethod(distributions)

hide(PathFinder.find_spec, PathFinder.find_distributions)
"""


@pytest.fixture(scope="session")
def hidden() -> str:
    """Code that hides an installed bitsandbytes."""
    return HIDDEN


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another bitsandbytes, old, and with a part that halfbyte has not."""
    folder = tmp_path_factory.mktemp("foreign")
    package, info = folder / "bitsandbytes", folder / "bitsandbytes-0.30.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.30.0'\nfeatures = set()\n")
    (package / "research.py").write_text("")
    (package / "nn.py").write_text("Linear4bit = 'foreign'\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.30.0\n")
    return folder


@pytest.fixture(params=["none", "another", "the real one"])
def installed(request: pytest.FixtureRequest, foreign: Path) -> tuple[str, tuple[Path, ...]]:
    """Which bitsandbytes is installed beside halfbyte: code to begin with, and folders for the path."""
    if request.param == "none":
        return HIDDEN, ()
    if request.param == "another":
        return "", (foreign,)
    request.getfixturevalue("real_bitsandbytes")
    return "", ()


@pytest.fixture(scope="session")
def activated(python: Callable[..., Any]) -> Callable[..., Any]:
    """`activated(code, first=hidden, path=(folder,))`: code in a fresh interpreter, after halfbyte_boot.activate()."""

    def run(code: str, *, first: str = "", path: tuple[Path, ...] = (), **options: Any) -> Any:
        begin = f"{first}\nimport halfbyte_boot\nhalfbyte_boot.activate()\n"
        return python(begin + textwrap.dedent(code), path=path, **options)

    return run


# -- the real one, and scripts on the drop-in ----------------------------------------------------------------


class Oracle:
    """`oracle.call("quantize_4bit", (x,))`: the answer of bitsandbytes."""

    def __init__(self):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "BNB_"))}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "bnb_oracle.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**clean, "CUDA_VISIBLE_DEVICES": ""},
        )

    def __getattr__(self, name):
        if name.startswith("_"):  # hypothesis and pytest look for hooks of their own
            raise AttributeError(name)

        def ask(*args, **kwargs):
            pickle.dump((name, args, kwargs), self.process.stdin)
            self.process.stdin.flush()
            good, answer = pickle.load(self.process.stdout)
            if not good:
                raise RuntimeError(f"bitsandbytes raised in {name}:\n{answer}")
            return answer

        return ask


@pytest.fixture(scope="session")
def oracle(real_bitsandbytes):
    oracle = Oracle()
    yield oracle
    oracle.process.stdin.close()
    oracle.process.stdout.close()
    oracle.process.wait(timeout=30)


@pytest.fixture
def served(tmp_path):
    """`served(code)`: run code in a fresh interpreter in which `bitsandbytes` is halfbyte; what it printed."""

    def run(code, check=True):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "BNB_"))}
        paths = [one for one in sys.path if one]
        done = subprocess.run(
            [sys.executable, "-c", "import halfbyte.compat.bitsandbytes\n" + textwrap.dedent(code)],
            env={**clean, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run


@pytest.fixture(scope="session")
def launch() -> Callable[..., Callable[[], None]]:
    """`finish = launch("halfbyte", "qlora.py", "base", folder)`: start a script of this folder on the drop-in, or on
    "bitsandbytes"; `finish()` waits for it.
    """

    def start(library: str, script: str, *words: object) -> Callable[[], None]:
        dropped = ("HALFBYTE_", "BNB_", "PYTEST_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        run = ["-m", "halfbyte", "run"] if library == "halfbyte" else []
        process = subprocess.Popen(
            [sys.executable, *run, str(HERE / script), *map(str, words)],
            env={**clean, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

        def finish() -> None:
            _, said = process.communicate()
            assert process.returncode == 0, said[-4000:]

        return finish

    return start


@pytest.fixture(scope="session")
def base(launch: Callable[..., Callable[[], None]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the float model that all jobs of qlora.py and tuners.py start from, trained for a few steps."""
    folder = tmp_path_factory.mktemp("qlora")
    launch("halfbyte", "qlora.py", "base", folder)()
    return folder
