"""Fresh interpreters with the drop-in, beside a bitsandbytes that is not halfbyte, or beside none."""

from __future__ import annotations

import importlib.metadata
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import halfbyte

HERE = Path(__file__).resolve().parent
PLACEHOLDER = HERE / "placeholder"
SURFACE = Path(halfbyte.__file__).parent / "compat/bitsandbytes/surface.py"

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
def lent() -> tuple[Path, ...]:
    """What must stand on the path of an interpreter that imports bitsandbytes."""
    return () if SURFACE.exists() else (PLACEHOLDER,)


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
    if not any(one.name == "bitsandbytes" for one in importlib.metadata.distributions()):
        pytest.skip("bitsandbytes is not installed")
    return "", ()


@pytest.fixture(scope="session")
def activated(python: Callable[..., Any], lent: tuple[Path, ...]) -> Callable[..., Any]:
    """`activated(code, first=hidden, path=(folder,))`: code in a fresh interpreter, after halfbyte_boot.activate()."""

    def run(code: str, *, first: str = "", path: tuple[Path, ...] = (), **options: Any) -> Any:
        begin = f"{first}\nimport halfbyte_boot\nhalfbyte_boot.activate()\n"
        return python(begin + textwrap.dedent(code), path=(*lent, *path), **options)

    return run
