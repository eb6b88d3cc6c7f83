"""The object on `sys.meta_path` that answers for bitsandbytes: finder, loader and finder of its distribution.

`bitsandbytes.x` IS the module `halfbyte.compat.bitsandbytes.x`: one object under two names.  A copy under the other
name would execute the module twice, so that `isinstance` and `is` tell two classes apart that look the same; a thin
module that repeats the attributes would not see what a user patches into the other.  With one object both names pickle,
whatever `__module__` says, and the module keeps its own `__name__`, `__package__` and `__spec__`, on which its relative
imports depend.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import Distribution, DistributionFinder

NAME = "bitsandbytes"
SERVED = "halfbyte.compat.bitsandbytes"

# Of halfbyte's package, not of bitsandbytes'.
HIDDEN = frozenset(f"{SERVED}.{name}" for name in ("surface", "ops", "retired", "optim._served"))


def foreign() -> str:
    """Where a bitsandbytes that is not halfbyte was imported from; "" for none."""
    module = sys.modules.get(NAME)
    if module is None or hasattr(module, "__halfbyte_version__"):
        return ""
    return str(getattr(module, "__file__", None) or "an unknown place")


def behind(name: str) -> str:
    """The module that answers for `bitsandbytes.x`."""
    return SERVED + name.removeprefix(NAME)


class Finder:
    """Three roles in one place, so that the module and its metadata are always halfbyte's together."""

    # -- finder ----------------------------------------------------------------------------------------------

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """The spec of bitsandbytes or a part of it that halfbyte has; None for every other name.

        Raises ModuleNotFoundError for a part that halfbyte lacks: None would pass the question on to an installed
        bitsandbytes, and a mixture of the two would load.
        """
        if name.partition(".")[0] != NAME:
            return None
        found = _look(behind(name))
        if found is None:
            raise ModuleNotFoundError(
                f"No module named {name!r}: halfbyte answers for bitsandbytes here and has no such part", name=name
            )
        folders = found.submodule_search_locations
        loader: Any = self  # not a subclass of importlib.abc.Loader, which every interpreter would have to load
        spec = ModuleSpec(name, loader, origin=found.origin, is_package=folders is not None)
        spec.submodule_search_locations = folders
        spec.has_location = found.has_location
        return spec

    # -- loader ----------------------------------------------------------------------------------------------

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """halfbyte's own module, imported under its own name; here torch is loaded."""
        module = importlib.import_module(behind(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Undo what the import system changed, which takes the module for a new one; name its parts, too."""
        assert module.__spec__ is not None
        name = module.__spec__.name
        module.__spec__ = module.__spec__.loader_state
        if name == NAME:  # callers look a class up with sys.modules[cls.__module__]
            for part, other in list(sys.modules.items()):
                if part.startswith(f"{SERVED}.") and part not in HIDDEN:
                    sys.modules.setdefault(NAME + part.removeprefix(SERVED), other)

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m bitsandbytes`."""
        found = _look(behind(name))
        loader: Any = found and found.loader
        code: CodeType | None = loader.get_code(behind(name)) if loader else None
        return code

    # -- distribution finder ---------------------------------------------------------------------------------

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        """bitsandbytes' distribution, for all and for its own name.

        Not for a search of given folders: that is how installers ask what lies in them, and there is nothing.
        """
        asked = vars(context) if context is not None else {}
        if asked.get("name") is None or _normal(asked["name"]) == NAME:
            if "path" in asked and asked["path"] is not sys.path:
                return
            from .distribution import Served

            yield Served()


def _normal(name: str) -> str:
    """As installers compare names."""
    import re

    return re.sub(r"[-_.]+", "-", name).lower()


def _look(name: str) -> ModuleSpec | None:
    """The spec of one of halfbyte's modules, found folder by folder so that no package around it is imported."""
    if name in HIDDEN:
        return None
    spec: ModuleSpec | None = None
    path: Sequence[str] | None = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        if count > 1 and path is None:
            return None
        spec = _ask(".".join(parts[:count]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _ask(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    for finder in list(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        if find_spec is not None and not isinstance(finder, Finder):
            spec: ModuleSpec | None = find_spec(name, path)
            if spec is not None:
                return spec
    return None
