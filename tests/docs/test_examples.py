"""The pages' examples run, and print what stands below them.

Per page, in a fresh interpreter and a scratch folder, in order: a python block whose first line is `# path.py` is
written there, a toml block `# pyproject.toml` becomes the metadata of an installed distribution, every other python
block is executed.  A text block right after it is its output, with `...` for what differs between machines.  A block
below a line "Not run here, ..." is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/pages").glob("*.md"))

DRIVER = """
import contextlib, io, json, os
os.chdir({folder!r})
scope, printed = {{"__name__": "__main__"}}, []
for name, source in json.load(open("blocks.json")):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, name, "exec"), scope)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text and line, and the line of prose above it."""

    language: str
    text: str
    line: int
    above: str

    @property
    def path(self) -> str:
        """The file that it shows; "" for none."""
        found = re.match(r"# (\S+\.(?:py|toml))\n", self.text)
        return found.group(1) if found else ""


def blocks(text: str) -> list[Block]:
    found, above = [], ""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if line.startswith("```"):
            body = []
            for _, inner in lines:
                if inner == "```":
                    break
                body.append(inner + "\n")
            else:
                raise AssertionError(f"the fence in line {number} is not closed")
            found.append(Block(line.removeprefix("```"), "".join(body), number, above))
            above = ""
        elif line.strip():
            above = line
    return found


def install(folder: Path, pyproject: str) -> None:
    """What pip would leave of a pyproject.toml for importlib.metadata."""
    project = tomllib.loads(pyproject)["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {module}" for name, module in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run_and_print_what_the_page_shows(page: Path, tmp_path: Path, python: Callable[..., Any]) -> None:
    found = blocks(page.read_text(encoding="utf-8"))
    executed: list[tuple[Block, str]] = []
    for block, following in itertools.zip_longest(found, found[1:]):
        if block.language not in ("python", "toml") or block.above.startswith("Not run here, "):
            continue
        if block.path == "pyproject.toml":
            install(tmp_path, block.text)
        elif block.path:
            file = tmp_path / block.path
            file.parent.mkdir(exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(block.text, encoding="utf-8")
            module = ".".join(Path(block.path).with_suffix("").parts).removesuffix(".__init__")
            executed.append((Block("python", f"import halfbyte, {module}\n", block.line, ""), ""))
        elif block.language == "python":
            shown = following is not None and following.language == "text" and not following.above
            executed.append((block, following.text if following is not None and shown else ""))
    if not executed:
        assert not [block for block in found if block.language == "python"], "every block of this page is left out"
        return
    sources = [(f"{page.name}:{block.line}", block.text) for block, _ in executed]
    (tmp_path / "blocks.json").write_text(json.dumps(sources), encoding="utf-8")

    done = python(DRIVER.format(folder=str(tmp_path)), path=(tmp_path,))

    assert done.stderr == ""
    said = zip(executed, json.loads(done.stdout.splitlines()[-1]), strict=True)
    wrong = [
        f"{page.name}:{block.line} shows\n{expected}\nand prints\n{printed}"
        for (block, expected), printed in said
        if not doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
    ]
    assert not wrong, "\n\n".join(wrong)


# -- commands ------------------------------------------------------------------------------------------------

SHELL = ("", "console", "sh", "bash")
COMMAND = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S* )*(?:python -m )?(halfbyte(?: .*)?)$")
README = ROOT / "README.md"


def parser() -> argparse.ArgumentParser:
    """The commands, as `halfbyte.__main__` puts them together."""
    made = argparse.ArgumentParser(prog="halfbyte")
    made.add_argument("--version", action="store_true")
    subparsers = made.add_subparsers(dest="command")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return made


def shell_lines(page: Path) -> list[str]:
    found = blocks(page.read_text(encoding="utf-8"))
    return [line for block in found if block.language in SHELL for line in block.text.splitlines()]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_commands_shown_in_blocks_parse(page: Path) -> None:
    for line in shell_lines(page):
        for part in re.split(r" && ", line.partition("  #")[0]):
            if match := COMMAND.match(part.strip()):
                stderr = io.StringIO()
                try:
                    with contextlib.redirect_stderr(stderr):
                        parser().parse_args(shlex.split(match.group(1))[1:])
                except SystemExit:
                    pytest.fail(f"{line}\n{stderr.getvalue()}")


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_commands_named_in_the_text_exist(page: Path) -> None:
    choices = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for code in re.findall(r"`((?:[A-Z_]+=\S* )*halfbyte\s[^`]+)`", page.read_text(encoding="utf-8")):
        words = shlex.split(code)
        words = words[words.index("halfbyte") + 1 :]
        if words[0] == "--version":
            continue
        assert words[0] in choices, code
        known = {option for action in choices[words[0]]._actions for option in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= known, code


def test_examples_of_commands_are_found() -> None:
    assert sum(bool(COMMAND.match(line)) for page in PAGES for line in shell_lines(page)) > 10
