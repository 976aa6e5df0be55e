"""A file that says which series and which labels make a case, where the source does not say it itself.

CSV with the columns `series` and `label`, optionally `case` and `patient`; or JSON {"cases": [{"series": [...],
"label": [...], "case": "...", "patient": "..."}]}. A series is a Series Instance UID or a folder that holds that series
alone; a label is a file. Folders and files are relative to the source or to the list. In CSV several series (channels,
in their order) or labels in one cell are separated by |.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.json_reader import MAX_JSON_BYTES, Reader, read_json
from gateway.errors import Rejected

_COLUMNS = frozenset({"case", "series", "label", "patient"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MOST = 10**6
_MOST_PARTS = 256


@dataclass(frozen=True, kw_only=True)
class ListedCase:
    """One entry; `where` names it for messages. `case` and `patient` are None where the list says nothing."""

    where: str
    case: str | None
    patient: str | None
    series: tuple[str, ...]
    labels: tuple[str, ...]


def read_case_list(path: Path) -> tuple[ListedCase, ...]:
    """Raises Rejected naming line and column for what cannot be used."""
    cases = tuple(_from_json(path) if path.suffix.lower() == ".json" else _from_csv(path))
    if not cases:
        raise Rejected(f"{path.name}: lists no case")
    seen: dict[str, str] = {}
    for case in cases:
        if case.case is None:
            continue
        if not _NAME.fullmatch(case.case):
            # Without the name, here and below: nobody has looked yet whether it is a patient's.
            raise Rejected(f"{case.where}: case: letters, digits, _ and - are possible, at most 64")
        if case.case.casefold() in seen:
            raise Rejected(f"{case.where}: its case is in {seen[case.case.casefold()]} already")
        seen[case.case.casefold()] = case.where
    return cases


def _from_json(path: Path) -> Iterator[ListedCase]:
    content = Reader(read_json(path, error=Rejected), where=path.name, error=Rejected)
    for entry in content.children("cases", lengths=(1, _MOST)):
        entry.only(_COLUMNS)
        yield ListedCase(
            where=entry.where,
            case=entry.text_or_none("case"),
            patient=entry.text_or_none("patient"),
            series=_texts(entry, "series"),
            labels=_texts(entry, "label"),
        )


def _texts(entry: Reader, key: str) -> tuple[str, ...]:
    if isinstance(entry.raw(key), str):
        return (entry.text(key),)
    return entry.texts(key, lengths=(1, _MOST_PARTS))


def _from_csv(path: Path) -> Iterator[ListedCase]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise Rejected(f"{path.name}: larger than {MAX_JSON_BYTES} bytes")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = list(csv.DictReader(lines))
    except OSError as error:
        raise Rejected(f"{path.name}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise Rejected(f"{path.name}: not readable as CSV in UTF-8: {error}") from error
    for line, row in enumerate(rows, start=2):
        where = f"{path.name}, line {line}"
        unknown = sorted(str(key) for key in set(row) - _COLUMNS)
        if unknown or not {"series", "label"} <= set(row):
            problem = f"column {unknown[0][:40]!r} is unknown" if unknown else "the columns series and label are needed"
            raise Rejected(f"{where}: {problem}; there are case, series, label and patient")
        series, labels = _parts(row, "series"), _parts(row, "label")
        if not series or not labels:
            raise Rejected(f"{where}: {'label' if series else 'series'} is empty")
        yield ListedCase(
            where=where,
            case=(row.get("case") or "").strip() or None,
            patient=(row.get("patient") or "").strip() or None,
            series=series,
            labels=labels,
        )


def _parts(row: Mapping[str, str | None], column: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in (row[column] or "").split("|") if part.strip())
