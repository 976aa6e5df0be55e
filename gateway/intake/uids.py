"""Checks of UIDs that come from the network (PS3.5 clause 9.1), before they touch anything else."""

from __future__ import annotations

import re

_COMPONENTS = re.compile(rb"[0-9]+(?:\.[0-9]+)+")
_MAX_LENGTH = 64


def uid_fault(value: bytes) -> str | None:
    """Why these bytes are no UID, or None. One trailing NUL (the padding) or space is not counted.

    Components with leading zeros break PS3.5 9.1 but are harmless and found in old archives: they pass.
    """
    text = value.rstrip(b"\0 ")
    if not text:
        return "is empty"
    if len(text) > _MAX_LENGTH:
        return f"has {len(text)} characters, more than {_MAX_LENGTH}"
    if not _COMPONENTS.fullmatch(text):
        return "is not made of digits and dots"
    return None
