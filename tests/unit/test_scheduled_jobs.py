"""gateway.scheduled_jobs: when a job is due, and that one run of it is started once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway.durable import JOBS
from gateway.scheduled_jobs import FAILED, JOB_LIST, JobSteps, enqueue_job, last_due, next_due, workflow_id
from gateway.settings import SchedulerSettings
from gateway.workflows import RUN_JOB
from storage.alarms import open_alarms
from storage.database import Database
from tests.support.story_rows import NotedQueue

NOON = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


@pytest.mark.parametrize(
    ("cron", "last", "following"),
    [
        ("15 3 * * *", datetime(2026, 3, 1, 3, 15, tzinfo=UTC), datetime(2026, 3, 2, 3, 15, tzinfo=UTC)),
        ("* * * * *", datetime(2026, 3, 1, 12, 0, tzinfo=UTC), datetime(2026, 3, 1, 12, 1, tzinfo=UTC)),
        ("0 13 * * *", datetime(2026, 2, 28, 13, 0, tzinfo=UTC), datetime(2026, 3, 1, 13, 0, tzinfo=UTC)),
        ("0 0 1 1 *", None, datetime(2027, 1, 1, 0, 0, tzinfo=UTC)),  # months ago: not made up for
    ],
)
def test_a_run_is_made_up_for_if_it_was_due_within_a_day(cron: str, last: datetime | None, following: datetime) -> None:
    assert last_due(cron, NOON) == last
    assert next_due(cron, NOON) == following


@pytest.mark.requirement("CARD-05")
def test_schedulers_that_find_the_same_run_due_give_it_the_same_id(database: Database) -> None:
    queue = NotedQueue()
    for moment in (NOON, NOON + timedelta(hours=3)):
        due = last_due("15 3 * * *", moment)
        assert due is not None
        with database.session() as session:
            enqueue_job(session, queue, "drift", due)
    assert set(queue.ids) == {"job drift 2026-03-01T03:15:00+00:00"}
    assert {(call["queue"], call["workflow"], call["argument"]) for call in queue.calls} == {(JOBS, RUN_JOB, "drift")}
    assert workflow_id("drift", NOON) != queue.ids[0]


def test_every_job_has_a_cron_line_that_can_be_read() -> None:
    configured = SchedulerSettings(canary_cron="*/15 * * * *", retraining_cron="0 20 1 */3 *")
    for job in JOB_LIST.values():
        line = job.cron(configured)
        assert next_due(line, NOON) is not None


def test_a_job_that_failed_is_an_alarm_until_it_succeeds(database: Database) -> None:
    steps = JobSteps(database, {"drift": lambda: "2 comparisons"})
    assert steps.park_job("drift", "job", "Permanent: no such table") == "failed"
    with database.reading() as session:
        (alarm,) = open_alarms(session)
    assert (alarm.kind, alarm.subject, alarm.message) == (FAILED, "job:drift", "Permanent: no such table")
    assert steps.run("drift") == "2 comparisons"
    with database.reading() as session:
        assert open_alarms(session) == []
