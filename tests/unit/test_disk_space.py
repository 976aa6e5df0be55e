"""The alarm of a disk that is full up to the reserve: opened once, cleared when there is space again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.disk_space import ALARM_RESERVE, ReserveWatch
from storage.alarms import open_alarms
from storage.database import Database
from storage.spool import Spool

TOO_MUCH = 1 << 60


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


def _alarms(database: Database) -> list[tuple[str, str, int]]:
    with database.reading() as session:
        return [(a.kind, a.message, a.count) for a in open_alarms(session)]


@pytest.mark.requirement("REC-02")
def test_a_disk_below_the_reserve_is_alarmed_once_until_there_is_space(database: Database, tmp_path: Path) -> None:
    spool = Spool(tmp_path, reserve_bytes=TOO_MUCH)
    watch = ReserveWatch(database, spool, every_s=0)
    for _ in range(3):
        watch.look()
    ((kind, message, count),) = _alarms(database)
    assert (kind, count) == (ALARM_RESERVE, 1)
    assert f"receiver.reserve_mb is {TOO_MUCH >> 20}" in message
    ReserveWatch(database, Spool(tmp_path, reserve_bytes=1)).look()
    assert _alarms(database) == []


def test_a_spool_that_cannot_be_asked_is_alarmed_with_the_reason(database: Database, tmp_path: Path) -> None:
    ReserveWatch(database, Spool(tmp_path / "absent", reserve_bytes=1)).look()
    ((kind, message, _),) = _alarms(database)
    assert kind == ALARM_RESERVE
    assert "absent" in message


def test_the_disk_is_asked_only_now_and_then(database: Database, tmp_path: Path) -> None:
    watch = ReserveWatch(database, Spool(tmp_path, reserve_bytes=1), every_s=3600)
    watch.look()
    watch._spool = Spool(tmp_path, reserve_bytes=TOO_MUCH)
    watch.look()
    assert _alarms(database) == []


def test_the_watch_waits_for_a_database_that_is_away(tmp_path: Path) -> None:
    away = Database(f"sqlite:///{tmp_path}")
    ReserveWatch(away, Spool(tmp_path, reserve_bytes=TOO_MUCH)).look()
    away.close()
