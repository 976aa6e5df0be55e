"""What every attempt leaves behind: the destination's circuit, alarms, and the ledger event of the delivery."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from gateway.delivery.retry import Circuit
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.records import Delivery, DestinationState, Result, utc_now

_MAY_HAVE_ARRIVED = "; an earlier attempt was cut short, so it may have arrived"


def note_contact(session: Session, row: DestinationState, *, away: bool, reason: str) -> None:
    """Open the circuit of a destination that is away, close that of one that answered; alarm and clear."""
    now = utc_now()
    circuit = Circuit(is_open=row.circuit == "open", since=row.since, failures=row.failures)
    after = circuit.failed(now) if away else circuit.succeeded(now)
    row.circuit, row.since, row.failures = ("open" if after.is_open else "closed"), after.since, after.failures
    row.last_error = reason if away else row.last_error
    subject = f"destination:{row.name}"
    if away and not circuit.is_open:
        raise_alarm(session, kind="destination-away", subject=subject, message=f"{row.name} does not answer: {reason}")
    if not away:
        for kind in ("destination-away", "destination-refuses"):
            clear_alarms(session, kind=kind, subject=subject, by="gateway")


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


def destination_row(session: Session, name: str) -> DestinationState:
    """What is known of a destination; the row is made at first use."""
    row = session.get(DestinationState, name)
    if row is None:
        row = DestinationState(name=name, circuit="closed", since=utc_now(), failures=0)
        session.add(row)
        session.flush()
    return row
