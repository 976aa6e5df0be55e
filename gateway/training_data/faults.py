"""What is wrong with one case or file of a conversion: collected, so that one pass finds all of it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import EngineError
from gateway.errors import Rejected
from gateway.results.attributes import READ_ERRORS

FAULT_ERRORS: tuple[type[Exception], ...] = (Rejected, EngineError, MemoryError, *READ_ERRORS)
"""What reading one hostile file may end with. A header that claims an absurd size ends in MemoryError."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`case` is its pseudonym, None where no case is known; `file` lies below the source, or is a series' UID."""

    case: str | None
    file: str | None
    cause: str
