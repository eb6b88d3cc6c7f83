"""bitsandbytes.nn.modules, where its layers are defined."""

from __future__ import annotations

from typing import Any

from ....errors import InputError
from ....nn.stored import check_layout
from ....outliers import OutlierTracer
from . import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    OutlierAwareLinear,
    Params4bit,
    StableEmbedding,
)

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "OutlierTracer",
    "Params4bit",
    "StableEmbedding",
    "fix_4bit_weight_quant_state_from_module",
    "maybe_rearrange_weight",
]


def fix_4bit_weight_quant_state_from_module(module: Embedding4bit | Linear4bit) -> None:
    """Give a weight its state back where FSDP has dropped it.  halfbyte's layers need no such repair."""
    weight, state = module.weight, module.current_state()
    if state is None:
        raise InputError(f"this {type(module).__name__} is not quantized yet: move it with .to(device)")
    if isinstance(weight, Params4bit) and weight.quant_state is None:
        weight.quant_state = state


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Before load_state_dict of an int8 layer: take `weight_format` out, and raise FormatError if it is not rows."""
    if state_dict.get(f"{prefix}weight") is not None:
        check_layout(state_dict.pop(f"{prefix}weight_format", "row"))
