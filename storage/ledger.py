"""The ledger: one append-only, hash-chained list of events per subject (a study, a model, the gateway itself).

Each event's hash covers its content and the hash before it, so that a changed, removed or reordered row is found
by `verify`. An event is written in the same transaction as the change it records.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select, text
from sqlalchemy.orm import Session

from storage.errors import LedgerBroken
from storage.records import LedgerEvent, utc_now

GENESIS = "0" * 64
DELETIONS = "deletions"
"""The chain of what was deleted, which names no study."""


def study_subject(study_instance_uid: str) -> str:
    return f"study:{study_instance_uid}"


def model_subject(name: str) -> str:
    return f"model:{name}"


def hold(session: Session, subject: str) -> None:
    """Two writers to one chain queue up, from here to the end of the transaction; whoever decides by what the chain
    says holds it before reading."""
    if session.get_bind().dialect.name == "postgresql":  # SQLite's BEGIN IMMEDIATE does it already
        session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:subject))"), {"subject": subject})


def append(
    session: Session,
    *,
    subject: str,
    kind: str,
    actor: str,
    detail: Mapping[str, Any] | None = None,
    at: datetime | None = None,
) -> LedgerEvent:
    """Add one event to the end of the subject's chain, inside the caller's transaction."""
    hold(session, subject)
    last = session.scalars(
        select(LedgerEvent).where(LedgerEvent.subject == subject).order_by(LedgerEvent.sequence.desc()).limit(1)
    ).first()
    event = LedgerEvent(
        subject=subject,
        sequence=(last.sequence + 1) if last else 1,
        at=at or utc_now(),
        kind=kind,
        actor=actor,
        detail=json.loads(_canonical(dict(detail or {}))),
        previous_hash=last.hash if last else GENESIS,
    )
    event.hash = _hash(event)
    session.add(event)
    session.flush()
    return event


def erase(session: Session, subjects: Sequence[str]) -> dict[str, Any]:
    """Remove whole chains, inside the caller's transaction, and say what a tombstone may say of them: how many events,
    of which kinds, and the heads of the chains, by which somebody who has an old copy can show that it is genuine.

    A chain has the random ids of objects in it, so that nobody can find out by trying what a head was made from.
    """
    kinds: Counter[str] = Counter()
    heads = []
    for subject in sorted(subjects):
        hold(session, subject)
        chain = events(session, subject)
        if chain:
            kinds.update(event.kind for event in chain)
            heads.append(chain[-1].hash)
            session.execute(delete(LedgerEvent).where(LedgerEvent.subject == subject))
    return {"events": kinds.total(), "kinds": dict(sorted(kinds.items())), "heads": heads}


def events(session: Session, subject: str) -> Sequence[LedgerEvent]:
    """All events of a subject, oldest first."""
    return session.scalars(
        select(LedgerEvent).where(LedgerEvent.subject == subject).order_by(LedgerEvent.sequence)
    ).all()


def verify(session: Session, subject: str | None = None) -> int:
    """Check one chain, or all; returns the number of events. Raises LedgerBroken naming the first bad event."""
    query = select(LedgerEvent).order_by(LedgerEvent.subject, LedgerEvent.sequence)
    if subject is not None:
        query = query.where(LedgerEvent.subject == subject)
    checked, chain, expected_sequence, previous = 0, "", 0, GENESIS
    for event in session.scalars(query).yield_per(1000):
        if event.subject != chain:
            chain, expected_sequence, previous = event.subject, 0, GENESIS
        expected_sequence += 1
        if event.sequence != expected_sequence:
            raise LedgerBroken(f"{chain}: event {expected_sequence} is missing (found {event.sequence})")
        if event.previous_hash != previous or event.hash != _hash(event):
            raise LedgerBroken(f"{chain}: event {event.sequence} ({event.kind}) was changed")
        previous = event.hash
        checked += 1
    return checked


def verify_all(session: Session) -> tuple[int, dict[str, str]]:
    """Check every chain: the number of events in whole chains, and by subject what is wrong with each broken one."""
    checked, broken = 0, {}
    for subject in session.scalars(select(LedgerEvent.subject).distinct().order_by(LedgerEvent.subject)).all():
        try:
            checked += verify(session, subject)
        except LedgerBroken as error:
            broken[subject] = str(error)
    return checked, broken


def _hash(event: LedgerEvent) -> str:
    content = _canonical(
        {
            "subject": event.subject,
            "sequence": event.sequence,
            "at": event.at.isoformat(timespec="microseconds"),
            "kind": event.kind,
            "actor": event.actor,
            "detail": event.detail,
            "previous": event.previous_hash,
        }
    )
    return hashlib.sha256(content.encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
