"""Whole models: what training, decoding and loading a Llama of random weights take in bf16, bitsandbytes and halfbyte.

    python llama.py                                         every case, with the shape of Llama 3.1 8B
    python llama.py --cases "train, nf4" --folder llama
    python llama.py --cases example --folder llama          the scripts of docs/examples, on halfbyte alone

Needs transformers, accelerate, peft and, as a peer, bitsandbytes.  Each library runs each case in a process of its own,
llama_worker.py.  A folder that is named keeps the model for the next call.  The exit code is 1 where a process fails or
a limit is missed; both are told at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
WORKER = HERE / "llama_worker.py"
LIBRARIES = ("torch", "bitsandbytes", "halfbyte")


@dataclass(frozen=True)
class Limit:
    """What halfbyte may take at most: `value` times what `of` takes, or `value` itself."""

    measure: str
    value: float
    of: str | None = None

    def missed(self, figures: dict[str, dict[str, float | None]]) -> str | None:
        """One sentence, or none where it holds or nothing was measured."""
        own = figures.get("halfbyte", {}).get(self.measure)
        other = figures.get(self.of, {}).get(self.measure) if self.of else 1.0
        if own is None or other is None or own <= self.value * other:
            return None
        what = f" times that of {self.of}" if self.of else ""
        return f"{self.measure} is {own / other:.3f}{what}, at most {self.value} is wanted"


@dataclass(frozen=True)
class Case:
    name: str
    limits: tuple[Limit, ...] = ()


CASES = [
    *(
        Case(
            f"train, {kind}{how}",
            (Limit("ms", 1.4 if kind == "int8" else 1.15, "torch"), Limit("peak GB", 1.0, "bitsandbytes")),
        )
        for kind in ("nf4", "nf4 nested", "int8")
        for how in ("", ", prepared")
    ),
    Case("decode, nf4, batch 1", (Limit("ms", 3.8),)),
    Case("decode, nf4, batch 8", (Limit("ms", 4.8),)),
    Case("load, nf4", (Limit("s", 1.0, "bitsandbytes"),)),
]

# In an order in which each finds what it needs.
SCRIPTS = [
    "generate.py model --bits 4",
    "generate.py model --bits 8",
    "save_reload.py model quantized --bits 4",
    "save_reload.py model quantized --bits 8",
    "qlora.py model adapter",
    "merge.py model adapter merged",
    "train_8bit_optimizer.py model",
    "offload.py model --memory {room}",
]
ROOM = {"tiny": "1MiB", "8b": "3GiB"}  # for some of the model's modules, not for all


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.needs_model and not (folder / "model/config.json").exists():
            make = [sys.executable, str(EXAMPLES / "make_model.py"), "model", "--size", arguments.size]
            print(run(make, folder, arguments.device), flush=True)
        problems = measure(arguments, folder) + run_scripts(arguments, folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=".*", metavar="REGEX", help="only those whose name contains a match")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), metavar="LIST", help="which ones to run")
    parser.add_argument("--size", choices=("tiny", "8b"), default="8b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--folder", metavar="DIR", help="where the model and what scripts write goes and stays")
    parser.add_argument("--profile", metavar="DIR", help="write there what a call of each case and library spends")
    arguments = parser.parse_args()
    scripts = [words.format(room=ROOM[arguments.size]) for words in SCRIPTS]
    arguments.scripts = [words for words in scripts if re.search(arguments.cases, f"example, {words}")]
    every, arguments.cases = arguments.cases, [case for case in CASES if re.search(arguments.cases, case.name)]
    if not arguments.cases and not arguments.scripts:
        names = [case.name for case in CASES] + [f"example, {words}" for words in scripts]
        parser.error(f"--cases {every!r} matches none of: {'; '.join(names)}")
    arguments.libraries = arguments.libraries.split(",")
    if unknown := set(arguments.libraries) - set(LIBRARIES):
        parser.error(f"--libraries must list some of {', '.join(LIBRARIES)}; got {sorted(unknown)[0]!r}")
    arguments.needs_model = bool(arguments.scripts) or any(case.name.startswith("load") for case in arguments.cases)
    return arguments


def measure(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Print the table, row by row.  Returns what failed, and the limits that are missed."""
    problems: list[str] = []
    libraries = arguments.libraries
    if arguments.cases:
        others = [f"halfbyte / {name}" for name in libraries if name != "halfbyte"]
        print(row("case", [*libraries, *others]))
        print("|---|" + "--:|" * (len(libraries) + len(others)), flush=True)
    for case in arguments.cases:
        figures = {}
        for library in libraries:
            command = [sys.executable, str(WORKER), library, case.name, arguments.size, arguments.device]
            if arguments.profile:
                Path(arguments.profile).mkdir(parents=True, exist_ok=True)
                name = f"{library} {case.name}.txt".replace(", ", "-").replace(" ", "-")
                command += ["--profile", str(Path(arguments.profile, name).absolute())]
            try:
                figures[library] = json.loads(run(command, folder, arguments.device))
            except RuntimeError as error:
                problems.append(f"{case.name}, {library}: {error}")
        print("\n".join(rows(case, libraries, figures)), flush=True)
        if arguments.size == "8b":
            problems += [f"{case.name}: {text}" for limit in case.limits if (text := limit.missed(figures))]
    return problems


def run_scripts(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Print what each script says at last, and its time.  Returns what failed."""
    problems = []
    for words in arguments.scripts:
        name, *rest = words.split()
        command = [sys.executable, "-m", "halfbyte", "run", str(EXAMPLES / name), *rest]
        started = time.perf_counter()
        try:
            said = run(command, folder, arguments.device)
            print(f"{words}: {said} ({time.perf_counter() - started:.0f} s)", flush=True)
        except RuntimeError as error:
            problems.append(f"{words}: {error}")
    return problems


def run(command: list[str], folder: Path, device: str) -> str:
    """The last line that it prints.  Raises RuntimeError with the end of its errors."""
    clean = {name: value for name, value in os.environ.items() if name != "HALFBYTE_BITSANDBYTES"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    path = {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}  # absolute, as the folder is another one
    variables = {**clean, **hidden, **path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def rows(case: Case, libraries: list[str], figures: dict[str, dict[str, float | None]]) -> list[str]:
    """One row of the table for each thing measured."""
    made = []
    for measure in next(iter(figures.values()), {}):
        found = [figures.get(library, {}).get(measure) for library in libraries]
        own = figures.get("halfbyte", {}).get(measure)
        others = [other for library, other in zip(libraries, found, strict=True) if library != "halfbyte"]
        cells = ["" if one is None else f"{one:.2f}" for one in found]
        cells += [f"{own / other:.2f}" if own and other else "" for other in others]
        if any(cells):
            made.append(row(f"{case.name}, {measure}", cells))
    return made


def row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
