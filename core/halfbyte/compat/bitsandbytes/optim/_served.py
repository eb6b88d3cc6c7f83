"""halfbyte's optimizers as classes of bitsandbytes' modules."""

from __future__ import annotations

from typing import TypeVar

from torch.optim import Optimizer

Class = TypeVar("Class", bound=type[Optimizer])

PACKAGE = __name__.partition(".bitsandbytes.")[0]

_classes: dict[type, type] = {}


def served(core: Class, module: str) -> Class:
    """A subclass under the same name, defined in the module that `module` of this package is served as.

    transformers looks for "bitsandbytes" in str(cls); pickles find the class in the module that is named there.
    A subclass of a served class is a subclass here too.
    """
    bases: tuple[type, ...] = (core, *(_classes[base] for base in core.__bases__ if base in _classes))
    attributes = {"__module__": module.removeprefix(f"{PACKAGE}."), "__doc__": core.__doc__}
    made = _classes[core] = type(core.__name__, bases, attributes)
    return made  # type: ignore[return-value]
