"""What a step found out about its parameters, kept for the next one: which go through which call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .bucket import Bucket, Source
from .manager import Overrides
from .options import Config
from .state import State


class Plan:
    """The buckets of a step, for steps of the same parameters.

    It holds neither gradients nor states.  A step of ten thousand parameters reads both anew, and spends the rest of
    its time on looking whether anything else has changed.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        overrides: Overrides,
        modes: tuple[bool, ...],
        buckets: list[Bucket],
    ) -> None:
        """modes  what the optimizer is told to do, apart from groups and overrides."""
        self.buckets = buckets
        self._modes = modes
        self._params = _listed(groups)
        self._ids = [*map(id, self._params)]
        stepping = {id(key) for bucket in buckets for key in bucket.keys}
        self._idle = [param for param in self._params if id(param) not in stepping]
        self._overrides = overrides.by_id

    @staticmethod
    def serves(overrides: Overrides, buckets: list[Bucket]) -> bool:
        """Whether a plan may be made of the buckets of a step."""
        return not overrides.by_place and all(bucket.steady and not bucket.paged for bucket in buckets)

    def renew(
        self,
        groups: Sequence[Mapping[str, Any]],
        overrides: Overrides,
        modes: tuple[bool, ...],
        states: Mapping[Tensor, State],
        resolved: Callable[[Source], Config],
    ) -> bool:
        """Take the gradients, states and hyperparameters of now.  False where the plan does not serve any more."""
        return (
            not overrides.by_place
            and overrides.by_id == self._overrides
            and modes == self._modes
            and [*map(id, _listed(groups))] == self._ids
            and all(param.grad is None for param in self._idle)
            and all(bucket.renew(states, resolved) for bucket in self.buckets)
        )

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a parameter and its gradient, in the order of the groups."""
        return [(param, param.grad) for param in self._params if param.grad is not None]

    def release(self) -> None:
        """Let go of gradients and states."""
        for bucket in self.buckets:
            bucket.release()


def _listed(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]
