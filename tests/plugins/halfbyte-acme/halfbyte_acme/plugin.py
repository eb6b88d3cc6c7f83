"""What halfbyte loads: declarations only.  The kernels are imported when one is first wanted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

import halfbyte
from halfbyte.backend import Backend, Check, EnvVar
from halfbyte.kernel import Kernel
from halfbyte.op import Op

TABLE = "HALFBYTE_ACME_TABLE"
TABLES = ("byte", "nibble")

LIMITS = {"format": {"nf4"}, "blocksize": {64, 128}, "dtype": {torch.float32, torch.bfloat16}}


class AcmeBackend(Backend):
    """NF4 on the CPU, through tables."""

    name = "acme"
    device_types = frozenset({"cpu"})
    priority = 50  # above halfbyte's own CPU backend, which has 40
    env = (EnvVar(TABLE, "The table that acme decodes with.", choices=TABLES),)

    def why_not(self) -> tuple[str, ...]:
        table = os.environ.get(TABLE) or TABLES[0]
        return () if table in TABLES else (f"{TABLE} must be one of {', '.join(TABLES)}; got {table!r}",)

    def kernels(self) -> Iterable[Kernel]:
        from . import kernels

        yield Kernel("quantize_4bit", kernels.quantize_4bit, limits=LIMITS)
        for rank, table in enumerate(reversed(TABLES)):
            if table == (os.environ.get(TABLE) or table):
                yield Kernel(
                    "dequantize_4bit",
                    kernels.DEQUANTIZE[table],
                    limits=LIMITS,
                    rule=why_not_nested,
                    priority=rank,
                    variant=table,
                )
        yield Kernel("swap_pairs", kernels.swap_pairs, limits={"dtype": {torch.float32}})


def why_not_nested(facts: Any) -> tuple[str, ...]:
    """A rule says what limits cannot: something about two facts together."""
    if facts.nested and facts.blocksize != 64:
        return (f"nested absmax needs blocksize=64, got {facts.blocksize}",)
    return ()


@halfbyte.hookimpl
def halfbyte_backends() -> Iterable[Backend]:
    yield AcmeBackend()


@halfbyte.hookimpl
def halfbyte_ops() -> Iterable[Op]:
    from .ops import SWAP_PAIRS

    yield SWAP_PAIRS


@halfbyte.hookimpl
def halfbyte_doctor_checks() -> Iterable[Check]:
    yield Check("acme tables", ok=True, message=f"{os.environ.get(TABLE) or TABLES[0]} table")
