"""Heartbeats, busy executors, and who is taken over when."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from gateway.heartbeat import ALARM_CLOCK, Heartbeat, executor_id
from storage.alarms import open_alarms
from storage.database import Database
from storage.errors import DatabaseAway
from storage.records import Executor, LedgerEvent, utc_now
from tests.support.waiting import wait_until

_DEAD = "worker@elsewhere"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


class Recovery:
    """Recovers `waiting` workflows of an executor, once."""

    def __init__(self, **waiting: int) -> None:
        self.waiting = {name.replace("_", "@"): count for name, count in waiting.items()}
        self.asked: list[str] = []
        self.fails: Exception | None = None

    def __call__(self, name: str) -> int:
        self.asked.append(name)
        if self.fails is not None:
            raise self.fails
        return self.waiting.pop(name, 0)


def heartbeat(database: Database, recovery: Recovery, *, beat_s: float = 3600.0) -> Heartbeat:
    return Heartbeat(database, role="worker", beat_s=beat_s, takeover_s=30.0, recover=recovery)


def row(database: Database, name: str) -> Executor | None:
    with database.reading() as session:
        return session.get(Executor, name)


def silent(database: Database, name: str, *, role: str = "worker", for_s: float) -> None:
    with database.session() as session:
        then = utc_now() - timedelta(seconds=for_s)
        session.add(Executor(executor_id=name, role=role, host="elsewhere", pid=1, started_at=then, beat_at=then))


def test_an_executor_keeps_its_name_over_restarts_and_several_on_one_host_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert executor_id("worker") == executor_id("worker") == f"worker@{socket.gethostname()}"
    monkeypatch.setenv("SEGGATE_EXECUTOR", "a")
    assert executor_id("worker") == f"worker@{socket.gethostname()}.a"


def test_a_new_start_forgets_what_the_dead_process_was_busy_with(database: Database) -> None:
    name = executor_id("worker")
    with database.session() as session:
        long_ago = utc_now() - timedelta(hours=1)
        session.add(
            Executor(
                executor_id=name, role="worker", host="h", pid=1, started_at=long_ago, beat_at=long_ago,
                busy_with="r0", deadline_at=long_ago, stopped_at=long_ago,
            )
        )  # fmt: skip
    beating = heartbeat(database, Recovery())
    beating.start()
    found = row(database, name)
    assert found is not None
    assert (found.pid, found.busy_with, found.deadline_at, found.stopped_at) == (os.getpid(), None, None, None)
    assert utc_now() - found.beat_at < timedelta(minutes=1)
    beating.stop()
    found = row(database, name)
    assert found is not None
    assert found.stopped_at is not None


def test_of_several_works_the_nearest_deadline_is_shown_until_that_work_is_done(database: Database) -> None:
    beating = heartbeat(database, Recovery())
    beating.start()

    def shown() -> str | None:
        found = row(database, beating.executor_id)
        assert found is not None
        assert (found.busy_with is None) == (found.deadline_at is None)
        return found.busy_with

    beating.busy("long", 100.0)
    beating.busy("short", 10.0)
    assert shown() == "short"
    beating.idle("short")
    assert shown() == "long"
    beating.idle("long")
    assert shown() is None
    beating.stop()


def test_work_that_ends_while_the_database_is_away_leaves_no_deadline_behind(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    beating = heartbeat(database, Recovery())
    beating.start()
    beating.busy("r1", 10.0)
    with monkeypatch.context() as patch:

        def away() -> None:
            raise DatabaseAway("away")

        patch.setattr(database, "session", away)
        beating.idle("r1")
        with pytest.raises(DatabaseAway):
            beating.busy("r2", 10.0)
    beating.beat()
    found = row(database, beating.executor_id)
    assert found is not None
    assert (found.busy_with, found.deadline_at) == (None, None)
    beating.stop()


@pytest.mark.requirement("QUE-28", open="hung driver calls on a real GPU")
def test_only_executors_of_the_role_that_are_silent_for_too_long_are_taken_over(database: Database) -> None:
    silent(database, _DEAD, for_s=31)
    silent(database, "worker@alive", for_s=5)
    silent(database, "delivery@elsewhere", role="delivery", for_s=500)
    recovery = Recovery(worker_elsewhere=2)
    beating = heartbeat(database, recovery)
    assert beating.take_over_dead() == [_DEAD]
    assert recovery.asked == [_DEAD]
    with database.reading() as session:
        (event,) = session.scalars(select(LedgerEvent)).all()
    assert (event.kind, event.detail) == ("takeover", {"dead": _DEAD, "workflows": 2})
    # Nothing left: asked again, for it may have come back and died again, and nothing is recorded.
    assert beating.take_over_dead() == []
    assert row(database, _DEAD) is not None


def test_a_name_without_work_is_forgotten_after_a_week(database: Database) -> None:
    silent(database, _DEAD, for_s=8 * 86400)
    beating = heartbeat(database, Recovery(worker_elsewhere=1))
    beating.take_over_dead()
    assert row(database, _DEAD) is not None
    beating.take_over_dead()
    assert row(database, _DEAD) is None


def test_nothing_is_taken_over_before_work_can_be_executed_here(database: Database) -> None:
    silent(database, _DEAD, for_s=31)
    recovery = Recovery(worker_elsewhere=1)
    beating = heartbeat(database, recovery, beat_s=0.01)
    beating.start()
    first = row(database, beating.executor_id)
    assert first is not None

    def beaten() -> bool:
        found = row(database, beating.executor_id)
        return found is not None and found.beat_at > first.beat_at

    wait_until(beaten, "it beats")
    assert recovery.asked == []
    beating.take_over()
    wait_until(lambda: recovery.asked, "it takes over")
    beating.stop()


def test_the_heart_goes_on_beating_when_a_recovery_fails(database: Database) -> None:
    """Without beats a living worker would be taken for dead and its work done twice."""
    silent(database, _DEAD, for_s=31)
    recovery = Recovery()
    recovery.fails = RuntimeError("the durable engine is in trouble")
    beating = heartbeat(database, recovery, beat_s=0.01)
    beating.take_over()
    beating.start()
    wait_until(lambda: len(recovery.asked) > 2, "it has failed several times")
    beating.stop()


def test_a_dead_executor_whose_clock_was_ahead_is_taken_over_and_a_living_one_is_not(database: Database) -> None:
    silent(database, _DEAD, for_s=-36000)
    silent(database, "worker@alive", for_s=-36000)
    recovery = Recovery(worker_elsewhere=2, worker_alive=1)
    watching = Heartbeat(database, role="worker", beat_s=3600.0, takeover_s=0.2, recover=recovery)

    def taken() -> list[str]:
        with database.session() as session:
            session.get_one(Executor, "worker@alive").beat_at += timedelta(milliseconds=1)
        return watching.take_over_dead()

    assert taken() == []
    assert wait_until(taken, "the silent one is taken over", poll_s=0.02) == [_DEAD]
    with database.reading() as session:
        alarms = {alarm.subject: alarm.count for alarm in open_alarms(session) if alarm.kind == ALARM_CLOCK}
    assert alarms == {f"executor:{_DEAD}": 1, "executor:worker@alive": 1}
