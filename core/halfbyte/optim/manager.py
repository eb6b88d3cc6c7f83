"""GlobalOptimManager: hyperparameters of single parameters, set apart from any optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import InputError

OVERRIDABLE = {
    *("lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3"),
    *("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros"),
}

Override = dict[str, Any]
Registered = tuple["weakref.ref[Tensor]", torch.Size, Override]


class Overrides:
    """What holds at the time of one step: by parameter, and by place for parameters that were replaced."""

    def __init__(
        self, by_id: dict[int, Override], by_place: dict[tuple[int, int], tuple[torch.Size, Override]]
    ) -> None:
        self.by_id = by_id
        self.by_place = by_place

    def __bool__(self) -> bool:
        return bool(self.by_id or self.by_place)

    def of(self, param: Tensor, group: int, index: int) -> Override:
        """The hyperparameters set for a parameter at a place; an override of the parameter itself wins."""
        shape, placed = self.by_place.get((group, index), (param.shape, {}))
        own = self.by_id.get(id(param), {})
        return {**placed, **own} if shape == param.shape else own


class GlobalOptimManager:
    """The one place where hyperparameters of single parameters are set, before or after an optimizer exists.

    Example::

        manager = GlobalOptimManager.get_instance()
        manager.override_config(model.head.weight, "optim_bits", 32)
        optimizer = AdamW8bit(model.parameters())

    Parameters and modules are held by weak references: an override ends with its parameter.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("there is one manager per process: call GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The manager of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget everything."""
        self._by_param = WeakTensorKeyDictionary()
        self._by_place: dict[tuple[int, int], Registered] = {}
        self._by_module: list[tuple[weakref.ref[nn.Module], str, Override]] = []

    def register_parameters(self, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> None:
        """Remember the places of parameters, so that overrides outlive their replacement (by sharding, say).

        params  as an optimizer takes them
        """
        groups: list[Any] = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for g, group in enumerate(groups):
            listed = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
            for i, param in enumerate(listed):
                override = self._by_param.setdefault(param, {})
                self._by_place[g, i] = (weakref.ref(param), param.shape, override)

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Set hyperparameters of some parameters.

        key, value      one of lr, betas, eps, weight_decay, alpha, t_alpha, t_beta3, optim_bits, min_8bit_size,
                        max_unorm, skip_zeros
        key_value_dict  several at once, in place of key and value

        optim_bits and min_8bit_size decide when a state is created, everything else at each step.
        Raises InputError for an unknown key.
        """
        if (key is None) == (key_value_dict is None):
            raise InputError("override_config needs either key and value, or key_value_dict")
        config = _checked({key: value} if key is not None else key_value_dict)
        for param in [parameters] if isinstance(parameters, Tensor) else parameters:
            self._by_param.setdefault(param, {}).update(config)

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Set hyperparameters of whatever parameter a module has under a name when an optimizer steps.

        Raises InputError for an unknown key in config.
        """
        self._by_module.append((weakref.ref(module), param_name, _checked(config)))

    def overrides(self) -> Overrides:
        """What holds now."""
        by_id: dict[int, Override] = {}
        alive = []
        for reference, name, config in self._by_module:
            module = reference()
            if module is None:
                continue
            alive.append((reference, name, config))
            param = getattr(module, name, None)
            if isinstance(param, Tensor):
                by_id.setdefault(id(param), {}).update(config)
        self._by_module = alive
        for param, config in self._by_param.items():
            if config:
                by_id.setdefault(id(param), {}).update(config)
        by_place = {
            place: (shape, config)
            for place, (reference_, shape, config) in self._by_place.items()
            if config and reference_() is None
        }
        return Overrides(by_id, by_place)


def _checked(config: Any) -> Override:
    if unknown := sorted(set(config) - OVERRIDABLE):
        raise InputError(f"overrides are among {', '.join(sorted(OVERRIDABLE))}; got {', '.join(unknown)}")
    return dict(config)
