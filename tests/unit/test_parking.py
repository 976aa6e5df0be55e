"""Parking and putting back: work that goes no further is listed with its reason and comes back once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from gateway import parking
from gateway.destination_settings import DestinationSettings
from gateway.durable import next_workflow_id
from gateway.retrying import retriable_studies, retry_study
from storage import ledger
from storage.alarms import open_alarms, raise_alarm
from storage.database import Database
from storage.records import Alarm, Delivery, DeliveryState, LedgerEvent, Result, ResultState, Study, StudyState
from tests.support.story_rows import (
    STUDY_UID,
    NotedQueue,
    add_delivery,
    add_result,
    add_study,
    add_version,
)

_DESTINATIONS = DestinationSettings.model_validate(
    {"dimse": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}]}
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


def kinds(database: Database) -> list[str]:
    with database.reading() as session:
        return [event.kind for event in session.scalars(select(LedgerEvent).order_by(LedgerEvent.event_id))]


def alarms(database: Database) -> list[tuple[str, str]]:
    with database.reading() as session:
        return [(alarm.kind, alarm.message) for alarm in open_alarms(session)]


def state(database: Database) -> tuple[str, str | None]:
    with database.reading() as session:
        study = session.get_one(Study, STUDY_UID)
        return study.state, study.state_reason


def test_a_parked_study_is_failed_and_a_repeated_step_adds_nothing(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        version = add_version(session)
    for _ in range(2):
        with database.session() as session:
            parking.park_study(session, version.version_id, "order", "Permanent: no model")
    assert state(database) == (StudyState.FAILED, "order: Permanent: no model")
    assert kinds(database) == ["parked"]
    assert alarms(database) == [("parked", "order: Permanent: no model")]


def test_an_old_version_does_not_fail_the_study(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.WHOLE, version=2)
        old = add_version(session, 1)
        add_version(session, 2, routed=False)
        parking.park_study(session, old.version_id, "route", "unreadable")
    assert state(database)[0] == StudyState.WHOLE
    assert kinds(database) == []


def test_a_parked_result_fails_its_study_and_keeps_what_was_computed(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, runtime={"seconds": {}})
    for _ in range(2):
        with database.session() as session:
            parking.park_result(session, "r1", "encode", "Permanent: no header")
    assert state(database) == (StudyState.FAILED, "encode: Permanent: no header")
    assert kinds(database) == ["parked"]
    with database.reading() as session:
        assert session.get_one(Result, "r1").runtime == {"seconds": {}}


@pytest.mark.parametrize("done", [ResultState.RELEASED, ResultState.HELD, ResultState.SUPERSEDED])
def test_a_finished_result_is_not_parked(database: Database, done: ResultState) -> None:
    with database.session() as session:
        add_study(session, StudyState.DELIVERING)
        add_version(session)
        add_result(session, done)
        assert parking.park_result(session, "r1", "release", "too late") == done
    assert kinds(database) == []


def test_a_verified_delivery_is_not_parked(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.VERIFIED)
        add_version(session)
        add_result(session, ResultState.RELEASED)
        delivery = add_delivery(session, DeliveryState.VERIFIED)
        assert parking.park_delivery(session, delivery.delivery_id, "late") == DeliveryState.VERIFIED
    assert kinds(database) == []


def test_workflow_ids_count_up() -> None:
    assert next_workflow_id("result-ab") == "result-ab~1"
    assert next_workflow_id("result-ab~1") == "result-ab~2"
    assert next_workflow_id("odd~name") == "odd~name~1"


# -- retry -------------------------------------------------------------------------------------------------------


def test_retry_puts_a_study_that_failed_before_its_results_back_to_routing(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        version = add_version(session)
        parking.park_study(session, version.version_id, "order", "no model")
    assert retriable_studies(database) == [STUDY_UID]
    retried = retry_study(database, queue, _DESTINATIONS, STUDY_UID, actor="operator")
    assert (retried.routing, retried.results, retried.deliveries) == (1, 0, 0)
    assert state(database) == (StudyState.WHOLE, None)
    (call,) = queue.calls
    assert (call["workflow"], call["workflow_id"], call["argument"]) == (
        "process_study",
        f"{version.workflow_id}~1",
        version.version_id,
    )
    assert kinds(database) == ["parked", "retried"]
    assert alarms(database) == []
    assert retriable_studies(database) == []


@pytest.mark.requirement("QUE-28", open="hung driver calls on a real GPU")
def test_retry_gives_a_parked_result_all_its_attempts_again(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING).attempts = 4
        parking.park_result(session, "r1", "infer", "never finished")
    assert retry_study(database, queue, _DESTINATIONS, STUDY_UID, actor="operator").results == 1
    assert state(database)[0] == StudyState.PROCESSING
    assert queue.ids == ["result r1~1"]
    with database.reading() as session:
        result = session.get_one(Result, "r1")
    assert (result.state, result.state_reason, result.attempts, result.finished_at) == ("pending", None, 0, None)


def test_retry_of_a_delivery_starts_its_patience_anew_and_leaves_the_others_alone(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.DELIVERING)
        add_version(session)
        add_result(session, ResultState.RELEASED)
        parked = add_delivery(session, DeliveryState.QUEUED)
        add_delivery(session, DeliveryState.VERIFIED, destination="emr")
        parking.park_delivery(session, parked.delivery_id, "the file is gone")
        # As the ladder raises it when it gives up by itself.
        raise_alarm(session, kind="delivery-parked", subject=f"delivery:{parked.delivery_id}", message="given up")
    queued_before = parked.queued_at
    assert state(database) == (StudyState.FAILED, "delivery to pacs: the file is gone")
    assert retry_study(database, queue, _DESTINATIONS, STUDY_UID, actor="operator").deliveries == 1
    assert queue.ids == ["delivery r1 pacs~1"]
    assert queue.calls[0]["queue"] == "deliver-pacs"
    with database.reading() as session:
        again = session.get_one(Delivery, parked.delivery_id)
        assert session.scalars(select(Alarm).where(Alarm.cleared_at.is_(None))).all() == []
    assert (again.state, again.state_reason) == (DeliveryState.QUEUED, None)
    assert again.queued_at > queued_before
    assert again.next_attempt_at is not None
    assert state(database)[0] == StudyState.DELIVERING


def test_retry_of_what_is_not_parked_changes_nothing(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.VERIFIED)
        add_version(session)
        add_result(session, ResultState.RELEASED)
        add_delivery(session, DeliveryState.VERIFIED)
    assert not retry_study(database, queue, _DESTINATIONS, STUDY_UID, actor="operator").anything
    assert queue.calls == []
    assert kinds(database) == []


def test_retry_leaves_older_versions_alone(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.VERIFIED, version=2)
        add_version(session, 1)
        add_version(session, 2)
        add_result(session, ResultState.FAILED, result_id="old", version=1)
        add_result(session, ResultState.RELEASED, result_id="new", version=2)
        add_delivery(session, DeliveryState.VERIFIED, result_id="new")
    assert not retry_study(database, queue, _DESTINATIONS, STUDY_UID, actor="operator").anything


def test_retry_sends_what_had_nowhere_to_go_to_the_destinations_of_today(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        add_study(session, StudyState.HELD)
        add_version(session)
        add_result(session, ResultState.RELEASED)
        raise_alarm(session, kind="no-destination", subject="gateway", message="")
    assert retriable_studies(database) == [STUDY_UID]
    assert not retry_study(database, queue, DestinationSettings(), STUDY_UID, actor="operator").anything
    assert retry_study(database, queue, _DESTINATIONS, STUDY_UID, actor="operator").deliveries == 1
    assert [call["queue"] for call in queue.calls] == ["deliver-pacs"]
    assert state(database) == (StudyState.DELIVERING, None)
    assert alarms(database) == []
    assert kinds(database) == ["queued-late", "retried"]
    assert retriable_studies(database) == []


def test_retry_of_an_unknown_study_says_so(database: Database) -> None:
    with pytest.raises(KeyError):
        retry_study(database, NotedQueue(), _DESTINATIONS, "1.2.999", actor="operator")


def test_the_ledger_of_a_parked_and_retried_study_holds(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING)
        parking.park_result(session, "r1", "infer", "no")
    retry_study(database, NotedQueue(), _DESTINATIONS, STUDY_UID, actor="operator")
    with database.reading() as session:
        assert ledger.verify(session) == 2
