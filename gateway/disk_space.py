"""Results that find no room on the disk wait, with one alarm, and go on by themselves when there is some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import select

from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.errors import DatabaseAway, SpoolFull
from storage.records import Alarm

ALARM = "spool-full"
_SUBJECT = "gateway"


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
    with database.reading() as session:
        is_open = session.scalars(select(Alarm.alarm_id).where(Alarm.kind == ALARM, Alarm.cleared_at.is_(None))).first()
    if is_open is not None:
        with database.session() as session:
            clear_alarms(session, kind=ALARM, subject=_SUBJECT, by="gateway")
