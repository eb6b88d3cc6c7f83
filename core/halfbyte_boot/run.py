"""`halfbyte run`: a script or a module with halfbyte in the place of bitsandbytes, here and in its children."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from . import VARIABLE, activate


def main() -> int:
    """The console script.  `halfbyte run` imports nothing before the script; the other commands need halfbyte."""
    match sys.argv[1:]:
        case ["run", "-m", target, *args] if not target.startswith("-"):
            return run(target, args, module=True)
        case ["run", target, *args] if not target.startswith("-"):
            return run(target, args, module=False)
    from halfbyte.__main__ import main

    return main()


def run(target: str, args: Sequence[str], *, module: bool) -> int:
    """Run it as `python target args` or `python -m target args` would.

    returns    0; 2 where there is no such script or module, told in one sentence on stderr.  What the script raises
               goes on to the caller, SystemExit too
    """
    os.environ[VARIABLE] = "1"
    activate()
    sys.argv[:] = [target, *args]
    if not sys.flags.safe_path:  # else the first entry is not a script's folder
        folder = os.path.dirname(os.path.realpath(target)) if os.path.isfile(target) else target
        sys.path[0] = os.getcwd() if module else folder
    if not (_is_module(target) if module else os.path.exists(target)):
        print(f"halfbyte: there is no {'module' if module else 'script'} {target!r}", file=sys.stderr)
        return 2
    if module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target, run_name="__main__")
    return 0


def _is_module(name: str) -> bool:
    """Whether it is found.  An error of a package around it is the caller's to see."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            return False
        raise
