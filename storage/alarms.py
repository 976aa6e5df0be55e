"""Alarms: what a person must look at. Repeats of an open alarm are counted, not multiplied.

A new one is also a line in the log, with its kind and subject only: a message may quote another system's answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.records import Alarm, utc_now

_log = structlog.get_logger(__name__)


def raise_alarm(session: Session, *, kind: str, subject: str, message: str) -> Alarm:
    """Open an alarm, or count one more occurrence of the open one of the same kind and subject."""
    now = utc_now()
    alarm = session.scalars(
        select(Alarm).where(Alarm.kind == kind, Alarm.subject == subject, Alarm.cleared_at.is_(None)).limit(1)
    ).first()
    if alarm is None:
        alarm = Alarm(kind=kind, subject=subject, message=message, raised_at=now, last_at=now, count=1)
        session.add(alarm)
        _log.warning("alarm raised", kind=kind, subject=subject)
    else:
        alarm.message, alarm.last_at, alarm.count = message, now, alarm.count + 1
    session.flush()
    return alarm


def clear_alarms(session: Session, *, kind: str, subject: str, by: str) -> int:
    """Clear the open alarms of a kind and subject; returns how many there were."""
    open_ones = session.scalars(
        select(Alarm).where(Alarm.kind == kind, Alarm.subject == subject, Alarm.cleared_at.is_(None))
    ).all()
    for alarm in open_ones:
        alarm.cleared_at, alarm.cleared_by = utc_now(), by
    return len(open_ones)


def take_on(session: Session, alarm: Alarm, *, by: str, reason: str, until: datetime | None = None) -> None:
    """Somebody has seen to an open alarm: it is quiet until it is cleared, or until then (snoozed)."""
    alarm.seen_at, alarm.seen_by, alarm.seen_reason, alarm.quiet_until = utc_now(), by, reason, until
    session.flush()


def is_quiet(alarm: Alarm, now: datetime) -> bool:
    """Whether nobody needs to be told of an open alarm again."""
    return alarm.seen_at is not None and (alarm.quiet_until is None or alarm.quiet_until > now)


def open_alarms(session: Session) -> Sequence[Alarm]:
    """All open alarms, newest first."""
    return session.scalars(select(Alarm).where(Alarm.cleared_at.is_(None)).order_by(Alarm.last_at.desc())).all()
