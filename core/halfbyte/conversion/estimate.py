"""What a model needs in memory, in each format and for training, from its config and headers alone.

No tensor is read.  Activations, temporary buffers and the allocator's overhead are not in any figure.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .checkpoint import Stored
from .options import Options
from .plan import Plan, plan_for, read_original

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"}

# As bitsandbytes' optimizers have them: elements that share one absmax, and below which a state stays float32.
STATE_BLOCK, STATE_MINIMUM = 256, 4096

QUANTIZED = {
    "int8": Options("int8"),
    "nf4": Options("nf4"),
    "fp4": Options("fp4"),
    "nf4 nested": Options("nf4", nested=True),
    "fp4 nested": Options("fp4", nested=True),
}


@dataclass(frozen=True)
class Training:
    """Bytes that one way of training needs.

    parameters  that are trained
    weights     of the whole model, trained or not
    gradients   of the trained parameters
    adamw       two float32 states for each of them
    adamw8bit   the same in 8 bits
    """

    parameters: int
    weights: int
    gradients: int
    adamw: int
    adamw8bit: int

    @property
    def total_adamw(self) -> int:
        return self.weights + self.gradients + self.adamw

    @property
    def total_adamw8bit(self) -> int:
        return self.weights + self.gradients + self.adamw8bit


@dataclass(frozen=True)
class Estimate:
    """What `estimate` gives.

    parameters            elements of all tensors
    quantized_parameters  elements of the layers that the 4-bit formats quantize
    layers                number of these layers
    stored                bytes of all tensors as they are
    weights               bytes of all tensors by format; the 8- and 4-bit ones are what `convert` writes
    qlora                 of these 4-bit formats, with adapters of this rank
    full                  fine-tuning of all parameters
    """

    parameters: int
    quantized_parameters: int
    layers: int
    stored: int
    weights: dict[str, int]
    rank: int
    qlora: dict[str, Training]
    full: Training
    warnings: tuple[str, ...]


def estimate(
    source: str | os.PathLike[str],
    *,
    blocksize: int = 64,
    rank: int = 16,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
) -> Estimate:
    """Memory of a model's weights by format, and of training it.

    skip, include   as for `convert`, which makes the same choice

    With n elements in a tensor, b in a block:

    - fp32 and bf16: 4 n and 2 n for floating tensors, others as stored.
    - int8: n codes, 4 bytes a row, 1 byte for the format; what is not quantized as stored.
    - nf4, fp4: n / 2 codes, 4 n / b of absmax, 64 bytes of table, a JSON text; nested: n / b of absmax codes,
      4 n / (256 b), 1024 + 64 bytes of tables.  The text of a nested layer holds the digits of its offset, so the
      nested figures may be off by some bytes a layer; all others are exact.
    - LoRA of rank r on every quantized layer of (out, in): r (in + out) float32 parameters and gradients.
    - AdamW: 8 n.  AdamW8bit: 2 n + 2 * 4 * ceil(n / 256), and 8 n for a tensor of less than 4096 elements.
    - full fine-tuning: weights and gradients in the dtype they are stored in, and the states.

    Raises InputError, FormatError.
    """
    if not 1 <= rank <= 65536:
        raise InputError(f"rank must be from 1 to 65536; got {rank}")
    checkpoint = read_original(Path(os.path.realpath(source)))
    in_4bit = plan_for(checkpoint, Options("nf4", blocksize), skip, include)
    in_int8 = plan_for(checkpoint, Options("int8", blocksize), skip, include)
    tensors = checkpoint.tensors()
    weights = {"fp32": _as_float(tensors.values(), 4), "bf16": _as_float(tensors.values(), 2)}
    for name, options in QUANTIZED.items():
        chosen = in_int8 if options.format == "int8" else in_4bit
        written = Plan(checkpoint, chosen.selection, Options(options.format, blocksize, options.nested)).written()
        weights[name] = sum(nbytes for _, nbytes in written.values())
    quantized = [tensors[name] for name in in_4bit.selection.layers]
    return Estimate(
        parameters=sum(map(_numel, tensors.values())),
        quantized_parameters=sum(map(_numel, quantized)),
        layers=len(quantized),
        stored=sum(one.nbytes for one in tensors.values()),
        weights=weights,
        rank=rank,
        qlora={name: _qlora(weights[name], quantized, rank) for name in ("nf4", "nf4 nested")},
        full=_full(tensors.values()),
        warnings=tuple(f"--skip {pattern!r} matches no layer" for pattern in in_4bit.selection.unused),
    )


def adamw8bit(numel: int) -> int:
    """Bytes of the two states of a parameter under AdamW8bit."""
    if numel < STATE_MINIMUM:
        return 8 * numel
    return 2 * (numel + 4 * -(-numel // STATE_BLOCK))


def _qlora(base: int, quantized: Iterable[Stored], rank: int) -> Training:
    """Each (out, in) layer gets A (rank, in) and B (out, rank)."""
    numels = [rank * size for stored in quantized for size in stored.shape]
    total = sum(numels)
    return Training(total, base + 4 * total, 4 * total, 8 * total, sum(map(adamw8bit, numels)))


def _full(tensors: Iterable[Stored]) -> Training:
    tensors = list(tensors)
    trained = [one for one in tensors if one.dtype in FLOATS]
    numels = list(map(_numel, trained))
    return Training(
        parameters=sum(numels),
        weights=sum(one.nbytes for one in tensors),
        gradients=sum(one.nbytes for one in trained),
        adamw=8 * sum(numels),
        adamw8bit=sum(map(adamw8bit, numels)),
    )


def _as_float(tensors: Iterable[Stored], itemsize: int) -> int:
    return sum(_numel(one) * itemsize if one.dtype in FLOATS else one.nbytes for one in tensors)


def _numel(stored: Stored) -> int:
    return math.prod(stored.shape)
