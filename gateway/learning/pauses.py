"""Pausing a model: it runs on no new study, what is ordered meanwhile waits as HELD, and runs when it is resumed.

Nothing of a study is lost or overtaken by the pause: older results stay what they are until the new one is there. A
waiting result was ordered for the version that served then. Where another one serves when the model is resumed, the
study is ordered again for that one.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import study_state, superseding
from gateway.due_work import enqueue_result
from gateway.durable import Enqueuer, next_workflow_id
from gateway.errors import Rejected
from gateway.retrying import route_again
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.learning_records import ModelPause, ServingPeriod
from storage.records import Result, ResultState, Study, StudyState, StudyVersion, utc_now

ALARM = "model-paused"
_WORDS = "model paused"
_UNDECIDED = (StudyState.RECEIVING, StudyState.QUARANTINED, StudyState.WHOLE)


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """`results` are back on their queue, `studies` are ordered again for the version that serves now."""

    results: int
    studies: int


def pause(session: Session, name: str, *, by: str, reason: str) -> ModelPause:
    """From now on nothing is begun for the model; one that is paused stays so, for its first reason. Raises Rejected
    without a reason."""
    reason = reason.strip()
    if not reason:
        raise Rejected("a pause needs a reason: it is kept in the ledger, and each study that waits says it")
    found = session.get(ModelPause, name)
    if found is not None:
        return found
    found = ModelPause(model_name=name, since=utc_now(), by=by, reason=reason)
    session.add(found)
    subject = ledger.model_subject(name)
    ledger.append(session, subject=subject, kind="model-paused", actor=by, detail={"reason": reason})
    message = f"{by} paused the model: {reason}. New studies wait; `seggate models resume {name}` lets them run"
    raise_alarm(session, kind=ALARM, subject=subject, message=message)
    session.flush()
    return found


def resume(session: Session, enqueuer: Enqueuer, name: str, *, by: str) -> Resumed:
    """Everything that waits is back on its queue, oldest first. Raises Rejected where the model is not paused."""
    found = session.get(ModelPause, name, with_for_update=True)
    if found is None:
        raise Rejected(f"the model {name} is not paused")
    # First: an order that is being written holds the row until it is, and so is among those that wait.
    session.delete(found)
    session.flush()
    serves = session.scalars(
        select(ServingPeriod.model_version)
        .where(ServingPeriod.model_name == name, ServingPeriod.ended_at.is_(None))
        .limit(1)
    ).first()
    waiting = session.scalars(
        select(Result)
        .where(
            Result.model_name == name,
            Result.state == ResultState.HELD,
            Result.state_reason.startswith(_WORDS, autoescape=True),
        )
        .order_by(Result.created_at, Result.result_id)
    ).all()
    studies: set[str] = set()
    going_on = 0
    for result in waiting:
        if serves not in (None, result.model_version) and _order_again(session, enqueuer, result, studies):
            continue
        going_on += 1
        result.state, result.state_reason, result.attempts = ResultState.PENDING, None, 0
        result.workflow_id = next_workflow_id(result.workflow_id)
        enqueue_result(session, enqueuer, result)
    session.flush()
    for study_instance_uid in dict.fromkeys(result.study_instance_uid for result in waiting):
        study_state.refresh(session, study_instance_uid)
        superseding.clear_if_none_is_held(session, study_instance_uid, by=by)
    subject = ledger.model_subject(name)
    resumed = Resumed(results=going_on, studies=len(studies))
    detail = {"reason_was": found.reason, "results": resumed.results, "ordered_again": resumed.studies}
    ledger.append(session, subject=subject, kind="model-resumed", actor=by, detail=detail)
    clear_alarms(session, kind=ALARM, subject=subject, by=by)
    return resumed


def is_paused(session: Session, name: str) -> bool:
    return session.get(ModelPause, name) is not None


def reason_to_wait(session: Session, name: str) -> str | None:
    """Why nothing may be begun for the model now; None where it is not paused. Keeps `resume` waiting until the
    caller's transaction ends, so that it sees what was held."""
    reason = session.scalars(
        select(ModelPause.reason).where(ModelPause.model_name == name).with_for_update(read=True)
    ).first()
    return None if reason is None else f"{_WORDS}: {reason}"


def hold_result(session: Session, result: Result, reason: str) -> str:
    """The result waits as HELD. What an older version of its study has stays: it is not overtaken yet."""
    result.state, result.state_reason = ResultState.HELD, reason
    subject = ledger.study_subject(result.study_instance_uid)
    detail = {"result_id": result.result_id, "reason": reason}
    ledger.append(session, subject=subject, kind="waits-for-model", actor="worker", detail=detail)
    session.flush()
    study_state.refresh(session, result.study_instance_uid)
    return str(ResultState.HELD)


def _order_again(session: Session, enqueuer: Enqueuer, result: Result, studies: set[str]) -> bool:
    """Nothing was made of the result, so its row gives way to one of the version that serves. False where the study is
    not the newest version's, or about to be judged anyway: then the row itself goes on."""
    study = session.get_one(Study, result.study_instance_uid)
    version = session.get_one(StudyVersion, result.version_id)
    again = study.study_instance_uid in studies
    if study.version != version.number or (study.state in _UNDECIDED and not again):
        return False
    session.delete(result)
    if not again:
        studies.add(study.study_instance_uid)
        study.state, study.state_reason = StudyState.WHOLE, None
        route_again(session, enqueuer, version)
    return True
