"""Which tensors of a checkpoint transformers will load as quantized layers.

transformers' own rules are asked: which modules it replaces (integrations/bitsandbytes.py), which it leaves out
(quantizers/base.py), how it renames the keys of a checkpoint (core_model_loading.py).

Workaround: these rules are not a public interface of transformers; checked with 5.23.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FormatError, InputError
from .checkpoint import Checkpoint, Stored
from .meta_model import Unknown, build_meta_model

log = logging.getLogger("halfbyte.architecture")

# What stands beside a quantized weight in a checkpoint: each must be renamed along with it.
_BESIDE_4BIT = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_BESIDE_INT8 = ("SCB", "weight_format")


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer to quantize.

    module      its path in the model
    tensor      its weight in the checkpoint
    transposed  stored as (in, out), as transformers' Conv1D does
    """

    module: str
    tensor: str
    transposed: bool


@dataclass(frozen=True)
class Selection:
    """What to quantize.

    layers        by tensor name
    skip_modules  for the quantization config: with it transformers converts exactly these layers
    unused        --skip patterns that matched nothing
    """

    layers: Mapping[str, Layer]
    skip_modules: list[str]
    unused: tuple[str, ...]


class Patterns:
    """Names or regular expressions, matched in full against a module's path, its last part or its tensor's name."""

    def __init__(self, option: str, patterns: Iterable[str]) -> None:
        self.used: set[str] = set()
        self._compiled = {}
        for pattern in patterns:
            try:
                self._compiled[pattern] = re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"{option} must be a regular expression or a name; got {pattern!r} ({error})"
                ) from error

    def __bool__(self) -> bool:
        return bool(self._compiled)

    def match(self, *names: str) -> bool:
        """Whether one of the names, or the last part of one, matches one of the patterns."""
        forms = {*names, *(name.rpartition(".")[2] for name in names)}
        hits = [
            text
            for text, compiled in self._compiled.items()
            if text in forms or any(compiled.fullmatch(form) for form in forms)
        ]
        self.used.update(hits)
        return bool(hits)

    def unused(self) -> tuple[str, ...]:
        return tuple(text for text in self._compiled if text not in self.used)


def select(checkpoint: Checkpoint, skip: Sequence[str], include: Sequence[str], int8: bool) -> Selection:
    """Choose the layers to quantize.

    skip      leaves out what matches
    include   replaces transformers' choice: all linear layers that match; for an architecture that transformers
              does not know, all two-dimensional `*.weight` tensors that match
    int8      for the names that an int8 checkpoint has

    Raises InputError for an unknown architecture without `include`, and where nothing is left to quantize.
    """
    skipped, included = Patterns("--skip", skip), Patterns("--include", include)
    try:
        model = build_meta_model(checkpoint.config, len(checkpoint.tensors()))
    except Unknown as unknown:
        if not included:
            raise InputError(str(unknown)) from unknown.__cause__
        log.info("%s", unknown)
        candidates, others = _named(checkpoint, included)
        base = ""
    else:
        candidates, others = _convertible(model, checkpoint, included, int8)
        base = model.base_model_prefix
    chosen = {}
    for layer in candidates:
        if skipped.match(layer.module, layer.tensor.removesuffix(".weight")):
            others.append(layer.module)
        else:
            chosen[layer.tensor] = layer
    for module in others:
        skipped.match(module)
    if not chosen:
        raise InputError(f"nothing to quantize: {_why_nothing(candidates, included)}")
    names = [layer.module for layer in chosen.values()]
    return Selection(chosen, skip_list(names, others, base), skipped.unused())


def _why_nothing(candidates: Sequence[Layer], included: Patterns) -> str:
    if candidates:
        return f"--skip matches all {len(candidates)} layers that would be"
    return "--include matches no layer" if included else "the model has no linear layer that transformers converts"


def _named(checkpoint: Checkpoint, included: Patterns) -> tuple[list[Layer], list[str]]:
    """Layers by tensor name alone."""
    layers, others = [], []
    tensors = checkpoint.tensors()
    for tensor, stored in tensors.items():
        module = tensor.removesuffix(".weight")
        if module == tensor or len(stored.shape) != 2:
            continue
        if not included.match(module, tensor):
            others.append(module)
            continue
        bias = tensors.get(f"{module}.bias")
        if bias is not None and bias.shape != stored.shape[:1]:
            raise InputError(
                f"{tensor} {stored.shape} has a bias {bias.shape}, so it is stored transposed; "
                "that needs an architecture that transformers knows"
            )
        layers.append(Layer(module, tensor, transposed=False))
    return layers, others


def _convertible(model: Any, checkpoint: Checkpoint, included: Patterns, int8: bool) -> tuple[list[Layer], list[str]]:
    """The layers that transformers converts and that the checkpoint has one to one; and all other linear modules."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Conv1D) or type(module) is torch.nn.Linear
    }
    always = list(model._keep_in_fp32_modules or ())
    if included:
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        excluded = _matcher(always)
        wanted = {name for name in linear if f"{name}.weight" not in tied and not excluded(name)}
    else:
        excluded = _matcher(HfQuantizer.get_modules_to_not_convert(model, None, always))
        wanted = {name for name in linear if not excluded(name)}
    rename = _renamer(model, _BESIDE_INT8 if int8 else _BESIDE_4BIT)
    layers: dict[str, Layer] = {}
    for tensor, stored in checkpoint.tensors().items():
        if len(stored.shape) != 2 or not tensor.endswith(".weight"):
            continue
        module = rename(tensor)
        if module is None or module not in wanted:
            continue
        if included and not included.match(module, tensor.removesuffix(".weight"), tensor):
            continue
        _same_shape(tensor, stored, linear[module])
        layers[module] = Layer(module, tensor, isinstance(linear[module], Conv1D))
    return list(layers.values()), [name for name in linear if name not in layers]


def _same_shape(tensor: str, stored: Stored, module: torch.nn.Module) -> None:
    weight = module.weight
    if isinstance(weight, torch.Tensor) and tuple(weight.shape) != stored.shape:
        raise FormatError(f"{tensor} is {stored.shape}, config.json describes {tuple(weight.shape)}")


def _renamer(model: Any, beside: tuple[str, ...]) -> Callable[[str], str | None]:
    """How transformers finds the module of a checkpoint's weight; None for one that it merges or splits on the way."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, meta = model.base_model_prefix, model.state_dict()

    def module_of(tensor: str) -> str | None:
        stem = tensor.removesuffix("weight")
        plain, converter = rename_source_key(tensor, renamings, converters)
        if converter is not None:
            return None
        for name in beside:
            if rename_source_key(stem + name, renamings, converters) != (plain.removesuffix("weight") + name, None):
                return None
        renamed, _ = rename_source_key(tensor, renamings, converters, prefix, meta)
        return str(renamed).removesuffix(".weight")

    return module_of


# -- the skip list -------------------------------------------------------------------------------------------


def skip_list(quantized: Sequence[str], others: Iterable[str], base: str) -> list[str]:
    """`llm_int8_skip_modules`: entries that match every other linear module and no quantized one.

    transformers takes an entry as a prefix, a regular expression or a suffix, so a name that would also hit a
    quantized module is anchored.  A name below the base model is listed without its prefix too, for those who load
    the base model alone.
    """
    forms = [*quantized, *(name.removeprefix(f"{base}.") for name in quantized)] if base else list(quantized)
    entries = []
    for name in sorted(set(others)):
        short = name.removeprefix(f"{base}.") if base else name
        for entry in dict.fromkeys((name, short)):
            if not any(map(_matcher([entry]), forms)):
                entries.append(entry)
            elif not any(map(_matcher([anchored := f"{re.escape(entry)}$"]), forms)):
                entries.append(anchored)
    covered = _matcher(entries)
    if wrong := [name for name in others if not covered(name)] + [name for name in quantized if covered(name)]:
        raise InputError(f"{wrong[0]} cannot be told apart from other layers in llm_int8_skip_modules")
    return entries


def _matcher(entries: Iterable[str]) -> Callable[[str], bool]:
    """Whether transformers would leave a module out (its `should_convert_module`, compiled once)."""
    entries = tuple(entries)
    compiled = [re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))") for entry in entries]

    def match(name: str) -> bool:
        return name.endswith(entries) or any(one.match(name) for one in compiled)

    return match
