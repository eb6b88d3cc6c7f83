"""The one dispatcher of this process, started when halfbyte is imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from . import config as configuration
from . import ops
from .config import Config
from .dispatch import Dispatcher
from .errors import BackendUnavailable, ConfigError, HalfbyteWarning
from .plugins import Plugins
from .reference import ReferenceBackend
from .torch_ops import register


def start() -> tuple[Dispatcher, dict[str, Callable[..., Any]]]:
    """Load plugins, register every op with torch; the dispatcher and the callers by op name."""
    config = configuration.read()
    plugins = Plugins()
    plugins.ops.update((op.name, op) for op in ops.ALL)
    plugins.backends["reference"] = ReferenceBackend(plugins.ops)
    plugins.providers["reference"] = "halfbyte"
    installed = plugins.load(config.plugins)
    dispatcher = Dispatcher(plugins, config)
    callers = {name: dispatcher.caller(op) for name, op in plugins.ops.items()}
    for name, op in plugins.ops.items():
        register(op, callers[name])
    problems = config.errors + configuration.unknown_ops(config, plugins.ops)
    problems += configuration.unknown_plugins(config, installed)
    if problems:
        dispatcher.config = Config(config.backend, config.per_op, config.fallback, config.plugins, problems)
    try:
        dispatcher.check_choice()
    except (ConfigError, BackendUnavailable) as error:
        warnings.warn(f"{error} (`halfbyte doctor` explains)", HalfbyteWarning, stacklevel=2)
    return dispatcher, callers


dispatcher, callers = start()
