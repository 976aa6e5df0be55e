"""The ledger finds what was changed, removed or reordered."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import delete, update

from storage import ledger
from storage.database import Database
from storage.errors import LedgerBroken
from storage.records import LedgerEvent


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    database.create_all()
    with database.session() as session:
        for n in range(3):
            ledger.append(session, subject="study:1.2.3", kind="step", actor="test", detail={"n": n})
        ledger.append(session, subject="model:m", kind="imported", actor="test")
    return database


def test_events_come_back_in_order_and_the_chain_holds(database: Database) -> None:
    with database.reading() as session:
        assert [e.detail["n"] for e in ledger.events(session, "study:1.2.3")] == [0, 1, 2]
        assert ledger.verify(session) == 4
        assert ledger.verify(session, "model:m") == 1


def test_a_changed_detail_is_found(database: Database) -> None:
    with database.session() as session:
        session.execute(update(LedgerEvent).where(LedgerEvent.sequence == 2).values(detail={"n": 9}))
    with database.reading() as session, pytest.raises(LedgerBroken, match=r"event 2 .* was changed"):
        ledger.verify(session)


def test_a_removed_event_is_found(database: Database) -> None:
    with database.session() as session:
        session.execute(delete(LedgerEvent).where(LedgerEvent.sequence == 2))
    with database.reading() as session, pytest.raises(LedgerBroken, match="event 2 is missing"):
        ledger.verify(session)
