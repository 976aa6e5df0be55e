"""What every attempt leaves behind in the delivery's own row and in the ledger."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from storage import ledger
from storage.records import Delivery, Result

_MAY_HAVE_ARRIVED = "; an earlier attempt was cut short, so it may have arrived"


def cut_short(delivery: Delivery) -> bool:
    """Whether an attempt began of which it is not known how it ended: what it sent may have arrived."""
    known = delivery.objects[0].get("attempts", 0) if delivery.objects else 0
    return delivery.attempts > int(known)


def withheld_words(reason: str, *, unknown_end: bool) -> str:
    """The reason of a withheld delivery, which says so where something may have arrived all the same."""
    return reason if not unknown_end or _MAY_HAVE_ARRIVED in reason else f"{reason}{_MAY_HAVE_ARRIVED}"


def record_delivery(session: Session, result: Result, delivery: Delivery, detail: dict[str, Any]) -> None:
    """The ledger event of a delivery: `delivery-<state>`."""
    ledger.append(
        session,
        subject=ledger.study_subject(result.study_instance_uid),
        kind=f"delivery-{delivery.state}",
        actor="delivery",
        detail={
            "result_id": result.result_id,
            "destination": delivery.destination,
            "attempts": delivery.attempts,
            "reason": delivery.state_reason,
            **detail,
        },
    )
