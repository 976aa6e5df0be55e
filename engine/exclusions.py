"""Cases that a dataset keeps and nobody uses any more: exclusions.json beside dataset.json, ours, ignored by nnU-Net.

{"cases": {"CASE": {"reason": "...", "excluded_at": "2026-03-04T05:06:07+00:00"}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from engine.errors import DatasetInvalid
from engine.json_reader import Reader, read_json
from engine.json_writer import write_json

EXCLUSIONS_JSON = "exclusions.json"
MAX_REASON = 1000


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """Why a case is not used, and since when (ISO 8601 with its offset from UTC)."""

    case: str
    reason: str
    excluded_at: str


def read_exclusions(folder: Path) -> Mapping[str, Exclusion]:
    """By case; empty where the dataset has no such file. Raises DatasetInvalid with the key that is at fault."""
    path = folder / EXCLUSIONS_JSON
    if not path.exists():
        return {}
    cases = Reader(read_json(path, error=DatasetInvalid), where=path.name, error=DatasetInvalid).child("cases")
    found = {}
    for case in cases.keys():  # noqa: SIM118 - Reader is no mapping; keys() checks each key
        entry = cases.child(case)
        found[case] = Exclusion(case=case, reason=entry.text("reason"), excluded_at=entry.text("excluded_at"))
    return found


def exclude(folder: Path, case: str, reason: str) -> Exclusion:
    """Writes the case down. One that is excluded already keeps its time, and takes the reason if that is another.

    Raises DatasetInvalid for an empty or endless reason and for a file that cannot be read, OSError.
    """
    text = " ".join(reason.split())
    if not text or len(text) > MAX_REASON:
        raise DatasetInvalid(f"{case}: a reason of 1 to {MAX_REASON} characters is needed")
    known = dict(read_exclusions(folder))
    before = known.get(case)
    if before is not None and before.reason == text:
        return before
    since = before.excluded_at if before is not None else datetime.now(UTC).isoformat(timespec="seconds")
    known[case] = Exclusion(case=case, reason=text, excluded_at=since)
    _write(folder, known)
    return known[case]


def readmit(folder: Path, case: str) -> Exclusion | None:
    """Takes the exclusion back and returns what it was; None when there was none. Raises DatasetInvalid, OSError."""
    known = dict(read_exclusions(folder))
    before = known.pop(case, None)
    if before is not None:
        _write(folder, known)
    return before


def _write(folder: Path, exclusions: Mapping[str, Exclusion]) -> None:
    path = folder / EXCLUSIONS_JSON
    if not exclusions:
        path.unlink(missing_ok=True)
        return
    cases = {
        case: {"reason": exclusion.reason, "excluded_at": exclusion.excluded_at}
        for case, exclusion in sorted(exclusions.items())
    }
    write_json({"cases": cases}, path)
