"""What intake can fail with."""

from __future__ import annotations

import traceback
from pathlib import Path


class IntakeError(Exception):
    """Root of everything that intake raises on purpose."""


class IntakeRejected(IntakeError):
    """The object is at fault: unreadable, illegal, or not what its command said.

    `reason` says what is wrong, without values of the object; `attribute` names it as "Keyword (gggg,eeee)", or is
    empty when no single attribute is at fault.
    """

    def __init__(self, reason: str, attribute: str = "") -> None:
        self.reason = reason
        self.attribute = attribute
        super().__init__(f"{attribute}: {reason}" if attribute else reason)


def without_values(error: Exception) -> str:
    """Type and place of an error: the message of a database error holds the row, which holds patient data."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
