"""Removes old canary studies: their rows and their files in the spool, and nothing of any other study (OPS-59).

The ledger keeps all of a study's events and says at their end that it was removed; what the run gave stays, too. The
folder is set aside just before the rows go: left in its place without rows, its objects would be indexed again.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.deletion.study_removal import remove_rows
from storage import ledger
from storage.canary_records import CanaryRun
from storage.database import Database
from storage.records import utc_now
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
    ids = remove_rows(session, study_instance_uid)
    detail = {"objects": len(ids.objects), "results": list(ids.results)}
    subject = ledger.study_subject(study_instance_uid)
    ledger.append(session, subject=subject, kind="canary-removed", actor=_BY, detail=detail)
