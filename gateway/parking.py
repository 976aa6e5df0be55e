"""Parking: work that goes no further is FAILED with step and reason, recorded and alarmed; `seggate retry` resumes it.

Each function works in the caller's transaction and does nothing for work that is finished or parked already.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from gateway import study_state
from gateway.delivery.bookkeeping import record_delivery
from storage import ledger
from storage.alarms import raise_alarm
from storage.records import (
    Delivery,
    DeliveryState,
    Result,
    ResultState,
    Study,
    StudyState,
    StudyVersion,
    utc_now,
)

DELETED = "deleted"
"""Its study was deleted while it was at work (gateway/deletion/deletions.py): there is nothing to park."""


def park_study(session: Session, version_id: str, step: str, reason: str) -> str:
    """The study is FAILED, unless a newer version of it has been declared or it is parked already."""
    version = session.get(StudyVersion, version_id)
    if version is None:
        return DELETED
    study = session.get_one(Study, version.study_instance_uid)
    words = f"{step}: {reason}"
    if study.version != version.number or study.state not in (StudyState.WHOLE, StudyState.PROCESSING):
        return str(study.state)
    study.state, study.state_reason = StudyState.FAILED, words
    subject = ledger.study_subject(study.study_instance_uid)
    detail = {"version": version.number, "step": step, "reason": reason}
    ledger.append(session, subject=subject, kind="parked", actor="worker", detail=detail)
    raise_alarm(session, kind="parked", subject=subject, message=words)
    return "parked"


def park_result(session: Session, result_id: str, step: str, reason: str) -> str:
    """The result is FAILED; what was computed is kept."""
    result = session.get(Result, result_id, with_for_update=True)
    if result is None:
        return DELETED
    if result.state != ResultState.PENDING:
        return str(result.state)
    words = f"{step}: {reason}"
    result.state, result.state_reason, result.finished_at = ResultState.FAILED, words, utc_now()
    subject = ledger.study_subject(result.study_instance_uid)
    detail = {"result_id": result_id, "step": step, "reason": reason}
    ledger.append(session, subject=subject, kind="parked", actor="worker", detail=detail)
    raise_alarm(session, kind="parked", subject=subject, message=words)
    session.flush()
    study_state.refresh(session, result.study_instance_uid)
    return "parked"


def park_delivery(session: Session, delivery_id: str, reason: str) -> str:
    """The delivery is PARKED; the other destinations of the result go on."""
    delivery = session.get(Delivery, delivery_id)
    if delivery is None:
        return DELETED
    if delivery.next_attempt_at is None and delivery.state not in (DeliveryState.QUEUED, DeliveryState.SENT):
        return str(delivery.state)
    delivery.state, delivery.state_reason = DeliveryState.PARKED, reason
    delivery.next_attempt_at, delivery.updated_at = None, utc_now()
    result = session.get_one(Result, delivery.result_id)
    record_delivery(session, result, delivery, {})
    subject = ledger.study_subject(result.study_instance_uid)
    raise_alarm(session, kind="parked", subject=subject, message=f"delivery to {delivery.destination}: {reason}")
    session.flush()
    study_state.refresh(session, result.study_instance_uid)
    return str(delivery.state)
