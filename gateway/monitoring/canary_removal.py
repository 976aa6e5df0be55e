"""Removes old canary studies: their rows and their files in the spool, and nothing of any other study (OPS-59).

The ledger keeps all of a study's events and says at their end that it was removed; what the run gave stays, too. The
folder is set aside just before the rows go: left in its place without rows, its objects would be indexed again.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from storage import alarms, ledger
from storage.canary_records import CanaryRun
from storage.database import Database
from storage.learning_records import Correction, ShadowRun
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
    utc_now,
)
from storage.spool import Spool, study_key

_BY = "canary"


def remove_old(database: Database, spool: Spool, *, keep_days: int, now: datetime | None = None) -> int:
    """Remove canaries that were judged and are older; how many. Repeated, it finishes what was begun. Raises
    DatabaseAway, SpoolUnsafe."""
    before = (now or utc_now()) - timedelta(days=keep_days)
    with database.reading() as session:
        old = session.scalars(
            select(CanaryRun.study_instance_uid)
            .where(CanaryRun.removed_at.is_(None), CanaryRun.judged_at.is_not(None), CanaryRun.started_at < before)
            .order_by(CanaryRun.started_at)
        ).all()
    for study_instance_uid in old:
        with database.session() as session:
            run = session.get_one(CanaryRun, study_instance_uid, with_for_update=True)
            _remove_rows(session, study_instance_uid)
            spool.set_study_aside(study_key(study_instance_uid))
            run.removed_at = utc_now()
    spool.sweep_studies_aside()
    return len(old)


def _remove_rows(session: Session, study_instance_uid: str) -> None:
    """All rows of the study but its events and its run."""
    results = session.scalars(select(Result.result_id).where(Result.study_instance_uid == study_instance_uid)).all()
    for table in (Delivery, ResultObject, StudyFacts, ShadowRun, Correction):
        session.execute(delete(table).where(table.result_id.in_(results)))
    session.execute(delete(Result).where(Result.study_instance_uid == study_instance_uid))
    versions = select(StudyVersion.version_id).where(StudyVersion.study_instance_uid == study_instance_uid)
    session.execute(delete(RoutingDecision).where(RoutingDecision.version_id.in_(versions)))
    objects = session.scalars(
        select(Instance.association_id).where(Instance.study_instance_uid == study_instance_uid)
    ).all()
    associations = set(objects)
    for of_study in (Instance, StudyVersion, Series, Study):
        session.execute(delete(of_study).where(of_study.study_instance_uid == study_instance_uid))
    still_used = set(session.scalars(select(Instance.association_id).where(Instance.association_id.in_(associations))))
    session.execute(delete(Association).where(Association.association_id.in_(associations - still_used)))
    subject = ledger.study_subject(study_instance_uid)
    for kind in session.scalars(select(Alarm.kind).where(Alarm.subject == subject, Alarm.cleared_at.is_(None))).all():
        alarms.clear_alarms(session, kind=kind, subject=subject, by=_BY)
    detail = {"objects": len(objects), "results": list(results)}
    ledger.append(session, subject=subject, kind="canary-removed", actor=_BY, detail=detail)
