"""Opens studies again that got an object after they were declared whole (CMP-17).

The indexer does this as it writes the rows. Here are the objects that were indexed while their study was being
declared, or while a workflow moved the study's state on.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from storage.database import Database
from storage.records import Instance, InstanceState, Study, StudyState, StudyVersion

_SETTLED = (
    StudyState.WHOLE, StudyState.PROCESSING, StudyState.UNMATCHED, StudyState.DELIVERING, StudyState.VERIFIED,
    StudyState.HELD, StudyState.FAILED,
)  # fmt: skip
_SWEEP_REACH = timedelta(hours=1)
_FIRST_SWEEP_REACH = timedelta(days=7)


def reopen_missed(database: Database, *, now: datetime, first: bool) -> list[str]:
    """Returns the Study Instance UIDs that are open again. `first`: look back over the time of a stopped worker."""
    if first:
        recent = or_(
            StudyVersion.declared_at > now - _FIRST_SWEEP_REACH,
            Study.last_received_at > StudyVersion.declared_at,
        )
    else:
        since = now - _SWEEP_REACH
        recent = or_(StudyVersion.declared_at > since, Study.last_received_at > since)
    with database.reading() as session:
        candidates = session.execute(
            select(Study.study_instance_uid, StudyVersion)
            .join(
                StudyVersion,
                (StudyVersion.study_instance_uid == Study.study_instance_uid) & (StudyVersion.number == Study.version),
            )
            .where(Study.state.in_(_SETTLED), recent)
        ).all()
        missed = [(uid, v.number) for uid, v in candidates if objects_in_use(session, uid) - set(v.object_ids)]
    if missed:
        with database.session() as session:
            for uid, number in missed:
                session.execute(
                    update(Study)
                    .where(Study.study_instance_uid == uid, Study.state.in_(_SETTLED), Study.version == number)
                    .values(state=StudyState.RECEIVING, state_reason="objects came after it was declared whole")
                )
    return [uid for uid, _ in missed]


def objects_in_use(session: Session, uid: str) -> set[str]:
    """Object ids of a study, without what is set aside."""
    return set(
        session.scalars(
            select(Instance.object_id).where(
                Instance.study_instance_uid == uid, Instance.state == InstanceState.CURRENT
            )
        )
    )
