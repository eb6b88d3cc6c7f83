"""quantize_ and dequantize_: any torch model, in place, with a report."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import formats, functional
from .errors import InputError
from .kernel import show
from .nn import Embedding4bit, Embedding8bit, Int8Params, Linear4bit, Linear8bitLt, Params4bit
from .ops.checks import FLOATS, blocksize_4bit

FORMATS = (*formats.FORMATS, "int8")

Filter = Callable[[str, nn.Module], bool]
QuantizedLayer = Linear4bit | Linear8bitLt | Embedding4bit | Embedding8bit

_QUANTIZED = (Linear4bit, Linear8bitLt, Embedding4bit, Embedding8bit)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    shape           of its weight
    bytes_before    of its weight
    bytes_after     of its codes and statistics
    relative_error  norm of (dequantized - weight) over norm of the weight
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_` did.

    layers   each quantized layer
    skipped  name -> why a layer of a quantizable kind was left as it is
    """

    format: str
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'shape':>16}  {'before':>10}  {'after':>10}  {'error':>7}"]
        lines += [
            f"{layer.name:{width}}  {'x'.join(map(str, layer.shape)):>16}  {_megabytes(layer.bytes_before):>10}  "
            f"{_megabytes(layer.bytes_after):>10}  {layer.relative_error:7.4f}"
            for layer in self.layers
        ]
        before, after = self.bytes_before, self.bytes_after
        lines.append(
            f"{len(self.layers)} layers to {self.format}: {_megabytes(before)} -> {_megabytes(after)} "
            f"({before / max(after, 1):.1f}x smaller), {len(self.skipped)} skipped"
        )
        return "\n".join(lines)


def quantize_(
    model: nn.Module,
    format: str = "nf4",
    *,
    blocksize: int = 64,
    nested: bool = False,
    threshold: float = 6.0,
    skip: Sequence[str] = ("lm_head",),
    filter: Filter | None = None,
    embeddings: bool = False,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> QuantizeReport:
    """Replace the linear layers of a model by quantized ones, in place.

    format      "nf4", "fp4" or "int8" (LLM.int8())
    blocksize   of the 4-bit formats: a power of two from 32 to 4096
    nested      quantize the absmax of the 4-bit formats too
    threshold   of int8: magnitude from which an activation stays out of the integer product
    skip        names or regular expressions, matched against a module's full path or its last part
    filter      decides on (name, module); None takes every layer
    embeddings  quantize nn.Embedding too
    device      where the quantized layers go; None leaves each where it is
    progress    show a progress bar; None shows it where stderr is a terminal

    Layers are exactly of type nn.Linear (or nn.Embedding): a subclass means something of its own.  A weight that
    several modules share stays as it is, and one that is computed from others (weight_norm, prune, parametrizations).
    Forward and backward hooks go along.

    Raises InputError, before anything is changed, for a wrong format, block size, dtype, device or pattern, a weight
    on meta, a model with nothing to quantize and one that is quantized already.
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if format == "int8":
        if nested:
            raise InputError("nested absmax is for nf4 and fp4; got format='int8'")
        if not threshold >= 0:
            raise InputError(f"threshold must be 0 (no outliers) or positive; got {threshold}")
    else:
        blocksize_4bit(blocksize)
    if device is not None:
        require_device(device)
    chosen, skipped = _choose(model, compile_patterns(skip), filter, embeddings)

    def quantized(layer: nn.Linear | nn.Embedding) -> QuantizedLayer:
        if format == "int8":
            return _as_int8(layer, threshold)
        return _as_4bit(layer, format, blocksize, nested)

    reports = []
    with _progress_bar(f"quantizing to {format}", len(chosen), progress) as advance:
        for names, layer in chosen:
            new = quantized(layer).to(device or layer.weight.device)
            reports.append(_report(names[0], layer, new))
            for name in names:
                model.set_submodule(name, new)
            advance(names[0])
    return QuantizeReport(format, tuple(reports), skipped)


def dequantize_(model: nn.Module, *, dtype: torch.dtype | None = None, progress: bool | None = None) -> list[str]:
    """Undo `quantize_`: replace quantized layers by ordinary ones with the dequantized weights, in place.

    Hooks and settings go along; weights that were frozen before `quantize_` are frozen again.

    dtype    of the weights; None: the bias's, or what they had before
    returns  the names of the layers replaced

    Raises InputError for a model without quantized layers.
    """
    found = _by_module(model, lambda module: isinstance(module, _QUANTIZED))
    if not found:
        raise InputError("there is no quantized layer in this model")
    if found[0][0] == [""]:
        raise InputError("a layer cannot be replaced in itself: wrap it in a container such as nn.Sequential")
    for _, layer in found:
        layer.require_quantized()
    with _progress_bar("dequantizing", len(found), progress) as advance:
        for names, layer in found:
            new = _as_float(layer, dtype)
            for name in names:
                model.set_submodule(name, new)
            advance(names[0])
    return [names[0] for names, _ in found]


def require_device(device: torch.device | str) -> None:
    """Raise InputError for a device that cannot hold data on this machine; meta is one."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises what it likes here: RuntimeError, AssertionError, NotImplementedError
        raise InputError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


# -- choosing layers -----------------------------------------------------------------------------------------


def compile_patterns(patterns: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """Regular expressions from what a user wrote.  Raises InputError for one that is not valid."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
    return tuple(compiled)


def matches(name: str, patterns: Iterable[re.Pattern[str]]) -> bool:
    """Whether a pattern matches a module's full path or its last part."""
    last = name.rpartition(".")[2]
    return any(pattern.fullmatch(name) or pattern.fullmatch(last) for pattern in patterns)


def _choose(
    model: nn.Module, skip: tuple[re.Pattern[str], ...], filter: Filter | None, embeddings: bool
) -> tuple[list[tuple[list[str], nn.Linear | nn.Embedding]], dict[str, str]]:
    """The layers to quantize, each with all its names; and why others of these types are left out."""
    kinds = (nn.Linear, nn.Embedding) if embeddings else (nn.Linear,)
    if any(isinstance(module, _QUANTIZED) for module in model.modules()):
        raise InputError("this model is quantized already: call dequantize_ first")
    owners = _owners_of_parameters(model)
    chosen, skipped = [], {}
    for names, layer in _by_module(model, lambda module: parametrize.type_before_parametrizations(module) in kinds):
        name = names[0]
        if any(matches(one, skip) for one in names):
            skipped[name] = "named in skip"
        elif filter is not None and not filter(name, layer):
            skipped[name] = "left out by the filter"
        elif _is_computed(layer):
            skipped[name] = "its weight or bias is computed from others"
        elif shared := [owner for owner in owners[id(layer.weight)] if owner not in names]:
            skipped[name] = f"its weight is shared with {', '.join(shared)}"
        elif isinstance(layer, nn.Embedding) and layer.max_norm is not None:
            skipped[name] = "max_norm rewrites the table in each lookup"
        else:
            chosen.append((names, layer))
    if not chosen:
        raise InputError(
            f"there is nothing to quantize: {len(skipped)} layers skipped"
            if skipped
            else f"there is nothing to quantize: no {' or '.join(kind.__name__ for kind in kinds)} in this model"
        )
    for names, layer in chosen:
        name, weight = names[0], layer.weight
        if name == "":
            raise InputError("a layer cannot be replaced in itself: wrap it in a container such as nn.Sequential")
        if weight.dtype not in FLOATS:
            raise InputError(f"weights must be {', '.join(map(show, FLOATS))}; {name} is {show(weight.dtype)}")
        if weight.is_meta:
            raise InputError(f"weights must be loaded before they are quantized; {name} is on meta")
    return chosen, skipped


def _is_computed(layer: nn.Linear | nn.Embedding) -> bool:
    """Whether a parametrization or hook makes weight or bias: they are then no parameters, or not the layer's own."""
    plain = all(name in layer._parameters for name in ("weight", "bias") if hasattr(layer, name))
    return parametrize.is_parametrized(layer) or not plain


def _by_module(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[list[str], Any]]:
    """Each wanted module once, with all the names it has."""
    names: dict[int, tuple[list[str], Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if wanted(module):
            names.setdefault(id(module), ([], module))[0].append(name)
    return list(names.values())


def _owners_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


# -- building layers -----------------------------------------------------------------------------------------


def _as_4bit(layer: nn.Linear | nn.Embedding, format: str, blocksize: int, nested: bool) -> QuantizedLayer:
    new: Linear4bit | Embedding4bit
    if isinstance(layer, nn.Linear):
        new = Linear4bit(
            layer.in_features, layer.out_features, False, compress_statistics=nested, quant_type=format, device="meta"
        )
        new.bias = layer.bias
    else:
        new = Embedding4bit(
            layer.num_embeddings, layer.embedding_dim, layer.weight.dtype, quant_type=format, device="meta"
        )
    new.weight = Params4bit(layer.weight.data, False, None, blocksize, nested, format, torch.uint8, new)
    new.float_requires_grad = layer.weight.requires_grad
    _carry_over(layer, new)
    return new


def _as_int8(layer: nn.Linear | nn.Embedding, threshold: float) -> QuantizedLayer:
    new: Linear8bitLt | Embedding8bit
    if isinstance(layer, nn.Linear):
        new = Linear8bitLt(
            layer.in_features, layer.out_features, False, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        new.bias = layer.bias
    else:
        new = Embedding8bit(layer.num_embeddings, layer.embedding_dim, "meta", layer.weight.dtype)
    new.weight = Int8Params(layer.weight.data, requires_grad=False)
    new.dtype = layer.weight.dtype
    new.float_requires_grad = layer.weight.requires_grad
    _carry_over(layer, new)
    return new


# What belongs to the place in the model and not to the kind of layer.  The hooks are the same dicts, so that a
# handle goes on removing its hook; those of state dicts stay behind, because the keys change.
_KEPT = (
    *("training", "padding_idx", "norm_type", "scale_grad_by_freq", "sparse"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    new.__dict__.update({name: old.__dict__[name] for name in _KEPT if name in old.__dict__})


def _dequantized_weight(layer: QuantizedLayer, dtype: torch.dtype | None) -> Tensor:
    """In dtype; else in the bias's, which follows model.half() and the like; else in the original one."""
    bias = getattr(layer, "bias", None)
    if dtype is None and bias is not None:
        dtype = bias.dtype
    if isinstance(layer, (Linear4bit, Embedding4bit)):
        return functional.dequantize_4bit(layer.weight, layer.required_state(), dtype=dtype)
    dtype = dtype or layer.dtype
    if layer.weight.is_floating_point():  # has_fp16_weights
        return layer.weight.data.to(dtype)
    return functional.dequantize_int8(layer.weight, layer.required_absmax(), dtype=dtype)


def _as_float(layer: QuantizedLayer, dtype: torch.dtype | None) -> nn.Linear | nn.Embedding:
    weight = nn.Parameter(_dequantized_weight(layer, dtype), layer.float_requires_grad)
    new: nn.Linear | nn.Embedding
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        new.bias = layer.bias
    else:
        new = nn.Embedding(layer.num_embeddings, layer.embedding_dim, device="meta")
    new.weight = weight
    _carry_over(layer, new)
    return new


# -- reporting -----------------------------------------------------------------------------------------------


def _report(name: str, layer: nn.Linear | nn.Embedding, new: QuantizedLayer) -> LayerReport:
    weight = layer.weight.detach()
    if isinstance(new, (Linear4bit, Embedding4bit)):
        statistics = new.required_state().nbytes()
    else:
        statistics = new.required_absmax().nbytes
    restored = _dequantized_weight(new, torch.float32).to(weight.device)
    norm = torch.linalg.vector_norm(weight, dtype=torch.float32)
    error = torch.linalg.vector_norm(restored - weight)
    kind = "linear" if isinstance(layer, nn.Linear) else "embedding"
    after = new.weight.nbytes + statistics
    ratio = float(error / norm) if norm else 0.0
    return LayerReport(name, kind, tuple(weight.shape), weight.nbytes, after, ratio)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


@contextlib.contextmanager
def _progress_bar(title: str, total: int, show: bool | None) -> Iterator[Callable[[str], None]]:
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda name: bar.update(task, advance=1, description=f"{title}: {name}")
