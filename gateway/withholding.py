"""`seggate withhold`: what is parked for a destination is not sent there any more, because a person said so.

For a destination that was taken out of destinations.toml, or that will never take what it refused. Nothing is deleted;
what was withheld is not put back by `seggate retry`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import study_state
from gateway.delivery.bookkeeping import cut_short, record_delivery, withheld_words
from storage import ledger
from storage.alarms import clear_alarms
from storage.database import Database
from storage.records import Delivery, DeliveryState, Result, StudyState, utc_now


@dataclass(frozen=True, kw_only=True)
class Withheld:
    """What became of one study."""

    study_instance_uid: str
    deliveries: int
    state: str


def withhold_parked(
    database: Database, destination: str, *, reason: str, actor: str, study_instance_uid: str | None = None
) -> list[Withheld]:
    """Withhold all that is parked for a destination, of one study or of all; one entry per study that had something."""
    parked = select(Result.study_instance_uid).join(Delivery, Delivery.result_id == Result.result_id)
    parked = parked.where(Delivery.destination == destination, Delivery.state == DeliveryState.PARKED)
    if study_instance_uid is not None:
        parked = parked.where(Result.study_instance_uid == study_instance_uid)
    with database.reading() as session:
        studies = sorted(set(session.scalars(parked)))
    withheld = []
    for uid in studies:
        with database.session() as session:
            withheld.append(_of_study(session, uid, destination, reason=reason, actor=actor))
    return [w for w in withheld if w.deliveries]


def _of_study(session: Session, study_instance_uid: str, destination: str, *, reason: str, actor: str) -> Withheld:
    deliveries = session.scalars(
        select(Delivery)
        .join(Result, Result.result_id == Delivery.result_id)
        .where(
            Result.study_instance_uid == study_instance_uid,
            Delivery.destination == destination,
            Delivery.state == DeliveryState.PARKED,
        )
        .with_for_update()
    ).all()
    for delivery in deliveries:
        was = delivery.state_reason
        words = withheld_words(f"a person decided: {reason}", unknown_end=cut_short(delivery))
        delivery.state, delivery.state_reason, delivery.updated_at = DeliveryState.WITHHELD, words, utc_now()
        result = session.get_one(Result, delivery.result_id)
        record_delivery(session, result, delivery, {"parked_for": was}, actor=actor)
        for kind in ("delivery-parked", "report-held", "report-not-found"):
            clear_alarms(session, kind=kind, subject=f"delivery:{delivery.delivery_id}", by=actor)
    session.flush()
    state = study_state.refresh(session, study_instance_uid)
    if deliveries and state != StudyState.FAILED:
        clear_alarms(session, kind="parked", subject=ledger.study_subject(study_instance_uid), by=actor)
    return Withheld(study_instance_uid=study_instance_uid, deliveries=len(deliveries), state=str(state))
