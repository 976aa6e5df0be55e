"""A quarantine that comes after the study was declared whole stops what is under way for it (CMP-18)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import select

from gateway.delivery.dispatch import Dispatch
from gateway.delivery.release import Release
from gateway.destination_settings import DestinationSettings
from gateway.device_share import DeviceShare
from gateway.results.inference import Inference
from gateway.retrying import retry_study
from storage.alarms import open_alarms, raise_alarm
from storage.database import Database
from storage.records import Delivery, DeliveryState, LedgerEvent, Result, ResultState, Study, StudyState
from tests.support.story_rows import STUDY_UID, NotedQueue, add_delivery, add_result, add_study, add_version

_DESTINATIONS = DestinationSettings.model_validate(
    {
        "dimse": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}],
        "fhir": [{"name": "emr", "url": "http://127.0.0.1/fhir", "patient_identifier_system": "urn:oid:1.2"}],
    }
)
_REASON = "the study is quarantined: two patient identities: PatientID differ"


class Nobody:
    """Whoever is asked for anything here has been asked too much."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for in spite of the quarantine")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


def conflict(database: Database) -> None:
    """An object of another patient arrives, as the indexer writes it."""
    with database.session() as session:
        study = session.get_one(Study, STUDY_UID)
        study.state, study.state_reason = StudyState.QUARANTINED, "two patient identities: PatientID differ"


def processing(database: Database, **columns: Any) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, **columns)


def held(database: Database) -> tuple[str, str | None, str]:
    with database.reading() as session:
        result = session.get_one(Result, "r1")
        alarms = [(a.kind, a.subject) for a in open_alarms(session)]
        assert alarms == [("result-held", f"study:{STUDY_UID}")]
        assert [e.kind for e in session.scalars(select(LedgerEvent))] == ["held"]
        return result.state, result.state_reason, session.get_one(Study, STUDY_UID).state


def deliveries(database: Database) -> dict[str, tuple[str, str | None]]:
    with database.reading() as session:
        return {d.destination: (d.state, d.state_reason) for d in session.scalars(select(Delivery))}


def dispatch(database: Database, queue: NotedQueue) -> Dispatch:
    return Dispatch(
        database=database,
        settings=_DESTINATIONS,
        pacs=cast(Any, Nobody()),
        reporting=cast(Any, Nobody()),
        objects_of=cast(Any, Nobody()),
        enqueuer=queue,
    )


@pytest.mark.requirement("CMP-18")
def test_a_conflict_before_inference_holds_the_result_and_no_model_runs(database: Database) -> None:
    processing(database)
    conflict(database)
    inference = Inference(
        database=database,
        spool=cast(Any, Nobody()),
        shelf=cast(Any, Nobody()),
        attempts=3,
        share=DeviceShare(),
        busy=lambda _: None,
        idle=lambda _: None,
    )
    assert [inference.infer("r1") for _ in range(2)] == ["held"] * 2
    assert held(database) == (ResultState.HELD, _REASON, StudyState.QUARANTINED)


@pytest.mark.requirement("CMP-18")
def test_a_conflict_while_the_model_is_at_work_holds_the_result(database: Database) -> None:
    queue = NotedQueue()
    processing(database, verdict="pass")
    conflict(database)
    release = Release(database=database, destinations=_DESTINATIONS, enqueuer=queue)
    assert [release.release("r1") for _ in range(2)] == ["held"] * 2
    assert held(database) == (ResultState.HELD, _REASON, StudyState.QUARANTINED)
    assert (deliveries(database), queue.calls) == ({}, [])


@pytest.mark.requirement("CMP-18")
@pytest.mark.parametrize("state", [DeliveryState.QUEUED, DeliveryState.SENT])
def test_a_conflict_while_delivering_withholds_what_waits_for_pacs_and_emr(
    database: Database, state: DeliveryState
) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.DELIVERING)
        add_version(session)
        add_result(session, ResultState.RELEASED, verdict="pass")
        turns = {}
        for name, kind in (("pacs", "dimse"), ("emr", "fhir")):
            delivery = add_delivery(session, state, destination=name)
            delivery.kind = kind
            turns[delivery.delivery_id] = delivery.workflow_id
    conflict(database)
    steps = dispatch(database, queue)
    for delivery_id, turn in turns.items():
        assert steps.attempt(delivery_id, turn) == {"state": "withheld", "retry_in_s": None}
        assert steps.attempt(delivery_id, turn) == {"state": "withheld", "retry_in_s": None}
    found = deliveries(database)
    assert {name: withheld for name, (withheld, _) in found.items()} == {"pacs": "withheld", "emr": "withheld"}
    assert all(str(reason).startswith(_REASON) for _, reason in found.values())
    with database.reading() as session:
        assert session.get_one(Study, STUDY_UID).state == StudyState.QUARANTINED
        assert [e.kind for e in session.scalars(select(LedgerEvent))] == ["delivery-withheld"] * 2


def test_what_the_quarantine_stopped_goes_on_after_the_release_and_not_before(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.QUARANTINED)
        add_version(session)
        add_result(session, ResultState.HELD, result_id="r1", state_reason=_REASON)
        add_result(session, ResultState.HELD, result_id="qa", state_reason="held by QA: volume", verdict="hold")
        add_result(session, ResultState.RELEASED, result_id="r2", verdict="pass")
        add_delivery(session, DeliveryState.WITHHELD, result_id="r2", state_reason=_REASON)
        add_delivery(session, DeliveryState.WITHHELD, result_id="r2", destination="emr", state_reason="replaced by r9")
    assert not retry_study(database, queue, _DESTINATIONS, STUDY_UID, actor="user:test").anything
    with database.session() as session:
        session.get_one(Study, STUDY_UID).state = StudyState.PROCESSING
        session.get_one(Result, "qa").state = ResultState.SUPERSEDED
        raise_alarm(session, kind="result-held", subject=f"study:{STUDY_UID}", message="held")
    retried = retry_study(database, queue, _DESTINATIONS, STUDY_UID, actor="user:test")
    assert (retried.results, retried.deliveries) == (1, 1)
    assert [call["argument"] for call in queue.calls] == ["r1", "r2 to pacs"]
    with database.reading() as session:
        assert open_alarms(session) == []
