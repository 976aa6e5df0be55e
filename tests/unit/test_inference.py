"""The step `infer` does its work once, and counts only what it begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import select

from gateway.model_shelf import ModelShelf
from gateway.results.inference import Inference
from storage.database import Database
from storage.records import LedgerEvent, Result, ResultState, StudyState
from storage.spool import Spool
from tests.support.story_rows import add_result, add_study, add_version


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


class _Unused:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not needed for this")


def inference(database: Database, spool: Path, attempts: int = 3) -> Inference:
    return Inference(
        database=database,
        spool=Spool(spool, reserve_bytes=0),
        shelf=cast(ModelShelf, _Unused()),
        attempts=attempts,
        memory_budget_bytes=None,
        busy=lambda _work: None,
        idle=lambda _work: None,
    )


def kinds(database: Database) -> list[str]:
    with database.reading() as session:
        return [e.kind for e in session.scalars(select(LedgerEvent))]


@pytest.mark.requirement("QUE-27")
def test_a_repeated_inference_of_what_was_overtaken_records_it_once(database: Database, tmp_path: Path) -> None:
    with database.session() as session:
        add_study(session, StudyState.WHOLE, version=2)
        add_version(session, 1)
        add_version(session, 2, routed=False)
        add_result(session, ResultState.PENDING)
    step = inference(database, tmp_path / "spool")
    assert [step.infer("r1") for _ in range(2)] == ["superseded"] * 2
    assert kinds(database) == ["superseded"]
    with database.reading() as session:
        assert session.get_one(Result, "r1").attempts == 0


def test_an_inference_that_was_done_is_not_done_again(database: Database, tmp_path: Path) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, runtime={"seconds": {}})
    assert inference(database, tmp_path / "spool").infer("r1") == "inferred"
    with database.reading() as session:
        assert session.get_one(Result, "r1").attempts == 0
