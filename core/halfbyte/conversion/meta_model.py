"""A model's module tree, built on the meta device from its config.json by transformers.

Remote code is never run, and a config may not make this larger than its checkpoint justifies.
"""

from __future__ import annotations

import copy
import importlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import InputError
from .checkpoint import brief

# A config.json of a few bytes can describe any number of layers, which transformers would build or list.
_COUNT = re.compile(r"layer|label|expert|depth|block|stage|head|kernel|lang")
_MAX_COUNT = 100_000
_MODULES, _MODULES_PER_TENSOR = 1000, 20  # an expert's weights may lie stacked in one tensor, but its module does too


class Unknown(Exception):
    """There is no module tree, and why."""


def build_meta_model(config: dict[str, Any], tensors: int) -> Any:
    """The model on the meta device, not larger than the number of tensors justifies.

    Raises Unknown with a sentence, InputError for a model that cannot be quantized in its file.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise Unknown(
            "transformers is not installed, so the model's layers are not known: "
            "pip install halfbyte[transformers], or name the tensors with --include REGEX"
        ) from error
    architecture, kind = _architecture(transformers, config)
    try:
        _check_counts(config)
        settings = kind.config_class.from_dict(copy.deepcopy(config))
        settings._attn_implementation = "eager"  # nothing is computed: no attention package is needed
        with torch.device("meta"), _at_most(_MODULES + _MODULES_PER_TENSOR * tensors):
            model = kind(settings)
    except Exception as error:
        raise Unknown(
            f"transformers {transformers.__version__} cannot build {architecture} from config.json "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "name the tensors with --include REGEX"
        ) from error
    base = importlib.import_module("transformers.quantizers.base")
    for name, module in model.named_modules():
        if type(module).__name__ in base.MODULES_TO_PATCH_FOR_QUANTIZATION:
            raise InputError(
                f"{name} is a {type(module).__name__}, which transformers rebuilds for quantized checkpoints; "
                "such a model must be quantized while it is loaded"
            )
    return model


def _check_counts(config: dict[str, Any]) -> None:
    """Refuse counts for which a list alone would take more memory than any model does."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        for one in value if isinstance(value, list) else [value]:
            if _COUNT.search(key) and isinstance(one, (int, float)) and not one <= _MAX_COUNT:
                raise ValueError(f"{key} must be at most {_MAX_COUNT}; got {brief(one)}")


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Stop a model that grows beyond a number of modules while it is built in this thread."""
    thread, count = threading.get_ident(), 0

    def registered(parent: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > modules:
            raise ValueError(f"it describes more than the {modules} modules that the checkpoint's tensors justify")

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _architecture(transformers: Any, config: dict[str, Any]) -> tuple[str, Any]:
    """Name and class of the model that config.json describes; only transformers' own classes."""
    names, model_type = config.get("architectures"), config.get("model_type")
    if isinstance(names, list) and names and isinstance(names[0], str):
        name = names[0]
        kind = getattr(transformers, name, None) if name.isidentifier() else None
    else:
        auto = importlib.import_module("transformers.models.auto")
        name = f"model_type {model_type!r}"
        known = isinstance(model_type, str) and model_type in auto.CONFIG_MAPPING
        kind = auto.MODEL_MAPPING.get(auto.CONFIG_MAPPING[model_type], None) if known else None
        kind = kind[0] if isinstance(kind, tuple) else kind
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    own_type = getattr(getattr(kind, "config_class", None), "model_type", None)
    if not is_model or model_type not in (None, own_type):
        raise Unknown(
            f"transformers {transformers.__version__} does not know the architecture {name} of model_type "
            f"{model_type!r} (remote code is not run); name the tensors with --include REGEX"
        )
    return name, kind
