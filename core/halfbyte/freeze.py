"""freeze_: the layout of a quantized model that torch.export takes."""

from __future__ import annotations

from torch import nn

from .errors import InputError
from .nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt


def freeze_(model: nn.Module) -> list[str]:
    """Give the quantized layers of a model plain parameters, in place, on the same classes.

    A weight becomes a uint8 or int8 nn.Parameter without gradient, its statistics buffers (`weight_absmax`, ...).
    Outputs, gradients for input and bias, checkpoints, moves and `dequantize_` stay as they are; `torch.export`
    then works, and so does whatever knows only parameters and buffers.  A second call changes nothing.

    returns  the names of the quantized layers

    Raises InputError, before anything is changed, for a model with nothing quantized or not quantized yet.
    """
    kinds = (Linear4bit, Linear8bitLt, Embedding4bit, Embedding8bit)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not found:
        raise InputError("there is no quantized layer in this model")
    for layer in found.values():
        layer.require_quantized()
    for layer in found.values():
        layer.freeze_weight_()
    return list(found)
