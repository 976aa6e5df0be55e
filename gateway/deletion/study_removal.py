"""Removes all rows of a study, in the caller's transaction: the index, what was made of it, and what was said of it.

The files are the caller's (Spool.set_study_aside), and so is what the ledger says.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, or_, select
from sqlalchemy.orm import Session

from storage import ledger
from storage.deletion_records import LegalHold, PastFacts
from storage.learning_records import Correction, ReviewTask, ShadowRun
from storage.records import (
    Alarm,
    Association,
    Delivery,
    Instance,
    Result,
    ResultObject,
    RoutingDecision,
    Series,
    Study,
    StudyFacts,
    StudyVersion,
)

_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True)
class StudyIds:
    """What a study is known by, besides its UID."""

    objects: tuple[str, ...]
    results: tuple[str, ...]
    deliveries: tuple[str, ...]
    workflows: tuple[str, ...]


def study_ids(session: Session, study_instance_uid: str) -> StudyIds:
    """All ids that lead to rows, files or workflows of the study."""
    of_study = Result.study_instance_uid == study_instance_uid
    results = session.execute(select(Result.result_id, Result.workflow_id).where(of_study)).all()
    ids = [row.result_id for row in results]
    deliveries = session.execute(
        select(Delivery.delivery_id, Delivery.workflow_id).where(Delivery.result_id.in_(ids))
    ).all()
    shadows = session.scalars(select(ShadowRun.workflow_id).where(ShadowRun.result_id.in_(ids))).all()
    versions = session.scalars(
        select(StudyVersion.workflow_id).where(StudyVersion.study_instance_uid == study_instance_uid)
    ).all()
    objects = session.scalars(
        select(Instance.object_id).where(Instance.study_instance_uid == study_instance_uid).order_by(Instance.object_id)
    ).all()
    last = [*versions, *(r.workflow_id for r in results), *(d.workflow_id for d in deliveries), *shadows]
    return StudyIds(
        objects=tuple(objects),
        results=tuple(ids),
        deliveries=tuple(d.delivery_id for d in deliveries),
        workflows=tuple(earlier for workflow_id in last for earlier in _turns(workflow_id)),
    )


def keep_facts(session: Session, results: Sequence[str]) -> int:
    """What drift compares goes on counting, without anything that leads to the study; of how many results."""
    found = session.execute(
        select(StudyFacts, Result.measurements, Result.runtime, Result.verdict)
        .join(Result, Result.result_id == StudyFacts.result_id)
        .where(StudyFacts.result_id.in_(results), Result.verdict.is_not(None))
    ).all()
    kept = [
        {
            "facts_id": f"past-{secrets.token_hex(16)}",
            "model_name": facts.model_name,
            "model_version": facts.model_version,
            "scanner": facts.scanner,
            "recorded_at": facts.recorded_at,
            "acquisition": facts.acquisition,
            "image": facts.image,
            "measurements": measurements,
            "mean_confidence": (runtime or {}).get("mean_confidence"),
            "verdict": verdict,
        }
        for facts, measurements, runtime, verdict in found
    ]
    if kept:
        session.execute(insert(PastFacts), kept)
    return len(kept)


def remove_rows(session: Session, study_instance_uid: str) -> StudyIds:
    """All rows of the study but its events in the ledger: what they were."""
    ids = study_ids(session, study_instance_uid)
    for table in (Delivery, ResultObject, StudyFacts, ShadowRun, Correction):
        for some in _some(ids.results):
            session.execute(delete(table).where(table.result_id.in_(some)))
    session.execute(delete(Result).where(Result.study_instance_uid == study_instance_uid))
    versions = select(StudyVersion.version_id).where(StudyVersion.study_instance_uid == study_instance_uid)
    session.execute(delete(RoutingDecision).where(RoutingDecision.version_id.in_(versions)))
    associations = set(
        session.scalars(select(Instance.association_id).where(Instance.study_instance_uid == study_instance_uid))
    )
    for of_study in (Instance, StudyVersion, Series, LegalHold, Study):
        session.execute(delete(of_study).where(of_study.study_instance_uid == study_instance_uid))
    still_used = set(session.scalars(select(Instance.association_id).where(Instance.association_id.in_(associations))))
    gone = associations - still_used
    session.execute(delete(Association).where(Association.association_id.in_(gone)))
    # An alarm quotes what others answered, and cleared ones stay rows.
    subjects = subjects_of(study_instance_uid, ids)
    session.execute(delete(Alarm).where(or_(*(Alarm.subject.in_(some) for some in _some(subjects)))))
    _leave_tasks(session, set(ids.results))
    return ids


def subjects_of(study_instance_uid: str, ids: StudyIds) -> list[str]:
    """Of the ledger's chains and of alarms that are about this study alone."""
    return [ledger.study_subject(study_instance_uid), *(f"delivery:{delivery_id}" for delivery_id in ids.deliveries)]


def _leave_tasks(session: Session, results: set[str]) -> None:
    """Review tasks no longer name it as an example."""
    if not results:
        return
    for task in session.scalars(select(ReviewTask)).all():
        if results & set(task.result_ids):
            task.result_ids = [result_id for result_id in task.result_ids if result_id not in results]


def _turns(workflow_id: str) -> list[str]:
    """A workflow and those before it: w~2 stands for w, w~1 and w~2 (gateway.durable.next_workflow_id)."""
    stem, _, count = workflow_id.rpartition("~")
    if not stem or not count.isdigit():
        return [workflow_id]
    return [stem, *(f"{stem}~{number}" for number in range(1, int(count) + 1))]


def _some(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE)]
