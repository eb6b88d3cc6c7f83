"""The pages hold to the code: every hook, variable, command, option, error, name and backend has its place."""

from __future__ import annotations

import argparse
import ast
import html
import inspect
import re
import tomllib
import unicodedata
from pathlib import Path

import pytest

import halfbyte
from halfbyte import config, errors, formats, hookspecs, plugins
from halfbyte._runtime import dispatcher
from halfbyte.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/pages"
PAGES = sorted(FOLDER.glob("*.md"))
README = ROOT / "README.md"

HOOKS = [name for name in vars(hookspecs) if name.startswith("halfbyte_")]
ERRORS = [
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == errors.__name__
]
BUILTIN = [dispatcher.plugins.backends[name] for name in ("reference", *plugins.BUILTIN)]
VARIABLES = {variable.name: variable for variable in (*config.VARIABLES, *(v for one in BUILTIN for v in one.env))}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def sections(name: str) -> dict[str, str]:
    """Heading of the second level -> what stands below it."""
    parts = re.split(r"^## (.+)$", read(FOLDER / name), flags=re.MULTILINE)
    return {html.unescape(head).strip("`"): body for head, body in zip(parts[1::2], parts[2::2], strict=True)}


def one_line(text: str) -> str:
    return " ".join(text.split())


def parsers() -> dict[str, argparse.ArgumentParser]:
    subparsers = argparse.ArgumentParser(prog="halfbyte").add_subparsers()
    for command in COMMANDS:
        command.add_parser(subparsers)
    return dict(subparsers.choices)


# -- reference pages -----------------------------------------------------------------------------------------


def test_hooks_page_has_every_signature_and_no_other() -> None:
    signatures = [f"{name}{inspect.signature(getattr(hookspecs, name))}".replace("'", "") for name in HOOKS]

    assert list(sections("reference-hooks.md")) == signatures


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_page_says_what_the_docstring_says(name: str) -> None:
    body = next(body for head, body in sections("reference-hooks.md").items() if head.startswith(f"{name}("))

    sentence, called = (inspect.getdoc(getattr(hookspecs, name)) or "").split("\n\n")[:2]
    assert sentence in body
    assert one_line(called).split(". ")[0] in one_line(body)


def test_variables_page_has_every_variable_and_no_other() -> None:
    assert list(sections("reference-variables.md")) == list(VARIABLES)


@pytest.mark.parametrize("name", VARIABLES)
def test_variables_page_says_what_doctor_says(name: str) -> None:
    body = sections("reference-variables.md")[name]

    assert f"\n{VARIABLES[name].doc}\n" in body
    assert f"\nValues: {VARIABLES[name].values}\n" in body


def test_errors_page_has_every_error_with_its_bases_and_no_other() -> None:
    heads = [f"{name}({', '.join(base.__name__ for base in getattr(errors, name).__bases__)})" for name in ERRORS]

    assert sorted(sections("reference-errors.md")) == sorted(heads)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_page_says_what_the_docstring_says(name: str) -> None:
    body = next(body for head, body in sections("reference-errors.md").items() if head.startswith(f"{name}("))

    assert (inspect.getdoc(getattr(errors, name)) or "").splitlines()[0] in body


def test_command_line_page_has_every_command_and_no_other() -> None:
    assert sorted(sections("command-line.md")) == sorted(f"halfbyte {name}" for name in parsers())


@pytest.mark.parametrize("name", parsers())
def test_command_line_page_has_every_argument_and_no_other(name: str) -> None:
    body = sections("command-line.md")[f"halfbyte {name}"]

    actions = [action for action in parsers()[name]._actions if action.dest != "help"]
    known = {option for action in actions for option in action.option_strings if option.startswith("--")}
    known |= {str(action.metavar) for action in actions if not action.option_strings}
    assert set(re.findall(r"^\| `([A-Z_]+|--[a-z-]+)` \|", body, flags=re.MULTILINE)) == known


def test_install_page_has_every_backend_and_extra() -> None:
    page = read(FOLDER / "install.md")

    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\S+) \|", page, flags=re.MULTILINE)
    assert sorted(rows) == sorted(
        (one.name, str(one.priority), ",".join(sorted(one.device_types)) or "any") for one in BUILTIN
    )
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    extras = re.findall(r"^\| `halfbyte\[(\w+)\]` \|", page, flags=re.MULTILINE)
    assert sorted(extras) == sorted(project["optional-dependencies"])
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in page
    assert all(
        f"torch {one.removeprefix('torch>=')} or newer" in page for one in project["dependencies"] if "torch" in one
    )


def test_formats_page_has_every_format() -> None:
    page = read(FOLDER / "formats.md").lower()

    assert [name for name in formats.FORMATS if name not in page] == []


def test_every_public_name_is_mentioned() -> None:
    pages = " ".join(map(read, PAGES))

    assert [name for name in halfbyte.__all__ if not re.search(rf"\bhalfbyte\.{name}\b|`{name}\b", pages)] == []
    assert [name for name in halfbyte.nn.__all__ if f"`{name}`" not in read(FOLDER / "index.md")] == []


def test_every_function_stands_with_its_signature() -> None:
    page = read(FOLDER / "index.md")

    functional = halfbyte.functional
    public = [
        name
        for name, value in vars(functional).items()
        if inspect.isfunction(value) and name.startswith(("quantize_", "dequantize_", "linear_"))
    ]
    for name in public:
        shown = re.search(rf"^\| `{name}\((.*?)\)` \|", page, flags=re.MULTILINE)
        assert shown, name
        parameters = [
            str(parameter.replace(annotation=inspect.Parameter.empty))
            for parameter in inspect.signature(getattr(functional, name)).parameters.values()
        ]
        assert [word for word in shown.group(1).replace('"', "'").split(", ") if word != "*"] == parameters


def test_every_argument_of_quantize_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", sections("index.md")["quantize_"], flags=re.MULTILINE)

    assert rows == list(inspect.signature(halfbyte.quantize_).parameters)[1:]


# -- tests that must exist -----------------------------------------------------------------------------------


def test_every_hook_and_variable_has_a_test() -> None:
    tests = " ".join(read(path) for path in (ROOT / "tests").rglob("test_*.py"))

    wanted = [f"test_hook_{name}" for name in HOOKS]
    wanted += [f"test_env_{name.replace('<OP>', 'OP')}" for name in VARIABLES]
    assert [name for name in wanted if f"def {name}(" not in tests] == []


# -- nothing that is not there -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_variables_that_a_page_names_are_read(page: Path) -> None:
    per_op = {f"HALFBYTE_BACKEND_{name.upper()}" for name in dispatcher.plugins.ops}
    known = {name.partition("_<")[0] for name in VARIABLES} | per_op
    made_up = {"HALFBYTE_ACME_TABLE", "HALFBYTE_"}  # of the example plugin; a placeholder
    known.add("HALFBYTE_BNB_TESTS")  # which tests/compat/test_peer_suite.py reads

    assert set(re.findall(r"HALFBYTE_[A-Z0-9_]*[A-Z0-9]|HALFBYTE_", read(page))) <= known | made_up | build_options()


def build_options() -> set[str]:
    """What CMake and pyproject.toml read while halfbyte is built."""
    of_cmake = re.search(r"foreach\(name ([A-Z ]+)\)\n  set\(HALFBYTE_", read(ROOT / "csrc" / "CMakeLists.txt"))
    of_pip = re.findall(r"^if\.env\.(HALFBYTE_\w+)", read(ROOT / "pyproject.toml"), flags=re.MULTILINE)
    assert of_cmake is not None
    return {f"HALFBYTE_{name}" for name in of_cmake[1].split()} | set(of_pip)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_sessions_that_a_page_names_exist(page: Path) -> None:
    functions = [node for node in ast.parse(read(ROOT / "noxfile.py")).body if isinstance(node, ast.FunctionDef)]
    sessions = {one.name for one in functions if any("session" in ast.unparse(mark) for mark in one.decorator_list)}

    assert "docs" in sessions
    assert set(re.findall(r"nox -s (\w+)", read(page))) <= sessions


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`((?:core|backends|tests|docs|csrc)/[\w./-]+)`", read(page)))

    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.is_file(), target
        assert not anchor or anchor in anchors(other), target


def anchors(page: Path) -> set[str]:
    """The ids that mkdocs gives to the headings."""
    heads = re.findall(r"^#+ (.+)$", prose(read(page)), flags=re.MULTILINE)
    return {slug(html.unescape(head)) for head in heads}


def slug(heading: str) -> str:
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def test_every_page_is_in_the_navigation_and_on_the_front_page() -> None:
    navigation = read(ROOT / "docs/mkdocs.yml").partition("\nnav:\n")[2]
    front = read(FOLDER / "index.md")

    assert [page.name for page in PAGES if f"- {page.name}\n" not in navigation] == []
    assert [page.name for page in PAGES if page.stem != "index" and f"({page.name}" not in front] == []
