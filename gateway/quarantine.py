"""A quarantined study (CMP-18): whatever is under way for it stops at its next step, until a person has decided
(gateway/quarantine_release.py).

The steps ask in the transaction in which they would let something go on, so that a conflict that arrives while a
model is at work, or while a result waits for its destination, is seen before anything leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import superseding
from gateway.delivery.bookkeeping import record_delivery
from storage import ledger
from storage.alarms import raise_alarm
from storage.records import (
    Delivery,
    DeliveryState,
    Instance,
    InstanceState,
    Result,
    ResultState,
    Study,
    StudyState,
    utc_now,
)

_ASIDE = (InstanceState.QUARANTINED, InstanceState.CONFLICT, InstanceState.REPLACED)
_WORDS = "the study is quarantined"


def reason_to_stop(session: Session, study_instance_uid: str) -> str | None:
    """Why nothing may be made of this study or sent for it now; None where nothing stands against it."""
    study = session.get_one(Study, study_instance_uid)
    if study.state == StudyState.DELETING:
        return "the study is being deleted"
    if study.state != StudyState.QUARANTINED:
        return None
    return f"{_WORDS}: {study.state_reason or 'a person has to decide'}"


def stopped(reason: str | None) -> bool:
    """Whether a result was held, or a delivery withheld, for this and for nothing else."""
    return reason is not None and reason.startswith(_WORDS)


def hold_result(session: Session, result: Result, reason: str) -> str:
    """The result is HELD with the reason; nothing of it leaves, no notice either."""
    result.state, result.state_reason, result.finished_at = ResultState.HELD, reason, utc_now()
    subject = ledger.study_subject(result.study_instance_uid)
    detail = {"result_id": result.result_id, "reason": reason, "notice_sent": False}
    ledger.append(session, subject=subject, kind="held", actor="worker", detail=detail)
    message = f"{result.model_name} {result.model_version}: {reason}"
    raise_alarm(session, kind=superseding.ALARM_HELD, subject=subject, message=message)
    session.flush()
    superseding.replaced_by_none(session, result)
    return str(ResultState.HELD)


def withhold_delivery(session: Session, result: Result, delivery: Delivery, reason: str) -> None:
    """The delivery is WITHHELD with the reason; what has arrived before stays where it is."""
    delivery.state, delivery.state_reason = DeliveryState.WITHHELD, reason
    delivery.next_attempt_at, delivery.updated_at = None, utc_now()
    record_delivery(session, result, delivery, {})


def objects_aside(session: Session, study_instance_uid: str) -> Sequence[Instance]:
    """Objects of a study that are kept but not used, each with its reason, in the order of their arrival."""
    return session.scalars(
        select(Instance)
        .where(Instance.study_instance_uid == study_instance_uid, Instance.state.in_(_ASIDE))
        .order_by(Instance.object_id)
    ).all()
