"""An op of acme's own, torch.ops.acme.swap_pairs.  The reference runs it wherever acme does not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte import InputError
from halfbyte.op import Op


class Facts(NamedTuple):
    """What a kernel for swap_pairs may be chosen on."""

    device: torch.device
    dtype: torch.dtype


def facts(x: Tensor) -> Facts:
    return Facts(x.device, x.dtype)


def check(x: Tensor) -> None:
    if not x.ndim or x.shape[-1] % 2:
        raise InputError(f"x must have an even last dimension; got {tuple(x.shape)}")


def reference(x: Tensor) -> Tensor:
    """Swap neighbours in the last dimension: [a, b, c, d] -> [b, a, d, c]."""
    return torch.stack((x[..., 1::2], x[..., 0::2]), -1).reshape(x.shape)


def fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def samples() -> Any:
    """How the conformance kit calls the op.  Imported there only: the kit needs pytest."""
    from halfbyte.testing.samples import Samples

    return Samples(
        domain={"dtype": (torch.float32, torch.float16)},
        sizes=lambda facts: {"usual": (3, 64), "partial": (2, 5, 6), "one": (1, 2), "empty": (0, 4)},
        make=lambda facts, size, draw: (draw.floats(size, facts.dtype),),
        values=("normal", "zeros", "nan", "inf"),
    )


SWAP_PAIRS = Op(
    "swap_pairs", "(Tensor x) -> Tensor", Facts, facts, reference, fake, check, namespace="acme", samples=samples
)
