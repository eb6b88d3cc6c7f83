"""python -m halfbyte.testing.golden [FILE]: compute every golden vector with the oracle and store it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import FILE, checksum, oracle, plan


def make() -> tuple[dict[str, Tensor], dict[str, str]]:
    """All results and checksums."""
    tensors: dict[str, Tensor] = {}
    checksums = {}
    for vector in plan():
        args = vector.args()
        checksums[vector.name] = checksum(args)
        for place, tensor in enumerate(oracle.compute(vector.op, args, vector.facts(torch.device("cpu")))):
            tensors[f"{vector.name}/{place}"] = tensor
    return tensors, checksums


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    tensors, checksums = make()
    save_file(tensors, path, checksums)
    print(f"{path}: {len(checksums)} vectors, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
