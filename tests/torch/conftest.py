"""A backend that counts its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def counting(stub_backend: Callable[..., Any]) -> Any:
    """The reference of every op under another name; its `calls` are the names of the ops it ran."""
    return stub_backend("counting", priority=-1)
