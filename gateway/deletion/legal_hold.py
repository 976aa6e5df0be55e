"""Legal hold: a study that nobody deletes until somebody lifts it (OPS-57)."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.errors import Rejected
from storage import ledger
from storage.deletion_records import LegalHold
from storage.records import Study, StudyState, utc_now


def hold_study(session: Session, study_instance_uid: str, *, by: str, reason: str) -> LegalHold:
    """From now on it stays. Raises KeyError for an unknown study; Rejected without a reason, for one that is held
    already, and for one that is being deleted."""
    reason = reason.strip()
    if not reason:
        raise Rejected("a legal hold needs a reason: it is kept in the ledger")
    study = session.get(Study, study_instance_uid, with_for_update=True)
    if study is None:
        raise KeyError(study_instance_uid)
    if study.state == StudyState.DELETING:
        raise Rejected(f"study {study_instance_uid} is being deleted: it is too late for a hold")
    known = session.get(LegalHold, study_instance_uid)
    if known is not None:
        raise Rejected(f"study {study_instance_uid} is held by {known.by} already: {known.reason}")
    made = LegalHold(study_instance_uid=study_instance_uid, since=utc_now(), by=by, reason=reason)
    session.add(made)
    session.flush()
    _record(session, study_instance_uid, "legal-hold", by, reason)
    return made


def lift_hold(session: Session, study_instance_uid: str, *, by: str, reason: str) -> None:
    """It may be deleted again. Raises Rejected without a reason, and where there is no hold."""
    reason = reason.strip()
    if not reason:
        raise Rejected("lifting a legal hold needs a reason: it is kept in the ledger")
    known = session.get(LegalHold, study_instance_uid, with_for_update=True)
    if known is None:
        raise Rejected(f"study {study_instance_uid} is under no legal hold")
    session.delete(known)
    session.flush()
    _record(session, study_instance_uid, "legal-hold-lifted", by, reason)


def legal_holds(session: Session) -> Sequence[LegalHold]:
    """All of them, oldest first."""
    return session.scalars(select(LegalHold).order_by(LegalHold.since, LegalHold.study_instance_uid)).all()


def _record(session: Session, study_instance_uid: str, kind: str, by: str, reason: str) -> None:
    subject = ledger.study_subject(study_instance_uid)
    ledger.append(session, subject=subject, kind=kind, actor=by, detail={"reason": reason})
