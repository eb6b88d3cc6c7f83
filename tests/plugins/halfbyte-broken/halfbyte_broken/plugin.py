"""Fails on import, as a plugin does whose driver is missing."""

import broken_driver_that_nobody_has  # noqa: F401
