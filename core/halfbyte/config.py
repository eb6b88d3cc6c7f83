"""The core's environment variables, read and checked in one place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .backend import EnvVar
from .errors import ConfigError

Chain = tuple[str, ...]
AUTO: Chain = ("auto",)

BACKEND_NAME = re.compile(r"[a-z][a-z0-9_]*")

_FALLBACKS = ("warn", "error", "silent")

VARIABLES = (
    EnvVar("HALFBYTE_BACKEND", "Backends to use, best first: the whole chain.", "a name, a list with commas, auto"),
    EnvVar("HALFBYTE_BACKEND_<OP>", "The same for one op, as in HALFBYTE_BACKEND_LINEAR_4BIT.", "as HALFBYTE_BACKEND"),
    EnvVar("HALFBYTE_FALLBACK", "What happens when an accelerator falls back to the reference.", choices=_FALLBACKS),
    EnvVar("HALFBYTE_PLUGINS", "Which third-party plugins are loaded.", "all, none, or names with commas"),
    EnvVar("HALFBYTE_BITSANDBYTES", "Whether `import bitsandbytes` is answered by halfbyte.", "1, 0"),
)


@dataclass(frozen=True)
class Config:
    """What the environment says.

    backend      chain of HALFBYTE_BACKEND; None leaves the choice to halfbyte
    per_op       op name -> chain
    fallback     "warn", "error" or "silent"
    plugins      names to load; None loads all
    errors       what could not be understood: raised at the first use, so that `doctor` can explain
    """

    backend: Chain | None = None
    per_op: Mapping[str, Chain] = field(default_factory=dict)
    fallback: str = "warn"
    plugins: frozenset[str] | None = None
    errors: tuple[str, ...] = ()


def parse_chain(value: str | Sequence[str], origin: str) -> Chain:
    """A chain from what a user wrote: "triton", "triton,reference", a sequence, or "auto".

    Raises ConfigError for something that is not a list of backend names.
    """
    words = value.split(",") if isinstance(value, str) else value
    chain = tuple(dict.fromkeys(str(word).strip() for word in words)) if isinstance(words, Iterable) else ("",)
    for name in chain:
        if not BACKEND_NAME.fullmatch(name):
            raise ConfigError(f"{origin} must be a backend's name or a comma-separated list of names; got {value!r}")
    if not chain:
        raise ConfigError(f"{origin} must name at least one backend; got {value!r}")
    if "auto" in chain and chain != AUTO:
        raise ConfigError(f"{origin}: auto stands alone; got {value!r}")
    return chain


def read(environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration of this process.  Never raises: what is wrong goes to `errors`."""
    errors: list[str] = []

    def chain(name: str) -> Chain | None:
        if not environ.get(name):
            return None
        try:
            return parse_chain(environ[name], name)
        except ConfigError as error:
            errors.append(str(error))
            return None

    backend = chain("HALFBYTE_BACKEND")
    prefix = "HALFBYTE_BACKEND_"
    per_op = {}
    for name in environ:
        if name.startswith(prefix) and (value := chain(name)):
            per_op[name.removeprefix(prefix).lower()] = value

    fallback = environ.get("HALFBYTE_FALLBACK") or "warn"
    if fallback not in _FALLBACKS:
        errors.append(f"HALFBYTE_FALLBACK must be one of {', '.join(_FALLBACKS)}; got {fallback!r}")
        fallback = "warn"

    # Read by halfbyte_boot when the interpreter starts; here only for what doctor says.
    drop_in = environ.get("HALFBYTE_BITSANDBYTES") or "0"
    if drop_in not in ("0", "1"):
        errors.append(f"HALFBYTE_BITSANDBYTES must be 1 or 0; got {drop_in!r}")

    return Config(backend, per_op, fallback, _plugins(environ.get("HALFBYTE_PLUGINS") or "all"), tuple(errors))


def _plugins(value: str) -> frozenset[str] | None:
    if value == "all":
        return None
    return frozenset() if value == "none" else frozenset(word.strip() for word in value.split(",")) - {""}


def unknown_plugins(config: Config, installed: Iterable[str]) -> tuple[str, ...]:
    """Sentences about names in HALFBYTE_PLUGINS that no plugin has."""
    known = ", ".join(sorted(installed)) or "none"
    return tuple(
        f"HALFBYTE_PLUGINS: there is no plugin {name!r}; installed are {known}"
        for name in sorted((config.plugins or frozenset()) - set(installed))
    )


def unknown_ops(config: Config, ops: Iterable[str]) -> tuple[str, ...]:
    """Sentences about HALFBYTE_BACKEND_<OP> variables that name no op."""
    known = sorted(ops)
    return tuple(
        f"HALFBYTE_BACKEND_{name.upper()}: there is no op {name!r}; ops are {', '.join(known)}"
        for name in sorted(set(config.per_op) - set(known))
    )
