"""The operator and an open study: what it waits for, "complete now", "wait" (CMP-15)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from gateway.intake.evidence import gather
from gateway.settings import Settings
from storage import ledger
from storage.records import Study, StudyState


def set_wish(session: Session, study_instance_uid: str, wish: str | None, *, actor: str) -> bool:
    """The operator's "complete" or "wait", or None to take it back; False for a study that is not being received."""
    if wish not in {"complete", "wait", None}:
        raise ValueError(f"wish: {wish!r} is neither 'complete' nor 'wait'")
    study = session.get(Study, study_instance_uid, with_for_update=True)
    if study is None or study.state != StudyState.RECEIVING:
        return False
    study.wish = wish
    detail = {"wish": wish}
    ledger.append(
        session, subject=ledger.study_subject(study_instance_uid), kind="operator-wish", actor=actor, detail=detail
    )
    return True


def open_evidence(session: Session, settings: Settings, study_instance_uid: str, now: datetime) -> dict[str, Any]:
    """What speaks for an open study being whole, from the rows alone, and what it waits for (`seggate show`)."""
    study = session.get(Study, study_instance_uid)
    if study is None or study.state != StudyState.RECEIVING:
        return {}
    evidence = gather(session, study)
    return {
        "state_reason": study.state_reason,
        "evidence": evidence.to_json(now) if evidence is not None else None,
        "settings": settings.completeness_of(study.calling_ae).model_dump(),
    }
