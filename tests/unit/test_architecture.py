"""docs/architecture.md names what exists, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (
    "gateway",
    "gateway/commands",
    "gateway/deletion",
    "gateway/demo",
    "gateway/intake",
    "gateway/learning",
    "gateway/monitoring",
    "gateway/prediction",
    "gateway/results",
    "gateway/delivery",
    "gateway/training_data",
    "engine",
    "fhir/emr",
    "storage",
)


def listed() -> dict[str, set[str]]:
    """Room → modules, from the table of the section Modules; a row without a room continues the one above."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Modules")[1].split("\n## ")[0]
    rooms: dict[str, set[str]] = {}
    room = ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3 or cells[0] in {"room", "---"}:
            continue
        room = cells[0].strip("`").rstrip("/") or room
        rooms.setdefault(room, set()).update(re.findall(r"`([a-z0-9_]+)`", cells[2]))
    return rooms


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_has_its_place_in_the_map(room: str) -> None:
    there = {path.stem for path in (ROOT / room).glob("*.py") if path.stem != "__init__"}
    assert listed().get(room, set()) == there


def test_the_map_has_no_other_rooms() -> None:
    assert set(listed()) == set(ROOMS)
