"""The one dispatcher of this process, started when halfbyte is imported."""

from __future__ import annotations

import warnings

from . import calling, ops
from . import config as configuration
from .config import Config
from .dispatch import Dispatcher
from .errors import BackendUnavailable, ConfigError, HalfbyteWarning
from .plugins import Plugins
from .reference import ReferenceBackend
from .torch_ops import register


def start() -> Dispatcher:
    """Load plugins, register every op with torch, fill the tables of `calling`."""
    config = configuration.read()
    plugins = Plugins()
    plugins.ops.update((op.name, op) for op in ops.ALL)
    plugins.backends["reference"] = ReferenceBackend(plugins.ops)
    plugins.providers["reference"] = "halfbyte"
    installed = plugins.load(config.plugins)
    dispatcher = Dispatcher(plugins, config)
    for name, op in plugins.ops.items():
        calling.planned[name] = dispatcher.caller(op)
        calling.bound[name] = dispatcher.binder(op)
        register(op, calling.planned[name])
    problems = config.errors + configuration.unknown_ops(config, plugins.ops)
    problems += configuration.unknown_plugins(config, installed)
    if problems:
        dispatcher.config = Config(config.backend, config.per_op, config.fallback, config.plugins, problems)
    try:
        dispatcher.check_choice()
    except (ConfigError, BackendUnavailable) as error:
        warnings.warn(f"{error} (`halfbyte doctor` explains)", HalfbyteWarning, stacklevel=2)
    return dispatcher


dispatcher = start()
