"""What a status of the other side means for an object: the table of C-STORE and STOW-RS status codes.

Sources: PS3.4 B.2.3 (storage), PS3.7 Annex C (general), PS3.18 10.5.3 (STOW-RS Failure and Warning Reason), which
reuse the same 16 bit codes. Codes that no table knows are judged by their class (PS3.7 C.1 to C.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# stored and warning: the other side has the object (a warning is shown as what it is). failed: the same object may be
# taken later. doubtful: failed without a reason, so a few more tries, then as refused. refused: not taken in this
# encoding, another one may be. unknown: sent, but no answer came.
Outcome = Literal["stored", "warning", "failed", "doubtful", "refused", "unknown"]


@dataclass(frozen=True, kw_only=True)
class StatusMeaning:
    """A status code in words."""

    code: int
    outcome: Outcome
    words: str

    @property
    def text(self) -> str:
        """The code as DICOM writes it, with its meaning: `0xB000 coercion of data elements`."""
        return f"0x{self.code:04X} {self.words}"


# Exact codes; ranges follow below.
_CODES: dict[int, tuple[Outcome, str]] = {
    0x0000: ("stored", "success"),
    0x0001: ("warning", "stored with a warning"),
    0x0105: ("refused", "no such attribute"),
    0x0106: ("refused", "invalid attribute value"),
    0x0107: ("warning", "attribute list error"),
    0x0110: ("doubtful", "processing failure"),
    0x0111: ("warning", "duplicate SOP instance: it was there already"),
    0x0112: ("refused", "no such SOP instance"),
    0x0115: ("refused", "invalid argument value"),
    0x0116: ("warning", "attribute value out of range"),
    0x0117: ("refused", "invalid SOP instance"),
    0x0118: ("refused", "no such SOP class"),
    0x0119: ("refused", "class-instance conflict"),
    0x0120: ("refused", "missing attribute"),
    0x0121: ("refused", "missing attribute value"),
    0x0122: ("refused", "SOP class not supported"),
    0x0124: ("failed", "not authorised: the other side's administrator must allow this sender to store"),
    0x0210: ("failed", "duplicate invocation"),
    0x0211: ("refused", "unrecognised operation"),
    0x0212: ("refused", "mistyped argument"),
    0x0213: ("failed", "resource limitation"),
    0xB000: ("warning", "coercion of data elements"),
    0xB006: ("warning", "elements discarded"),
    0xB007: ("warning", "data set does not match SOP class, stored nevertheless"),
    0xC122: ("refused", "transfer syntax not supported"),
    0xFE00: ("failed", "cancelled by the other side"),
}

# (first, last, outcome, words): PS3.4 Table B.2-1 first, then the classes of PS3.7 Annex C.
_RANGES: tuple[tuple[int, int, Outcome, str], ...] = (
    (0xA700, 0xA7FF, "failed", "out of resources"),
    (0xA900, 0xA9FF, "refused", "data set does not match SOP class"),
    (0xC000, 0xCFFF, "refused", "cannot understand"),
    (0xB000, 0xBFFF, "warning", "stored with an unknown warning"),
    (0xA000, 0xAFFF, "doubtful", "failure of unknown kind"),
    (0x0100, 0x01FF, "doubtful", "failure of unknown kind"),
    (0x0200, 0x02FF, "doubtful", "failure of unknown kind"),
)


def status_meaning(code: int) -> StatusMeaning:
    """The meaning of a storage status (0000,0900), Failure Reason (0008,1197) or Warning Reason (0008,1196)."""
    if code in _CODES:
        outcome, words = _CODES[code]
        return StatusMeaning(code=code, outcome=outcome, words=words)
    for first, last, outcome, words in _RANGES:
        if first <= code <= last:
            return StatusMeaning(code=code, outcome=outcome, words=words)
    return StatusMeaning(code=code, outcome="doubtful", words="status that the standard does not define")


# HTTP status of a whole request, where the body says nothing per object (RFC 9110; PS3.18 10.5.3.1).
_HTTP: dict[int, tuple[Outcome, str]] = {
    400: ("refused", "bad request"),
    409: ("refused", "conflict"),
    413: ("refused", "too large for this server"),
    415: ("refused", "unsupported media type"),
    422: ("refused", "cannot be processed"),
    408: ("failed", "request timeout"),
    425: ("failed", "too early"),
    429: ("failed", "too many requests"),
    500: ("doubtful", "internal server error"),
    501: ("refused", "not implemented"),
    502: ("failed", "bad gateway"),
    503: ("failed", "service unavailable"),
    504: ("failed", "gateway timeout"),
    507: ("failed", "out of storage"),
}


def http_meaning(code: int) -> StatusMeaning:
    """The meaning of an HTTP status that answers the storing of one object."""
    if 200 <= code < 300:
        return StatusMeaning(code=code, outcome="stored", words="success")
    outcome, words = _HTTP.get(
        code,
        ("doubtful", "unexpected answer") if code >= 500 else ("refused", "unexpected answer"),
    )
    return StatusMeaning(code=code, outcome=outcome, words=words)


# Refusals that concern the SOP class or transfer syntax as such, not the one object: the next object would fare the
# same. A rejected presentation context (no code at all) is one as well.
_OF_THE_CLASS = frozenset({0x0118, 0x0122, 0xC122, 415, 501})


def concerns_the_class(code: int | None) -> bool:
    """Whether a refusal with this code (None: presentation context rejected) tells something about the next object."""
    return code is None or code in _OF_THE_CLASS
