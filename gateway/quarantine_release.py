"""`seggate release`: a person takes a study out of quarantine (CMP-18).

The objects received first, which gave the study its identity, stay in use; those that differ stay aside, listed with
their reason, and are never deleted. The study goes on from where it stood: what the quarantine stopped is back on its
queue, and what arrived meanwhile is left to assembly. Another object that differs quarantines the study again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import study_state, superseding
from gateway.durable import Enqueuer
from gateway.errors import Rejected
from gateway.intake.reopening import objects_in_use
from gateway.intake.routing import state_after_routing
from gateway.intake.study_index import ALARM_CONFLICT, ALARM_IDENTITY
from gateway.quarantine import objects_aside
from gateway.retrying import resume_stopped, route_again
from storage import alarms, ledger
from storage.database import Database
from storage.records import LedgerEvent, Result, Study, StudyState, StudyVersion

_RELEASED = "quarantine-released"
_UNDER_WAY = (StudyState.WHOLE, StudyState.PROCESSING)


@dataclass(frozen=True, kw_only=True)
class Released:
    """A study that is out of quarantine: where it goes on, and what stays aside or is back on its queue."""

    study_instance_uid: str
    state: str
    objects_aside: int
    routing: int
    results: int
    deliveries: int


def release_quarantine(
    database: Database, enqueuer: Enqueuer, study_instance_uid: str, *, reason: str, actor: str
) -> Released:
    """Take a study out of quarantine and record who did it and why.

    Raises KeyError for an unknown study, Rejected without a reason or where the study is not quarantined (any more).
    """
    reason = reason.strip()
    if not reason:
        raise Rejected("a release needs a reason: it is kept in the ledger")
    # Before the transaction, which other writers wait for.
    lost = _lost_workflow(database, enqueuer, study_instance_uid)
    with database.session() as session:
        study = session.get(Study, study_instance_uid, with_for_update=True)
        if study is None:
            raise KeyError(study_instance_uid)
        if study.state != StudyState.QUARANTINED:
            raise Rejected(_not_quarantined(session, study))
        why_quarantined = study.state_reason
        version = _newest(session, study)
        _set_state(session, study, version)
        routing, results, deliveries = 0, 0, 0
        if version is not None:
            results, deliveries = resume_stopped(session, enqueuer, version.version_id, actor=actor)
            if study.state in _UNDER_WAY and lost == version.workflow_id and not _has_results(session, version):
                route_again(session, enqueuer, version)
                routing = 1
        session.flush()
        study_state.refresh(session, study_instance_uid)
        aside = Counter(str(instance.state) for instance in objects_aside(session, study_instance_uid))
        subject = ledger.study_subject(study_instance_uid)
        detail = {
            "reason": reason,
            "quarantined_for": why_quarantined,
            "state": str(study.state),
            "objects_aside": aside,
            "routing": routing,
            "results": results,
            "deliveries": deliveries,
        }
        ledger.append(session, subject=subject, kind=_RELEASED, actor=actor, detail=detail)
        for kind in (ALARM_IDENTITY, ALARM_CONFLICT, *(("parked",) if routing else ())):
            alarms.clear_alarms(session, kind=kind, subject=subject, by=actor)
        superseding.clear_if_none_is_held(session, study_instance_uid, by=actor)
        return Released(
            study_instance_uid=study_instance_uid,
            state=str(study.state),
            objects_aside=aside.total(),
            routing=routing,
            results=results,
            deliveries=deliveries,
        )


def _set_state(session: Session, study: Study, version: StudyVersion | None) -> None:
    """Where the newest version stands; open, for assembly, where other objects are in use than the version has."""
    if version is None or objects_in_use(session, study.study_instance_uid) != set(version.object_ids):
        study.state, study.state_reason = StudyState.RECEIVING, None
    else:
        study.state, study.state_reason = state_after_routing(session, version)


def _newest(session: Session, study: Study) -> StudyVersion | None:
    return session.scalars(
        select(StudyVersion).where(
            StudyVersion.study_instance_uid == study.study_instance_uid, StudyVersion.number == study.version
        )
    ).first()


def _has_results(session: Session, version: StudyVersion) -> bool:
    return session.scalars(select(Result).where(Result.version_id == version.version_id).limit(1)).first() is not None


def _lost_workflow(database: Database, enqueuer: Enqueuer, study_instance_uid: str) -> str | None:
    """The newest version's workflow where it has ended: a quarantined study cannot be parked, so it left no trace."""
    with database.reading() as session:
        study = session.get(Study, study_instance_uid)
        version = _newest(session, study) if study is not None and study.state == StudyState.QUARANTINED else None
    if version is None or version.workflow_id not in enqueuer.ended([version.workflow_id]):
        return None
    return version.workflow_id


def _not_quarantined(session: Session, study: Study) -> str:
    words = f"study {study.study_instance_uid} is not quarantined; its state is {study.state}"
    last = session.scalars(
        select(LedgerEvent)
        .where(
            LedgerEvent.subject == ledger.study_subject(study.study_instance_uid),
            LedgerEvent.kind == _RELEASED,
        )
        .order_by(LedgerEvent.sequence.desc())
        .limit(1)
    ).first()
    return f"{words} ({last.actor} released it at {last.at:%Y-%m-%d %H:%M:%S} UTC)" if last else words
