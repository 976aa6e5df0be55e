"""A person takes a study out of quarantine, and it goes on from where it stood (CMP-18)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.errors import Rejected
from gateway.intake.study_index import ALARM_CONFLICT, ALARM_IDENTITY
from gateway.quarantine import objects_aside
from gateway.quarantine_release import Released, release_quarantine
from storage import ledger
from storage.alarms import open_alarms, raise_alarm
from storage.database import Database
from storage.records import (
    Delivery,
    DeliveryState,
    Instance,
    InstanceState,
    Result,
    ResultState,
    RoutingDecision,
    Study,
    StudyState,
    StudyVersion,
    utc_now,
)
from tests.support.story_rows import (
    SERIES_UID,
    STUDY_UID,
    NotedQueue,
    add_delivery,
    add_result,
    add_study,
    add_version,
)

_WHY = "two patient identities: PatientID (0010,0020) differ"
_STOPPED = f"the study is quarantined: {_WHY}"
_OTHER = "PatientID (0010,0020): another patient than the study's first"
_SUBJECT = f"study:{STUDY_UID}"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


def quarantined(session: Session, *, version: int = 0) -> Study:
    study = add_study(session, StudyState.QUARANTINED, version=version)
    study.state_reason = _WHY
    raise_alarm(session, kind=ALARM_IDENTITY, subject=_SUBJECT, message="two patients")
    return study


def add_object(session: Session, object_id: str, state: InstanceState, reason: str | None = None) -> None:
    session.add(
        Instance(
            object_id=object_id, study_instance_uid=STUDY_UID, series_instance_uid=SERIES_UID,
            sop_instance_uid=f"{SERIES_UID}.{object_id}", state=state, state_reason=reason, digest="0" * 64,
            size_bytes=1, spool_path=object_id, received_at=utc_now(), association_id="a", calling_ae="CT1",
            called_ae="SEGGATE", peer_address="192.0.2.1",
        )
    )  # fmt: skip
    session.flush()


def add_decision(session: Session, verdict: str, *, version: int = 1) -> None:
    session.add(
        RoutingDecision(
            version_id=f"{STUDY_UID} v{version}",
            series_instance_uid=SERIES_UID,
            rule="hippocampus",
            matched=verdict == "matched",
            model="tiny",
            explanation={"verdict": verdict, "reason": "why"},
        )
    )


def release(database: Database, queue: NotedQueue | None = None, *, reason: str = "sender asked") -> Released:
    return release_quarantine(database, queue or NotedQueue(), STUDY_UID, reason=reason, actor="user:jo")


def state(database: Database) -> tuple[str, str | None]:
    with database.reading() as session:
        study = session.get_one(Study, STUDY_UID)
        return study.state, study.state_reason


def alarms(database: Database) -> set[str]:
    with database.reading() as session:
        return {alarm.kind for alarm in open_alarms(session)}


@pytest.mark.requirement("CMP-18")
def test_a_study_that_was_being_received_is_open_again_and_what_differs_stays_aside(database: Database) -> None:
    with database.session() as session:
        quarantined(session)
        add_object(session, "first", InstanceState.CURRENT)
        add_object(session, "other", InstanceState.QUARANTINED, _OTHER)
        add_object(session, "again", InstanceState.CONFLICT, "other content than object first")
        raise_alarm(session, kind=ALARM_CONFLICT, subject=_SUBJECT, message="came again")
    released = release(database)
    assert (released.state, released.objects_aside) == ("receiving", 2)
    assert state(database) == (StudyState.RECEIVING, None)
    assert alarms(database) == set()
    with database.reading() as session:
        (event,) = ledger.events(session, _SUBJECT)
        ledger.verify(session)
        assert (event.kind, event.actor) == ("quarantine-released", "user:jo")
        assert event.detail == {
            "reason": "sender asked",
            "quarantined_for": _WHY,
            "state": "receiving",
            "objects_aside": {"quarantined": 1, "conflict": 1},
            "routing": 0,
            "results": 0,
            "deliveries": 0,
        }
        aside = {i.object_id: (i.state, i.state_reason) for i in objects_aside(session, STUDY_UID)}
    assert aside == {
        "other": ("quarantined", _OTHER),
        "again": ("conflict", "other content than object first"),
    }


@pytest.mark.requirement("CMP-18")
def test_what_the_quarantine_stopped_is_back_on_its_queues_and_what_is_held_for_another_reason_is_not(
    database: Database,
) -> None:
    queue = NotedQueue()
    with database.session() as session:
        quarantined(session, version=1)
        add_version(session)
        add_decision(session, "matched")
        add_result(session, ResultState.HELD, result_id="stopped", state_reason=_STOPPED)
        add_result(session, ResultState.HELD, result_id="qa", state_reason="held by QA: volume", verdict="hold")
        add_result(session, ResultState.FAILED, result_id="parked", state_reason="infer: no")
        add_result(session, ResultState.RELEASED, result_id="sent", verdict="pass")
        add_delivery(session, DeliveryState.WITHHELD, result_id="sent", state_reason=_STOPPED)
        add_delivery(session, DeliveryState.WITHHELD, result_id="sent", destination="emr", state_reason="replaced")
        raise_alarm(session, kind="result-held", subject=_SUBJECT, message="held")
    released = release(database, queue)
    assert (released.routing, released.results, released.deliveries) == (0, 1, 1)
    assert queue.ids == ["result stopped~1", "delivery sent pacs~1"]
    with database.reading() as session:
        states = {r.result_id: r.state for r in session.scalars(select(Result))}
        deliveries = {d.destination: d.state for d in session.scalars(select(Delivery))}
    assert states == {"stopped": "pending", "qa": "held", "parked": "failed", "sent": "released"}
    assert deliveries == {"pacs": "queued", "emr": "withheld"}
    assert state(database) == (StudyState.FAILED, "infer: no")
    assert alarms(database) == {"result-held"}


def test_the_alarm_of_results_that_only_the_quarantine_held_is_cleared(database: Database) -> None:
    with database.session() as session:
        quarantined(session, version=1)
        add_version(session)
        add_decision(session, "matched")
        add_result(session, ResultState.HELD, state_reason=_STOPPED)
        raise_alarm(session, kind="result-held", subject=_SUBJECT, message="held")
    assert release(database).state == StudyState.PROCESSING
    assert alarms(database) == set()


@pytest.mark.parametrize(
    ("result", "verdict", "back"),
    [
        (ResultState.RELEASED, "matched", StudyState.VERIFIED),
        (ResultState.PENDING, "matched", StudyState.PROCESSING),
        (ResultState.HELD, "matched", StudyState.HELD),
        (ResultState.NOT_RUN, "matched", StudyState.UNMATCHED),
        (None, "not-matched", StudyState.UNMATCHED),
        (None, "error", StudyState.FAILED),
        (None, "matched", StudyState.PROCESSING),
    ],
)
def test_a_study_goes_back_to_where_its_newest_version_stands(
    database: Database, result: ResultState | None, verdict: str, back: StudyState
) -> None:
    queue = NotedQueue()
    with database.session() as session:
        quarantined(session, version=1)
        add_version(session)
        add_decision(session, verdict)
        if result is not None:
            add_result(session, result)
        if result == ResultState.RELEASED:
            add_delivery(session, DeliveryState.VERIFIED)
    assert release(database, queue).state == back
    assert state(database)[0] == back
    assert queue.calls == []


@pytest.mark.parametrize("routed", [False, True])
def test_a_workflow_that_ended_in_the_quarantine_without_results_is_queued_again(
    database: Database, routed: bool
) -> None:
    queue = NotedQueue(gone={f"study {STUDY_UID} 1": "SUCCESS"})
    with database.session() as session:
        quarantined(session, version=1)
        version = add_version(session, routed=routed)
        if routed:
            add_decision(session, "matched")
        raise_alarm(session, kind="parked", subject=_SUBJECT, message="order: no model")
    assert release(database, queue).routing == 1
    (call,) = queue.calls
    assert (call["workflow"], call["workflow_id"]) == ("process_study", f"{version.workflow_id}~1")
    assert state(database)[0] == (StudyState.PROCESSING if routed else StudyState.WHOLE)
    assert alarms(database) == set()


def test_a_workflow_that_still_waits_is_not_queued_twice(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        quarantined(session, version=1)
        add_version(session, routed=False)
    assert release(database, queue).state == StudyState.WHOLE
    assert queue.calls == []


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_objects_that_came_meanwhile_open_the_study_and_the_older_version_goes_on(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        quarantined(session, version=1)
        add_object(session, "first", InstanceState.CURRENT)
        add_version(session).object_ids = ["first"]
        add_decision(session, "matched")
        add_result(session, ResultState.RELEASED, verdict="pass")
        add_delivery(session, DeliveryState.WITHHELD, state_reason=_STOPPED)
        add_object(session, "late", InstanceState.CURRENT)
    released = release(database, queue)
    assert (released.state, released.deliveries) == ("receiving", 1)
    assert queue.ids == ["delivery r1 pacs~1"]


def test_a_second_release_changes_nothing_and_says_who_released_it(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        quarantined(session, version=1)
        add_version(session)
        add_decision(session, "matched")
        add_result(session, ResultState.HELD, state_reason=_STOPPED)
    release(database, queue)
    with pytest.raises(Rejected, match=r"is not quarantined; its state is processing \(user:jo released it at 20"):
        release(database, queue, reason="once more")
    assert queue.ids == ["result r1~1"]
    with database.reading() as session:
        assert [e.kind for e in ledger.events(session, _SUBJECT)] == ["quarantine-released"]


def test_a_study_that_is_not_quarantined_is_left_alone(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.DELIVERING)
    with pytest.raises(Rejected, match=r"not quarantined; its state is delivering$"):
        release(database)
    assert state(database) == (StudyState.DELIVERING, None)


def test_an_unknown_study_and_a_blank_reason_are_refused(database: Database) -> None:
    with pytest.raises(KeyError):
        release(database)
    with database.session() as session:
        quarantined(session)
    with pytest.raises(Rejected, match="a release needs a reason"):
        release(database, reason=" \n")
    assert state(database) == (StudyState.QUARANTINED, _WHY)
    with database.reading() as session:
        assert session.scalars(select(StudyVersion)).all() == []
