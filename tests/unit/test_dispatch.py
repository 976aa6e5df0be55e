"""Dispatch: whose turn it is, who waits in place, who gives way, and what is no longer to be sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from gateway.delivery.destination import DestinationAway, ObjectStatus, OutgoingObject, Verification
from gateway.delivery.dispatch import Dispatch, awaited_destinations
from gateway.delivery.reporting import Reporting
from gateway.settings import DestinationSettings
from storage.alarms import open_alarms
from storage.database import Database
from storage.records import (
    Delivery,
    DeliveryState,
    DestinationState,
    LedgerEvent,
    ResultState,
    Study,
    StudyState,
    utc_now,
)
from tests.support.story_rows import (
    STUDY_UID,
    NotedQueue,
    add_delivery,
    add_result,
    add_study,
    add_version,
)

_DESTINATIONS = DestinationSettings.model_validate(
    {
        "dimse": [
            {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104, "first_retry_s": 60},
            {"name": "quick", "ae_title": "QUICK", "host": "127.0.0.1", "port": 104, "first_retry_s": 0.1},
        ]
    }
)
_SEG = OutgoingObject(
    sop_instance_uid="1.9.1",
    sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4",
    transfer_syntax_uid="1.2.840.10008.1.2.1",
    series_instance_uid="1.8",
    study_instance_uid=STUDY_UID,
    path=Path("unused"),
    digest="0" * 64,
    role="SEG",
)


class Pacs:
    """Answers every object with `outcome`, or is away."""

    def __init__(self, name: str = "pacs") -> None:
        self.name = name
        self.away = False
        self.found = True
        self.sent = 0

    def send(self, objects: Sequence[OutgoingObject]) -> tuple[ObjectStatus, ...]:
        if self.away:
            raise DestinationAway(f"{self.name} does not answer")
        self.sent += len(objects)
        return tuple(
            ObjectStatus(sop_instance_uid=o.sop_instance_uid, outcome="stored", code=0, meaning="") for o in objects
        )

    def verify(self, objects: Sequence[OutgoingObject]) -> tuple[Verification, ...]:
        return tuple(
            Verification(
                sop_instance_uid=o.sop_instance_uid, outcome="verified" if self.found else "absent", detail="not listed"
            )
            for o in objects
        )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    with database.session() as session:
        add_study(session, StudyState.DELIVERING)
        add_version(session)
        add_result(session, ResultState.RELEASED)
    yield database
    database.close()


class Desk:
    """A dispatch with one PACS and a noted queue."""

    def __init__(self, database: Database, pacs: Pacs) -> None:
        self.database = database
        self.queue = NotedQueue()
        self.dispatch = Dispatch(
            database=database,
            settings=_DESTINATIONS,
            pacs={pacs.name: pacs},  # type: ignore[dict-item]
            reporting=Reporting(
                database=database, clients={}, bundle_of=_no_bundle, institution="", software_version="0"
            ),
            objects_of=lambda _result, _encoding: [_SEG],
            enqueuer=self.queue,
        )

    def attempt(self, delivery: Delivery, turn: str = "") -> dict[str, Any]:
        return self.dispatch.attempt(delivery.delivery_id, turn or delivery.workflow_id)

    def row(self, delivery: Delivery) -> Delivery:
        with self.database.reading() as session:
            return session.get_one(Delivery, delivery.delivery_id)

    def kinds(self) -> list[str]:
        with self.database.reading() as session:
            return [e.kind for e in session.scalars(select(LedgerEvent).order_by(LedgerEvent.event_id))]


def _no_bundle(_name: str, _version: str) -> Any:
    raise AssertionError("no report is made here")


def queued(database: Database, destination: str = "pacs") -> Delivery:
    with database.session() as session:
        now = utc_now()
        return add_delivery(session, DeliveryState.QUEUED, destination=destination, next_attempt_at=now)


@pytest.mark.requirement("QUE-27")
def test_a_repeated_attempt_of_a_finished_delivery_does_nothing(database: Database) -> None:
    pacs = Pacs()
    desk, delivery = Desk(database, pacs), queued(database)
    assert desk.attempt(delivery) == {"state": "verified", "retry_in_s": None}
    assert desk.attempt(delivery) == {"state": "verified", "retry_in_s": None}
    assert pacs.sent == 1
    assert desk.kinds() == ["delivery-verified"]


@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
def test_who_waits_for_a_reason_of_its_own_gives_its_place_up_and_comes_back_as_a_new_turn(
    database: Database,
) -> None:
    pacs = Pacs()
    pacs.found = False
    desk, delivery = Desk(database, pacs), queued(database)
    # Stored, and not found by query: it is this object's trouble, not the destination's.
    assert desk.attempt(delivery)["retry_in_s"] is None
    (call,) = desk.queue.calls
    assert (call["workflow_id"], call["argument"], call["queue"]) == (
        f"{delivery.workflow_id}~1",
        delivery.delivery_id,
        "deliver-pacs",
    )
    assert 0 < call["delay_s"] <= 60
    assert desk.row(delivery).workflow_id == f"{delivery.workflow_id}~1"
    with database.reading() as session:
        assert session.get_one(Study, STUDY_UID).state == StudyState.DELIVERING

    # The old turn, recovered after a crash, finds that it has passed its turn on.
    assert desk.attempt(delivery)["retry_in_s"] is None
    assert pacs.sent == 1
    assert len(desk.queue.calls) == 1
    pacs.found = True
    assert desk.attempt(delivery, f"{delivery.workflow_id}~1") == {"state": "verified", "retry_in_s": None}
    assert pacs.sent == 1


def test_a_short_wait_is_waited_in_place(database: Database) -> None:
    pacs = Pacs("quick")
    pacs.found = False
    desk, delivery = Desk(database, pacs), queued(database, "quick")
    assert 0 < desk.attempt(delivery)["retry_in_s"] <= 0.1
    assert desk.queue.calls == []


@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
def test_while_the_destination_is_away_the_head_of_the_queue_keeps_its_place(database: Database) -> None:
    pacs = Pacs()
    pacs.away = True
    desk, delivery = Desk(database, pacs), queued(database)
    assert desk.attempt(delivery)["retry_in_s"] > 2
    assert desk.queue.calls == []
    assert desk.row(delivery).workflow_id == delivery.workflow_id
    with database.reading() as session:
        assert session.get_one(DestinationState, "pacs").circuit == "open"
        assert [a.kind for a in open_alarms(session)] == ["destination-away"]
    # Nobody knocks before the next probe is due.
    assert desk.attempt(delivery)["retry_in_s"] > 2
    assert desk.row(delivery).attempts == 1


def test_a_destination_that_is_no_longer_named_parks_what_waits_for_it(database: Database) -> None:
    desk, delivery = Desk(database, Pacs()), queued(database, "old-pacs")
    assert awaited_destinations(database) == ["old-pacs"]
    assert desk.attempt(delivery) == {"state": "parked", "retry_in_s": None}
    assert "no longer names" in str(desk.row(delivery).state_reason)
    assert awaited_destinations(database) == []
    with database.reading() as session:
        assert session.get_one(Study, STUDY_UID).state == StudyState.FAILED


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_a_result_that_was_replaced_while_it_waited_is_not_sent(database: Database) -> None:
    with database.session() as session:
        add_result(session, ResultState.SUPERSEDED, result_id="old", state_reason="replaced by result r1")
        delivery = add_delivery(
            session, DeliveryState.QUEUED, result_id="old", next_attempt_at=utc_now() - timedelta(seconds=1)
        )
    pacs = Pacs()
    desk = Desk(database, pacs)
    assert desk.attempt(delivery) == {"state": "withheld", "retry_in_s": None}
    assert pacs.sent == 0
    assert desk.row(delivery).state_reason == "replaced by result r1"
    assert desk.kinds() == ["delivery-withheld"]
