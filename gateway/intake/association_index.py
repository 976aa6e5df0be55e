"""Rows for association events: who sent when, how the association ended, who was refused."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from storage import ledger
from storage.records import Association, Instance, Refusal

_MAX_REFUSALS = 2000  # rows; more different ones (a flood with invented names) are counted under "*"
_FOLDED = "*"
_ACTOR = "indexer"


def apply_event(session: Session, kind: str, detail: dict[str, Any]) -> None:
    """Write the rows of one event; repeating it changes nothing. Raises KeyError, ValueError for a damaged event."""
    if kind == "opened":
        _association(session, detail)
    elif kind == "ended":
        _ended(session, detail)
    elif kind == "refused":
        for refusal in detail["refusals"]:
            _refused(session, refusal)
    elif kind == "started":
        _lost_before(session, datetime.fromisoformat(detail["at"]))
    else:
        raise ValueError(f"unknown kind of event {kind!r}")


def _association(session: Session, detail: dict[str, Any]) -> Association:
    association = session.get(Association, detail["association_id"])
    if association is None:
        association = Association(
            association_id=detail["association_id"],
            calling_ae=detail["calling_ae"],
            called_ae=detail["called_ae"],
            peer_address=detail["peer_address"],
            opened_at=datetime.fromisoformat(detail["opened_at"]),
            instances=0,
        )
        session.add(association)
        session.flush()
    return association


def _ended(session: Session, detail: dict[str, Any]) -> None:
    association = _association(session, detail)
    if association.ended == detail["ended"]:
        return
    association.ended = detail["ended"]
    association.ended_at = datetime.fromisoformat(detail["ended_at"])
    _record_received(session, association)


def _lost_before(session: Session, started_at: datetime) -> None:
    """A receiver that starts has no open associations: those of its predecessor are lost."""
    open_ones = session.scalars(
        select(Association).where(Association.ended.is_(None), Association.opened_at < started_at)
    ).all()
    for association in open_ones:
        association.ended, association.ended_at = "lost", started_at
        _record_received(session, association)


def _record_received(session: Session, association: Association) -> None:
    """One ledger event per study that the association brought objects of, with the counts per series and state."""
    session.flush()
    counts = session.execute(
        select(Instance.study_instance_uid, Instance.series_instance_uid, Instance.state, func.count())
        .where(Instance.association_id == association.association_id, Instance.study_instance_uid.is_not(None))
        .group_by(Instance.study_instance_uid, Instance.series_instance_uid, Instance.state)
    ).all()
    studies: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for study_uid, series_uid, state, count in counts:
        studies[str(study_uid)][str(series_uid)][str(state)] = count
    for study_uid, series in sorted(studies.items()):
        ledger.append(
            session,
            subject=ledger.study_subject(study_uid),
            kind="received",
            actor=_ACTOR,
            detail={
                "association_id": association.association_id,
                "calling_ae": association.calling_ae,
                "called_ae": association.called_ae,
                "peer_address": association.peer_address,
                "opened_at": association.opened_at.isoformat(),
                "ended": association.ended,
                "series": [{"series_instance_uid": uid, **states} for uid, states in sorted(series.items())],
            },
        )


def _refused(session: Session, refusal: dict[str, Any]) -> None:
    key = {name: str(refusal[name]) for name in ("kind", "calling_ae", "called_ae", "peer_address", "reason")}
    first_at, last_at = (datetime.fromisoformat(refusal[name]) for name in ("first_at", "last_at"))
    row = _refusal_row(session, key)
    if row is None and (session.scalar(select(func.count()).select_from(Refusal)) or 0) >= _MAX_REFUSALS:
        key |= {"calling_ae": _FOLDED, "called_ae": _FOLDED, "peer_address": _FOLDED}
        row = _refusal_row(session, key)
    if row is None:
        session.add(Refusal(**key, first_at=first_at, last_at=last_at, count=int(refusal["count"])))
        session.flush()
    elif row.last_at < last_at:  # an event that was counted before its file was removed is not counted again
        session.execute(
            update(Refusal)
            .where(Refusal.refusal_id == row.refusal_id)
            .values(count=Refusal.count + int(refusal["count"]), last_at=last_at)
        )


def _refusal_row(session: Session, key: dict[str, str]) -> Refusal | None:
    return session.scalars(select(Refusal).filter_by(**key)).first()
