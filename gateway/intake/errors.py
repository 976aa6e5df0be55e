"""What intake can fail with."""

from __future__ import annotations


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
