"""A torch device that nobody thought of: `simxpu`, by PrivateUse1, whose tensors keep their data in CPU tensors.

For fresh interpreters: a device type is registered once in a process and for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "simxpu"  # torch refuses the name xpu


class SimTensor(torch.Tensor):
    """A tensor on simxpu:0.  torch computes on its data; an op of halfbyte goes to the kernel of the device's key."""

    data_on_host: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> SimTensor:
        made: SimTensor = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), dtype=data.dtype, device=f"{NAME}:0"
        )
        made.data_on_host = data
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "halfbyte":
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *args, **kwargs)
        target = torch.device(kwargs.get("device") or NAME)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = pytree.tree_map_only(SimTensor, lambda one: one.data_on_host, (args, kwargs))
        result = func(*args, **kwargs)
        if target.type != NAME:
            return result
        return pytree.tree_map_only(torch.Tensor, SimTensor, result)


def install() -> None:
    """Make torch know the device, `x.to("simxpu")` included."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    install.kept = library  # type: ignore[attr-defined]  # as long as the process


def _empty(size: Sequence[int], *, dtype: Any = None, **rest: Any) -> SimTensor:
    return SimTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **rest: Any) -> SimTensor:
    return SimTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    raw = getattr(source, "data_on_host", source), getattr(target, "data_on_host", target)
    raw[1].copy_(raw[0])
    return target
