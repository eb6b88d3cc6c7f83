"""Puts halfbyte in the place of bitsandbytes, before anything is imported.

Standard library only: neither torch nor halfbyte is imported until `import bitsandbytes` asks for them.  The wheel has
two files beside this package, `halfbyte.pth` and `halfbyte.start`, through which every interpreter of the environment
calls `start`: Python reads the first up to 3.17, and from 3.15 on the second instead of it (PEP 829).
"""

import os
import sys

VARIABLE = "HALFBYTE_BITSANDBYTES"

# The bitsandbytes whose interface is served: no local suffix, because callers compare it, some of them as a string.
VERSION = "0.50.2"

REMEDY = (
    "set HALFBYTE_BITSANDBYTES=1, or start the script with `halfbyte run`, or import halfbyte.compat.bitsandbytes "
    "before everything else"
)


def start() -> None:
    """What happens when an interpreter starts: `activate` where the variable says so."""
    value = os.environ.get(VARIABLE, "")
    if value == "1":
        activate()
    elif value not in ("", "0"):
        import warnings

        warnings.warn(f"{VARIABLE} must be 1 or 0; got {value!r}, so bitsandbytes stays as it is", stacklevel=2)


def activate() -> None:
    """From now on `import bitsandbytes` is halfbyte, and so is its distribution.  A second call changes nothing.

    Raises ImportError where another bitsandbytes is imported already.
    """
    from .finder import Finder, foreign

    if other := foreign():
        raise ImportError(
            f"bitsandbytes is imported already, from {other}, so halfbyte cannot take its place any more: {REMEDY} "
            "(peft imports bitsandbytes at once, and with it Trainer and trl)",
            name="bitsandbytes",
        )
    # By name: a second copy of this package, or a reload, brings a class of its own.
    mine = [one for one in sys.meta_path if (type(one).__module__, type(one).__name__) == (Finder.__module__, "Finder")]
    for one in mine:
        sys.meta_path.remove(one)
    sys.meta_path.insert(0, mine[0] if mine else Finder())
