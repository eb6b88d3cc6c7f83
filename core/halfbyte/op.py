"""Op: what an operation means, apart from who computes it.  A leaf module for plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Op"]


@dataclass(frozen=True, eq=False)
class Op:
    """One operation of torch.ops.<namespace>.

    name            of the op
    schema          torch schema without the name, no defaults: "(Tensor x, int n) -> Tensor"
    Facts           NamedTuple type of what a kernel may be chosen on; nothing else may decide.
                    Its first field is `device`.
    facts           the op's arguments -> Facts, or the same values as a plain tuple
    reference       the meaning, in plain torch, on any device
    fake            shapes, dtypes, device and strides of the result, for tracing
    check           raises InputError where the arguments do not fit each other
    setup_context   as for torch.library.register_autograd; None where there is no gradient
    backward        the same
    tolerance       output dtype -> (rtol, atol) against the reference, for results of order one; missing means
                    bit equality
    namespace       of the torch op
    samples         () -> halfbyte.testing.samples.Samples: how the conformance kit calls a third-party op
    """

    name: str
    schema: str
    Facts: type[Any]
    facts: Callable[..., Any]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    check: Callable[..., None]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    tolerance: Mapping[torch.dtype, tuple[float, float]] = field(default_factory=dict)
    namespace: str = "halfbyte"
    samples: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        fields = getattr(self.Facts, "_fields", ())
        if not fields or fields[0] != "device":
            raise TypeError(f"Facts of op {self.name!r} must be a NamedTuple whose first field is device; got {fields}")
        if "=" in self.schema:
            raise ValueError(f"schema of op {self.name!r} must have no defaults; got {self.schema!r}")
