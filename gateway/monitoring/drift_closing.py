"""What was told of a version's drift ends with its service: reference and windows start anew with what serves next.

Alarms are cleared and review tasks closed, both with the reason; the model's ledger keeps which.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.monitoring.review_tasks import close_task
from storage import ledger
from storage.learning_records import ReviewTask
from storage.records import Alarm, utc_now

DRIFT, TRAINING_DATA = "drift", "training-data"
"""Kinds of alarms and review tasks."""
_LONGEST_SUBJECT = 160


def drift_subject(name: str, version: str, scanner: str | None) -> str:
    """Of alarms and review tasks; `scanner` None: all together."""
    subject = f"model:{name} {version}"
    return (subject if scanner is None else f"{subject} on {scanner}")[:_LONGEST_SUBJECT]


def close_drift_of(session: Session, name: str, version: str, *, by: str, reason: str) -> int:
    """Close what is open of a version that no longer serves, in the caller's transaction; how many alarms there were.

    An event only where there were any. The caller holds the model's chain (`storage.ledger.hold`)."""
    whole = drift_subject(name, version, None)
    kinds = (DRIFT, TRAINING_DATA)
    alarms = session.scalars(
        select(Alarm)
        .where(
            Alarm.kind.in_(kinds),
            (Alarm.subject == whole) | Alarm.subject.startswith(f"{whole} on ", autoescape=True),
            Alarm.cleared_at.is_(None),
        )
        .order_by(Alarm.alarm_id)
    ).all()
    for alarm in alarms:
        alarm.cleared_at, alarm.cleared_by = utc_now(), by
    tasks = session.scalars(
        select(ReviewTask.task_id)
        .where(
            ReviewTask.kind.in_(kinds),
            ReviewTask.model_name == name,
            ReviewTask.model_version == version,
            ReviewTask.closed_at.is_(None),
        )
        .order_by(ReviewTask.task_id)
    ).all()
    outcome = f"{reason}; reference and windows start anew"
    for task_id in tasks:
        close_task(session, task_id, by=by, outcome=outcome)
    if alarms:
        ledger.append(
            session,
            subject=ledger.model_subject(name),
            kind="drift-alarms-closed",
            actor=by,
            detail={
                "semver": version,
                "reason": outcome,
                "alarms": [
                    {"kind": alarm.kind, "subject": alarm.subject, "message": alarm.message} for alarm in alarms
                ],
            },
        )
    return len(alarms)
