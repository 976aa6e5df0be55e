"""The disk fills up: intake stops at the reserve, results wait where no room is left. Each has one alarm meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy import select

from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.errors import DatabaseAway, SpoolFull, StorageError
from storage.records import Alarm
from storage.spool import Spool

ALARM = "spool-full"
ALARM_RESERVE = "disk-reserve"
_SUBJECT = "gateway"
_LOOK_EVERY_S = 10.0
_log = structlog.get_logger(__name__)


class ReserveWatch:
    """Keeps the alarm `disk-reserve` open while the spool's free space is below the reserve: nothing is accepted then.

    A spool that cannot be asked counts as too full. Used by one thread.
    """

    def __init__(self, database: Database, spool: Spool, *, every_s: float = _LOOK_EVERY_S) -> None:
        self._database = database
        self._spool = spool
        self._every_s = every_s
        self._next_look = 0.0

    def look(self) -> None:
        """Measure, at most every `every_s`; call it as often as you like."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + self._every_s
        try:
            reserve_mb = self._spool.reserve_bytes >> 20
            free_mb = self._spool.free_bytes() >> 20
            lack = "" if self._spool.has_space() else f"{free_mb} MB free, receiver.reserve_mb is {reserve_mb}"
        except StorageError as error:
            lack = str(error)
        try:
            if bool(lack) == _is_open(self._database, ALARM_RESERVE):
                return
            if not lack:
                _clear(self._database, ALARM_RESERVE)
                return
            with self._database.session() as session:
                message = f"nothing is accepted until there is more space on the disk of the spool: {lack}"
                raise_alarm(session, kind=ALARM_RESERVE, subject=_SUBJECT, message=message)
        except DatabaseAway as error:
            _log.warning("an alarm waits for the database", kind=ALARM_RESERVE, error=str(error))


@contextmanager
def alarmed_when_full(database: Database) -> Iterator[None]:
    """Around the writing of result files: SpoolFull passes through, with the alarm open; a success clears it."""
    try:
        yield
    except SpoolFull as error:
        try:
            with database.session() as session:
                message = f"results wait for space on the disk and go on by themselves: {error}"
                raise_alarm(session, kind=ALARM, subject=_SUBJECT, message=message)
        except DatabaseAway:
            pass  # on the same full disk, perhaps; what is to be waited for is the space
        raise
    if _is_open(database, ALARM):
        _clear(database, ALARM)


def _is_open(database: Database, kind: str) -> bool:
    with database.reading() as session:
        found = session.scalars(select(Alarm.alarm_id).where(Alarm.kind == kind, Alarm.cleared_at.is_(None)))
        return found.first() is not None


def _clear(database: Database, kind: str) -> None:
    with database.session() as session:
        clear_alarms(session, kind=kind, subject=_SUBJECT, by="gateway")
