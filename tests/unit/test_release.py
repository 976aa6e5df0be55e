"""Release: deliveries, queue entries and the result's state are one; what is held or overtaken does not leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.delivery.release import Release
from gateway.settings import DestinationSettings
from storage.alarms import open_alarms
from storage.database import Database
from storage.records import (
    Delivery,
    DeliveryState,
    LedgerEvent,
    Result,
    ResultObject,
    ResultState,
    Study,
    StudyState,
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
        "dimse": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}],
        "dicomweb": [{"name": "vna", "url": "http://127.0.0.1/dicom-web"}],
        "fhir": [{"name": "emr", "url": "http://127.0.0.1/fhir", "patient_identifier_system": "urn:oid:1.2"}],
    }
)
_CHECKS = [
    {"name": "volume", "segment": "Anterior", "value": 9.5, "limit": "0.79 to 3.1 ml", "verdict": "hold"},
    {"name": "empty", "segment": None, "value": "no", "limit": "no", "verdict": "pass"},
]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


def release(database: Database, queue: NotedQueue, destinations: DestinationSettings = _DESTINATIONS) -> Release:
    return Release(database=database, destinations=destinations, enqueuer=queue)


def deliveries(database: Database) -> list[Delivery]:
    with database.reading() as session:
        return list(session.scalars(select(Delivery).order_by(Delivery.destination)))


def events(database: Database) -> list[tuple[str, dict[str, Any]]]:
    with database.reading() as session:
        return [(e.kind, e.detail) for e in session.scalars(select(LedgerEvent).order_by(LedgerEvent.event_id))]


def add_notice(session: Session) -> None:
    session.add(
        ResultObject(
            sop_instance_uid="1.9",
            result_id="r1",
            role="notice",
            encoding="SR",
            sop_class_uid="1.2.840.10008.5.1.4.1.1.88.34",
            series_instance_uid="1.8",
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            spool_path="studies/k/results/r1/notice.dcm",
            digest="0" * 64,
            size_bytes=1,
        )
    )


def test_a_judged_result_gets_a_delivery_and_a_queue_entry_per_destination(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, verdict="pass")
    assert release(database, queue).release("r1") == "released"
    rows = deliveries(database)
    assert [(d.destination, d.kind, d.state) for d in rows] == [
        ("emr", "fhir", "queued"),
        ("pacs", "dimse", "queued"),
        ("vna", "dicomweb", "queued"),
    ]
    assert {c["queue"]: (c["workflow_id"], c["argument"]) for c in queue.calls} == {
        f"deliver-{d.destination}": (d.workflow_id, d.delivery_id) for d in rows
    }
    with database.reading() as session:
        assert session.get_one(Study, STUDY_UID).state == StudyState.DELIVERING
    assert [kind for kind, _ in events(database)] == ["released"]


@pytest.mark.requirement("QUE-27")
def test_a_repeated_release_adds_nothing(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, verdict="review")
    assert [release(database, queue).release("r1") for _ in range(2)] == ["released"] * 2
    assert len(deliveries(database)) == len(queue.calls) == 3
    assert [kind for kind, _ in events(database)] == ["released"]


def test_when_a_queue_entry_cannot_be_made_nothing_is_released(database: Database) -> None:
    class Broken(NotedQueue):
        def enqueue(self, session: Session, **how: Any) -> None:
            if len(self.calls) == 2:
                raise RuntimeError("the third entry fails")
            super().enqueue(session, **how)

    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, verdict="pass")
    with pytest.raises(RuntimeError):
        release(database, Broken()).release("r1")
    assert deliveries(database) == []
    with database.reading() as session:
        assert session.get_one(Result, "r1").state == ResultState.PENDING
    assert events(database) == []


def test_of_a_held_result_nothing_leaves_and_the_checks_are_named(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, verdict="hold", checks=_CHECKS)
    assert release(database, queue).release("r1") == "held"
    assert deliveries(database) == []
    assert queue.calls == []
    with database.reading() as session:
        study = session.get_one(Study, STUDY_UID)
        (alarm,) = open_alarms(session)
    assert (study.state, study.state_reason) == (
        StudyState.HELD,
        "held by QA: volume Anterior: 9.5 (limit: 0.79 to 3.1 ml)",
    )
    assert (alarm.kind, alarm.subject) == ("result-held", f"study:{STUDY_UID}")
    ((kind, detail),) = events(database)
    assert (kind, detail["notice_sent"], [c["name"] for c in detail["checks"]]) == ("held", False, ["volume"])


def test_the_notice_of_a_held_result_goes_to_the_pacs_and_never_to_the_emr(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, verdict="hold", checks=_CHECKS)
        add_notice(session)
    assert release(database, queue).release("r1") == "held"
    assert [d.destination for d in deliveries(database)] == ["pacs", "vna"]
    with database.reading() as session:
        assert session.get_one(Study, STUDY_UID).state == StudyState.HELD


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_a_result_that_was_overtaken_is_not_released(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.WHOLE, version=2)
        add_version(session, 1)
        add_version(session, 2, routed=False)
        add_result(session, ResultState.PENDING, verdict="pass")
    assert release(database, queue).release("r1") == "superseded"
    assert release(database, queue).release("r1") == "superseded"
    assert deliveries(database) == []
    assert [kind for kind, _ in events(database)] == ["superseded"]


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_what_of_the_old_result_still_waits_is_withheld_and_what_arrived_is_superseded(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING, version=2)
        add_version(session, 1)
        add_version(session, 2)
        add_result(session, ResultState.RELEASED, result_id="old")
        add_delivery(session, DeliveryState.VERIFIED, result_id="old", destination="pacs")
        add_delivery(session, DeliveryState.QUEUED, result_id="old", destination="emr")
        add_result(session, ResultState.PENDING, version=2, verdict="pass", supersedes="old")
    assert release(database, NotedQueue()).release("r1") == "released"
    with database.reading() as session:
        old = session.get_one(Result, "old")
        states = {d.destination: d.state for d in session.scalars(select(Delivery).where(Delivery.result_id == "old"))}
    assert (old.state, old.state_reason) == (ResultState.SUPERSEDED, "replaced by result r1")
    assert states == {"pacs": DeliveryState.VERIFIED, "emr": DeliveryState.WITHHELD}
    kinds = dict(events(database))
    assert (kinds["superseded"]["by"], kinds["superseded"]["withheld"]) == ("r1", ["emr"])


def test_a_gateway_that_sends_to_nobody_says_so(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, verdict="pass")
    assert release(database, NotedQueue(), DestinationSettings()).release("r1") == "released"
    with database.reading() as session:
        assert [alarm.kind for alarm in open_alarms(session)] == ["no-destination"]
        assert session.get_one(Study, STUDY_UID).state == StudyState.HELD
