"""bitsandbytes.utils."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import FormatError
from ...outliers import OutlierTracer, find_outlier_dims, outlier_hook

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "execute_and_return",
    "find_outlier_dims",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]

# Of Linear8bitLt's `weight_format`; only rows are written and read.
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {code: name for name, code in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """JSON as a uint8 tensor, for files that hold tensors only."""
    return torch.frombuffer(bytearray(json.dumps(source_dict).encode()), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """Undo pack_dict_to_tensor."""
    try:
        entries = json.loads(tensor_data.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"this tensor does not hold JSON: {error}") from error
    if not isinstance(entries, dict):
        raise FormatError(f"this tensor must hold a JSON object; got {type(entries).__name__}")
    return entries


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[[int, int, bool], nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Put linear_replacement(in_features, out_features, has_bias) in place of every linear layer, and give the model.

    skip_modules              names to leave out: the last part of a path
    copy_weights              let the replacements take weight and bias
    post_processing_function  name of a method to call on each replaced layer
    """
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or not name or name.rpartition(".")[2] in skip_modules:
            continue
        new: Any = linear_replacement(layer.in_features, layer.out_features, layer.bias is not None)
        if copy_weights:
            new.weight, new.bias = layer.weight, layer.bias
        model.set_submodule(name, new)
        if post_processing_function is not None and (then := getattr(layer, post_processing_function, None)):
            then()
    return model


def sync_gpu(t: Tensor) -> None:
    """Wait for the device of a tensor."""
    if t.device.type != "cpu" and not t.is_meta:
        torch.accelerator.synchronize(t.device)


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Run a command without a shell: its stdout and stderr, stripped."""
    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, encoding="utf-8", check=False)
    return done.stdout.strip(), done.stderr.strip()
