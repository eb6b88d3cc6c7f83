from collections.abc import Callable

openmp: bool

def levels() -> dict[str, dict[str, Callable[..., None]]]:
    """The built levels, lowest first: name -> op -> function."""

def supports(name: str) -> bool:
    """Whether this CPU runs the level."""
