"""A time as it is typed: 90s, 30m, 2h, 1h30m."""

from __future__ import annotations

import re

_BUDGET = re.compile(r"(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?")


def parse_budget(text: str | None) -> float | None:
    """Seconds of "90s", "30m", "2h" or "1h30m". Raises ValueError for anything else."""
    if text is None:
        return None
    match = _BUDGET.fullmatch(text)
    seconds = sum(int(match[unit] or 0) * size for unit, size in (("h", 3600), ("m", 60), ("s", 1))) if match else 0
    if not seconds:
        raise ValueError(f"--budget {text!r}: a time like 90s, 30m, 2h or 1h30m is needed")
    return float(seconds)
