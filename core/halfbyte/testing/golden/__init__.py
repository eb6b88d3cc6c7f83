"""Golden vectors: results of a numpy oracle, stored.  Inputs come from a seed and are not stored.

Made anew by `python -m halfbyte.testing.golden`; a test compares the file with what the generator makes.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

from ..._runtime import dispatcher
from ...kernel import show
from .. import cases, compare, samples

FILE = Path(__file__).with_name("vectors.safetensors")

_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
_DTYPES = (_F32, _F16, _BF16)


@dataclass(frozen=True)
class Vector:
    """One call whose results are stored."""

    op: str
    values_of_facts: tuple[object, ...]
    size: str
    values: str

    @property
    def name(self) -> str:
        words = (str(show(value)) for value in self.values_of_facts)
        return "-".join((self.op, *words, self.size, self.values))

    def facts(self, device: torch.device) -> Any:
        return dispatcher.plugins.ops[self.op].Facts(device, *self.values_of_facts)

    def args(self) -> samples.Args:
        """Arguments on the CPU."""
        op = dispatcher.plugins.ops[self.op]
        return cases.arguments(op, self.facts(torch.device("cpu")), self.size, self.values)


def _vectors(op: str, columns: tuple[tuple[object, ...], ...], kinds: str) -> Iterator[Vector]:
    """`kinds` are words "size/values"; every combination of facts gets each of them."""
    for facts in itertools.product(*columns):
        for kind in kinds.split():
            size, _, values = kind.partition("/")
            yield Vector(op, facts, size, values or "normal")


@functools.cache
def plan() -> tuple[Vector, ...]:
    """Every golden vector."""
    formats = ("nf4", "fp4")
    rounded = "partial odd/edges many/ties odd/nan one/zeros odd/tiny"
    plain = ("quantize_4bit", (_DTYPES, formats, (64,)), rounded)
    wide = ("quantize_4bit", ((_BF16,), formats, (32, 128, 256, 512, 1024, 2048, 4096)), "partial")
    optimizers = ("adam", "ademamix", "lion", "momentum", "rmsprop", "adagrad")
    bounded = ("adam", "momentum", "rmsprop")  # by a trust factor
    linear = ((_F32, _F16, _BF16), formats, (64,), (False, True))
    return tuple(
        vector
        for op, columns, kinds in (
            plain,
            wide,
            ("dequantize_4bit", (_DTYPES, formats, (64,), (False, True)), "partial odd"),
            ("dequantize_4bit", ((_BF16,), formats, (32, 256), (False, True)), "partial"),
            ("dequantize_4bit", ((_BF16,), ("nf4",), (32,), (True,)), "usual"),
            ("linear_4bit", linear, "partial odd"),
            ("linear_4bit_backward", linear, "partial odd"),
            ("quantize_8bit", (_DTYPES, (100, 256)), rounded),
            ("dequantize_8bit", (_DTYPES, (100, 256)), "partial odd"),
            ("quantize_int8_rows", (_DTYPES,), "usual partial many/ties many/edges odd/zeros usual/nan"),
            ("dequantize_int8", (_DTYPES, (torch.int8, torch.int32)), "usual partial odd"),
            ("matmul_int8", (), "usual partial many"),
            ("linear_int8", (_DTYPES, ("exact", "w8a16"), (False, True)), "usual partial"),
            ("update_32bit", ((_F32, _BF16), optimizers, (False,), (False,)), "odd"),
            ("update_32bit", ((_F32,), bounded, (True,), (False,)), "odd"),
            ("update_8bit", ((_F32, _BF16), optimizers, (64,), (False,), (False,)), "partial odd"),
            ("update_8bit", ((_F32,), bounded, (256,), (True,), (False,)), "odd"),
        )
        for vector in _vectors(op, columns, kinds)
    )


def checksum(args: samples.Args) -> str:
    """Of all arguments: a changed sample is told apart from a wrong kernel."""
    crc = 0
    for arg in pytree.tree_leaves(list(args)):
        data = bytes(compare.as_bytes(arg).numpy()) if isinstance(arg, Tensor) else show(arg).encode()
        crc = zlib.crc32(data, crc)
    return f"{crc:08x}"


@functools.cache
def stored() -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """Results by "<name>/<place>", and metadata: the checksum of each vector's arguments by name."""
    with safe_open(FILE, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


def results(vector: Vector) -> tuple[Tensor, ...]:
    """The stored results.  Raises LookupError where the file does not fit the samples of this version."""
    tensors, checksums = stored()
    if checksums.get(vector.name) != checksum(vector.args()):
        raise LookupError(f"{FILE.name} was made for other arguments of {vector.name}")
    found: list[Tensor] = []
    while (tensor := tensors.get(f"{vector.name}/{len(found)}")) is not None:
        found.append(tensor)
    return tuple(found)
