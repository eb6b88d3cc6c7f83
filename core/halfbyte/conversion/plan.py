"""What a conversion would do, from config and headers alone: read, refuse what cannot be, choose the layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, InputError
from . import architecture
from .architecture import Selection
from .checkpoint import Checkpoint, brief, read_checkpoint
from .entries import describe
from .options import Options

WEIGHT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Plan:
    """A checkpoint, what of it is quantized, and how."""

    checkpoint: Checkpoint
    selection: Selection
    options: Options

    def quantization_config(self) -> dict[str, Any]:
        """What transformers' BitsAndBytesConfig.to_dict() serializes (5.23)."""
        options, int8 = self.options, self.options.format == "int8"
        return {
            "quant_method": "bitsandbytes",
            "_load_in_8bit": int8,
            "_load_in_4bit": not int8,
            "llm_int8_threshold": float(options.threshold),
            "llm_int8_skip_modules": self.selection.skip_modules,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "bnb_4bit_quant_type": "fp4" if int8 else options.format,
            "bnb_4bit_use_double_quant": options.nested,
            "bnb_4bit_compute_dtype": options.compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "load_in_4bit": not int8,
            "load_in_8bit": int8,
        }

    def written(self) -> dict[str, tuple[str, int]]:
        """File and bytes of every tensor of the result; see `entries.describe` for what is not exact.

        Raises FormatError where two would have one name.
        """
        found: dict[str, tuple[str, int]] = {}
        for file, header in self.checkpoint.shards.items():
            for name, stored in header.items():
                layer = self.selection.layers.get(name)
                sizes = {name: stored.nbytes} if layer is None else describe(layer, stored, self.options)
                if stray := sorted(sizes.keys() & found.keys()):
                    raise FormatError(f"{brief(stray[0])} would be written twice: the checkpoint holds it already")
                found.update((entry, (file, nbytes)) for entry, nbytes in sizes.items())
        return found


def make_plan(origin: Path, options: Options, skip: Sequence[str], include: Sequence[str]) -> Plan:
    """Read a model's headers and choose its layers; see `convert` for skip and include.

    Raises InputError, FormatError.
    """
    checkpoint = read_original(origin)
    return plan_for(checkpoint, options, skip, include)


def read_original(origin: Path) -> Checkpoint:
    """A checkpoint that is not quantized yet."""
    checkpoint = read_checkpoint(origin)
    _refuse_quantized(checkpoint)
    return checkpoint


def plan_for(checkpoint: Checkpoint, options: Options, skip: Sequence[str], include: Sequence[str]) -> Plan:
    """The plan for a checkpoint that `read_original` gave."""
    selection = architecture.select(checkpoint, skip, include, options.format == "int8")
    _check_weights(checkpoint, selection)
    return Plan(checkpoint, selection, options)


def apart(source: Path, destination: Path) -> tuple[Path, Path]:
    """Both paths resolved.  Raises InputError where the destination is taken, or inside the source."""
    if os.path.lexists(destination):
        raise InputError(f"{destination} is there already; name a folder that does not exist")
    origin = Path(os.path.realpath(source))
    parent = Path(os.path.realpath(destination.parent))
    target = parent / destination.name
    if destination.name in ("", ".."):
        raise InputError(f"the output must be the path of a new folder; got {destination}")
    if origin in (target, *target.parents):
        raise InputError(f"{destination} lies inside the model's own folder {source}; name one outside it")
    if not parent.is_dir():
        raise InputError(f"{destination} needs the folder {destination.parent}, which does not exist")
    return origin, target


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    sections = (checkpoint.config, *(one for one in checkpoint.config.values() if isinstance(one, dict)))
    for section in sections:
        if (method := section.get("quantization_config")) is not None:
            method = method.get("quant_method") if isinstance(method, dict) else method
            raise InputError(
                f"{checkpoint.folder} is quantized already (quant_method {brief(repr(method))}); "
                "start from the original"
            )
    for name in checkpoint.tensors():
        if name.endswith((".weight.absmax", ".SCB")):
            raise InputError(
                f"{checkpoint.folder} is quantized already (it holds {brief(name)}); start from the original"
            )


def _check_weights(checkpoint: Checkpoint, selection: Selection) -> None:
    tensors = checkpoint.tensors()
    for name in selection.layers:
        if 0 in tensors[name].shape:
            raise InputError(f"{name} {tensors[name].shape} has no elements to quantize (--skip leaves it as it is)")
        if (dtype := tensors[name].dtype) not in WEIGHT_DTYPES:
            allowed = ", ".join(WEIGHT_DTYPES.values())
            raise InputError(
                f"{name} must be one of {allowed} to be quantized; got {dtype} (--skip leaves it as it is)"
            )
