"""The step `judge`: what it makes of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import select

import gateway
from engine.bundle import load_bundle
from gateway.steps import ResultWork
from storage.database import Database
from storage.records import LedgerEvent, Result, ResultState, StudyState
from tests.support.story_rows import add_result, add_study, add_version

BUNDLE = load_bundle(Path(gateway.__file__).parent / "demo" / "model", verify=False)
WHOLE = {"objects": 10, "own_results": 0, "quarantined": 0, "released": True, "interrupted": False, "gaps": []}


class _Shelf:
    def version(self, name: str, semver: str) -> tuple[str, str]:
        return name, semver

    def bundle(self, _model: tuple[str, str]) -> Any:
        return BUNDLE


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


def measured(name: str) -> dict[str, Any]:
    """In the middle of what the demo model was calibrated on."""
    return {
        "name": name, "voxels": 1700, "volume_ml": 1.7, "touches_border": [], "components": 1, "confidence": 0.95,
        "fold_dice": None, "mirror_dice": 0.95, "border_entropy": 0.33, "centroid_lps_mm": [0.0, 0.0, 0.0],
    }  # fmt: skip


@pytest.mark.requirement("CARD-02")
@pytest.mark.parametrize(
    ("evidence", "runtime", "value"),
    [
        ({}, {}, "none"),
        ({"interrupted": True, "quarantined": 2}, {}, "an association broke off; 2 objects quarantined"),
        ({}, {"missing_slices": 1}, "1 slices missing"),
    ],
)
def test_what_spoke_against_the_study_version_is_judged_and_recorded(
    database: Database, evidence: dict[str, Any], runtime: dict[str, Any], value: str
) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session).evidence = WHOLE | evidence
        result = add_result(session, ResultState.PENDING, runtime=runtime | {"mean_confidence": 0.95})
        result.measurements = [measured(spec.name) for spec in BUNDLE.labels]
    unused: Any = None
    work = ResultWork(
        database=database,
        inference=unused,
        encoding=unused,
        release=unused,
        shelf=cast(Any, _Shelf()),
        disabled_checks=(),
    )
    verdict = "pass" if value == "none" else "review"
    assert [work.judge("r1") for _ in range(2)] == [verdict, verdict]
    with database.reading() as session:
        (event,) = session.scalars(select(LedgerEvent).where(LedgerEvent.kind == "judged"))
        checks = session.get_one(Result, "r1").checks
    assert checks is not None
    assert event.detail["checks"] == checks
    assert [c["value"] for c in checks if c["name"] == "source"] == [value]
