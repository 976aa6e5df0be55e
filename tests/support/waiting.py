"""Waiting for something to become true, with a deadline that names what was waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 300.0  # tests share the machine; what is awaited normally takes a second or two


def wait_until(condition: Callable[[], T], what: str, *, timeout_s: float = PATIENCE_S, poll_s: float = 0.05) -> T:
    """The first true value of `condition`; after the deadline an AssertionError names `what` and the last value."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}; last seen: {value!r}")
        time.sleep(poll_s)
