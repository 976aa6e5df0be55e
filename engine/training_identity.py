"""Whether two trainings are the same one: what a checkpoint or training.json says, and what is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 3


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What `now` has otherwise than `before`, in words. A key that `before` lacks was not noted then: it is not
    compared."""
    return [
        f"{key}: {before[key]!r} then, {value!r} now"
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first of the differences; None where there is none."""
    return next(iter(differences(before, now)), None)


def changed_cases(what: str, before: Sequence[str], now: Sequence[str]) -> str | None:
    """Which cases came and went; None where they are the same."""
    came, went = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    parts = [f"{_named(names)} {verb}" for names, verb in ((came, "now"), (went, "then")) if names]
    return f"{what}: {', '.join(parts)}" if parts else None


def _named(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
