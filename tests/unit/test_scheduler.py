"""The sweep: what was never enqueued is, what lost its workflow is parked, the rest is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from gateway import durable
from gateway.destination_settings import DestinationSettings
from gateway.scheduled_jobs import last_due, workflow_id
from gateway.scheduler import Scheduler, sweep
from gateway.settings import GatewaySettings, SchedulerSettings, Settings
from gateway.workflows import RUN_JOB
from storage.alarms import open_alarms
from storage.database import Database
from storage.learning_records import LearningRun, RunState
from storage.records import Delivery, DeliveryState, Result, ResultState, Study, StudyState, utc_now
from tests.support.story_rows import (
    STUDY_UID,
    NotedQueue,
    add_delivery,
    add_result,
    add_study,
    add_training,
    add_version,
)
from tests.support.waiting import wait_until

_LONG_AGO = timedelta(minutes=6)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


def test_work_that_was_left_behind_is_enqueued_under_its_own_id(database: Database) -> None:
    long_ago = utc_now() - _LONG_AGO
    with database.session() as session:
        add_study(session, StudyState.WHOLE, uid="1.1")
        add_version(session, uid="1.1", declared_at=long_ago, routed=False)
        add_study(session, StudyState.PROCESSING, uid="1.2")
        add_version(session, uid="1.2", declared_at=long_ago)
        add_result(session, ResultState.PENDING, uid="1.2", result_id="r2", created_at=long_ago)
        add_study(session, StudyState.DELIVERING, uid="1.3")
        add_version(session, uid="1.3", declared_at=long_ago)
        add_result(session, ResultState.RELEASED, uid="1.3", result_id="r3", created_at=long_ago)
        add_delivery(session, DeliveryState.QUEUED, result_id="r3", updated_at=long_ago, next_attempt_at=long_ago)
    queue = NotedQueue()
    assert sweep(database, queue) == 3
    assert queue.ids == ["study 1.1 1", "result r2", "delivery r3 pacs"]
    assert [call["queue"] for call in queue.calls] == ["studies", "inference", "deliver-pacs"]
    assert [call["workflow"] for call in queue.calls] == ["process_study", "make_result", "deliver"]


def test_a_study_that_was_routed_but_never_ordered_is_found(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session, declared_at=utc_now() - _LONG_AGO)
    queue = NotedQueue()
    assert sweep(database, queue) == 1
    assert queue.ids == [f"study {STUDY_UID} 1"]


def test_what_is_young_finished_or_waits_for_its_time_is_left_alone(database: Database) -> None:
    long_ago, later = utc_now() - _LONG_AGO, utc_now() + timedelta(minutes=1)
    with database.session() as session:
        add_study(session, StudyState.WHOLE, uid="1.1")
        add_version(session, uid="1.1", routed=False)
        add_study(session, StudyState.DELIVERING, uid="1.2", version=2)
        add_version(session, 1, uid="1.2", declared_at=long_ago, routed=False)
        add_version(session, 2, uid="1.2", declared_at=long_ago)
        add_result(session, ResultState.RELEASED, uid="1.2", version=2, created_at=long_ago)
        add_delivery(session, DeliveryState.QUEUED, updated_at=long_ago, next_attempt_at=later)
        add_delivery(session, DeliveryState.STORED, destination="vna", updated_at=long_ago)
    queue = NotedQueue()
    assert sweep(database, queue) == 0
    assert queue.calls == []


@pytest.mark.parametrize("how", ["ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED", "CANCELLED"])
def test_work_whose_workflow_has_ended_without_it_is_parked_for_the_operator(database: Database, how: str) -> None:
    long_ago = utc_now() - _LONG_AGO
    with database.session() as session:
        add_study(session, StudyState.WHOLE, uid="1.1")
        add_version(session, uid="1.1", declared_at=long_ago, routed=False)
        add_study(session, StudyState.PROCESSING, uid="1.2")
        add_version(session, uid="1.2", declared_at=long_ago)
        add_result(session, ResultState.PENDING, uid="1.2", result_id="r2", created_at=long_ago)
        add_study(session, StudyState.DELIVERING, uid="1.3")
        add_version(session, uid="1.3", declared_at=long_ago)
        add_result(session, ResultState.RELEASED, uid="1.3", result_id="r3", created_at=long_ago)
        sent = add_delivery(session, DeliveryState.SENT, result_id="r3", updated_at=long_ago, next_attempt_at=long_ago)
    queue = NotedQueue()
    queue.gone = dict.fromkeys(("study 1.1 1", "result r2", "delivery r3 pacs"), how)
    assert sweep(database, queue) == 3
    assert queue.calls == []
    with database.reading() as session:
        assert [session.get_one(Study, uid).state for uid in ("1.1", "1.2", "1.3")] == [StudyState.FAILED] * 3
        assert session.get_one(Result, "r2").state == ResultState.FAILED
        delivery = session.get_one(Delivery, sent.delivery_id)
        assert delivery.state == DeliveryState.PARKED
        assert how.lower() in str(delivery.state_reason)
    assert sweep(database, queue) == 0


@pytest.mark.parametrize("how", ["ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED", "CANCELLED", "SUCCESS"])
@pytest.mark.parametrize("lost", ["learn-a", "learn-a-fold-1", "learn-a-finish"])
def test_a_training_whose_workflow_has_ended_without_it_has_failed_with_an_alarm(
    database: Database, lost: str, how: str
) -> None:
    folds = {"0": "done", "1": "queued" if lost == "learn-a-fold-1" else "done"}
    with database.session() as session:
        run = add_training(session, RunState.TRAINING, updated_at=utc_now() - _LONG_AGO)
        if lost != run.workflow_id:
            run.figures = {"begun": run.workflow_id, "folds": folds}
    queue = NotedQueue()
    queue.gone = {"learn-a-fold-0": "SUCCESS"}  # it has done its part
    assert sweep(database, queue) == 0
    queue.gone[lost] = how
    assert sweep(database, queue) == 1
    assert queue.calls == []
    with database.reading() as session:
        run = session.get_one(LearningRun, "a")
        (alarm,) = open_alarms(session)
    assert run.state == RunState.FAILED
    assert run.state_reason == f"sweep: its workflow ended ({how.lower()}) and left it unfinished; see the log"
    assert (alarm.kind, alarm.subject) == ("training-failed", "model:liver")
    assert sweep(database, queue) == 0


@pytest.mark.parametrize(
    ("state", "young"),
    [(RunState.TRAINING, True), (RunState.WAITING, False), (RunState.CANDIDATE, False), (RunState.REFUSED, False)],
)
def test_a_training_that_has_moved_or_needs_no_workflow_is_left_alone(
    database: Database, state: RunState, young: bool
) -> None:
    with database.session() as session:
        add_training(session, state, updated_at=utc_now() - (timedelta() if young else _LONG_AGO))
    queue = NotedQueue()
    queue.gone = {"learn-a": "ERROR"}
    assert sweep(database, queue) == 0
    with database.reading() as session:
        assert session.get_one(LearningRun, "a").state == state
        assert list(open_alarms(session)) == []


def test_a_malformed_cron_line_is_refused_at_the_start(tmp_path: Path, database: Database) -> None:
    settings = Settings(
        folder=tmp_path,
        gateway=GatewaySettings(scheduler=SchedulerSettings(sweep_cron="every minute")),
        destinations=DestinationSettings(),
    )
    scheduler = Scheduler(settings, database)
    with pytest.raises(ValueError, match="fields"):
        scheduler.start()


def test_the_first_sweep_is_at_the_start_and_sends_what_had_nowhere_to_go(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.migrate()
    durable.prepare(database)
    with database.session() as session:
        add_study(session, StudyState.HELD)
        add_version(session)
        add_result(session, ResultState.RELEASED)
    settings = Settings(
        folder=tmp_path,
        gateway=GatewaySettings(scheduler=SchedulerSettings(sweep_cron="0 0 1 1 *")),
        destinations=DestinationSettings.model_validate(
            {"dimse": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}]}
        ),
    )
    scheduler = Scheduler(settings, database)
    scheduler.start()
    try:
        wait_until(lambda: _destinations(database) == ["pacs"], "the first sweep has made the delivery")
    finally:
        scheduler.stop()
        database.close()


def _destinations(database: Database) -> list[str]:
    with database.reading() as session:
        return list(session.scalars(select(Delivery.destination)))


@pytest.mark.requirement("CARD-05")
@pytest.mark.parametrize("job", ["drift", "retention"])
def test_a_job_that_was_due_is_started_once_by_two_schedulers(tmp_path: Path, job: str) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.migrate()
    durable.prepare(database)
    lines = dict.fromkeys(("sweep_cron", "drift_cron", "learning_cron", "retention_cron"), "")
    settings = Settings(
        folder=tmp_path,
        gateway=GatewaySettings(scheduler=SchedulerSettings(**{**lines, f"{job}_cron": "0 0 * * *"})),
        destinations=DestinationSettings(),
    )
    due = last_due("0 0 * * *", utc_now())
    assert due is not None
    client = durable.Enqueuer(database)
    schedulers = [Scheduler(settings, database) for _ in range(2)]
    try:
        for scheduler in schedulers:
            scheduler.start()
        wait_until(lambda: _jobs(client) == [workflow_id(job, due)], "the run is on the queue")
    finally:
        for scheduler in schedulers:
            scheduler.stop()
    assert _jobs(client) == [workflow_id(job, due)]
    client.close()
    database.close()


def _jobs(client: durable.Enqueuer) -> list[str]:
    return [row.workflow_id for row in client._client.list_workflows(name=RUN_JOB)]
