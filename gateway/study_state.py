"""The state of a study, derived from its results and deliveries in one place."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import quarantine
from storage.canary_records import CANARY_RULE
from storage.records import Delivery, DeliveryState, Result, ResultState, Study, StudyState, StudyVersion

OF_A_CANARY = "a canary: its result leaves the gateway to nobody"
NOBODY_TO_SEND_TO = "nobody to send it to: destinations.toml names no destination"

# Decided elsewhere; results of an older version do not change them.
_NOT_DERIVED = {StudyState.RECEIVING, StudyState.QUARANTINED, StudyState.WHOLE, StudyState.DELETING}
_UNDER_WAY = {DeliveryState.QUEUED, DeliveryState.SENT}


def refresh(session: Session, study_instance_uid: str) -> StudyState | None:
    """Recompute the state of a study from its newest version's results; returns the state, or None if unknown."""
    study = session.get(Study, study_instance_uid)
    if study is None:
        return None
    current = StudyState(study.state)
    if current in _NOT_DERIVED:
        return current
    version = session.scalars(
        select(StudyVersion).where(
            StudyVersion.study_instance_uid == study_instance_uid, StudyVersion.number == study.version
        )
    ).first()
    if version is None or version.routed_at is None:
        return current
    results = session.scalars(select(Result).where(Result.version_id == version.version_id)).all()
    if not results:
        return current
    deliveries = session.scalars(select(Delivery).where(Delivery.result_id.in_([r.result_id for r in results]))).all()
    study.state, study.state_reason = derived(results, deliveries)
    return StudyState(study.state)


def derived(results: Sequence[Result], deliveries: Sequence[Delivery]) -> tuple[StudyState, str | None]:
    """The worst news first: failed, held, then what is still under way, then verified."""
    states = {r.state for r in results}
    if ResultState.FAILED in states:
        failed = next(r for r in results if r.state == ResultState.FAILED)
        return StudyState.FAILED, failed.state_reason
    if any(d.state == DeliveryState.PARKED for d in deliveries):
        parked = next(d for d in deliveries if d.state == DeliveryState.PARKED)
        return StudyState.FAILED, f"delivery to {parked.destination}: {parked.state_reason}"
    if ResultState.PENDING in states:
        return StudyState.PROCESSING, None
    if ResultState.HELD in states:
        held = next(r for r in results if r.state == ResultState.HELD)
        return StudyState.HELD, held.state_reason
    stopped = next(
        (d for d in deliveries if d.state == DeliveryState.WITHHELD and quarantine.stopped(d.state_reason)), None
    )
    if stopped is not None:
        return StudyState.HELD, f"delivery to {stopped.destination}: {stopped.state_reason}"
    if states <= {ResultState.NOT_RUN, ResultState.SUPERSEDED}:
        reasons = [r.state_reason for r in results if r.state == ResultState.NOT_RUN]
        return StudyState.UNMATCHED, "; ".join(r for r in reasons if r) or None
    # Stored and still to be looked up is under way: only a delivery without a next attempt has ended.
    going = [d for d in deliveries if d.state in _UNDER_WAY or d.next_attempt_at is not None]
    if going:
        return StudyState.DELIVERING, _waits(going)
    if any(r.rule == CANARY_RULE for r in results):
        return StudyState.VERIFIED, OF_A_CANARY
    for released in (r for r in results if r.state == ResultState.RELEASED):
        own = [d for d in deliveries if d.result_id == released.result_id]
        if all(d.state == DeliveryState.WITHHELD for d in own):
            return StudyState.HELD, _kept(own)
    return StudyState.VERIFIED, _unverifiable(deliveries)


def _waits(deliveries: Sequence[Delivery]) -> str | None:
    """What those that had an attempt wait for; of many results the same is said once."""
    reasons = [f"delivery to {d.destination}: {d.state_reason}" for d in deliveries if d.state_reason]
    return "; ".join(sorted(set(reasons))) or None


def _kept(deliveries: Sequence[Delivery]) -> str:
    """Why a released result went to nobody: there is nothing to verify, so it is not called verified."""
    if not deliveries:
        return NOBODY_TO_SEND_TO
    return "; ".join(f"delivery to {d.destination} is withheld: {d.state_reason}" for d in deliveries)


def _unverifiable(deliveries: Sequence[Delivery]) -> str | None:
    """A destination that cannot be queried ends at `stored`; the state says so instead of hiding it."""
    stored = sorted(d.destination for d in deliveries if d.state == DeliveryState.STORED)
    return f"stored, cannot be queried: {', '.join(stored)}" if stored else None
