"""Step `attempt` of a delivery: one attempt at one destination, its outcome in the row and the ledger.

The circuit of a destination that is down lets one probe through per step of its schedule, so that a backlog of a
thousand results does not knock a thousand times (QUE-29): the delivery at the head of the queue waits in its place,
the others behind it. A delivery that waits for a reason of its own (a patient the EMR does not know yet, an object
the PACS does not show yet) must not hold up the others: it gives its place up and comes back as a new turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import quarantine, study_state
from gateway.delivery.attempt import QUERY_REFUSES, attempt
from gateway.delivery.bookkeeping import cut_short, record_delivery, withheld_words
from gateway.delivery.capability import Learned
from gateway.delivery.contact import AnyDestination, AnyPacs, address_of, claim, destination_row, kind_of, note_contact
from gateway.delivery.destination import Destination
from gateway.delivery.ladder import LadderState, elsewhere, park, requeue, withhold
from gateway.delivery.reported import ObjectsOf, kept_state
from gateway.delivery.reporting import Reporting
from gateway.destination_settings import DestinationSettings, FhirDestination
from gateway.due_work import enqueue_delivery
from gateway.durable import Enqueuer, next_workflow_id
from gateway.parking import park_delivery
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.records import Delivery, DeliveryState, Result, ResultState, utc_now

_FINISHED = {DeliveryState.VERIFIED, DeliveryState.STORED, DeliveryState.PARKED, DeliveryState.WITHHELD}
_ENDED = {DeliveryState.PARKED, DeliveryState.WITHHELD}  # by somebody's decision, whatever is still planned
_UNSENT = {DeliveryState.QUEUED, DeliveryState.SENT}
_WAITS_IN_PLACE_S = 2.0


class Dispatch:
    """The delivery steps of the story."""

    def __init__(
        self,
        *,
        database: Database,
        settings: DestinationSettings,
        pacs: Mapping[str, Destination],
        reporting: Reporting,
        objects_of: ObjectsOf,
        enqueuer: Enqueuer,
    ) -> None:
        self._database = database
        self._settings: dict[str, AnyDestination] = {d.name: d for d in settings.all}
        self._pacs = pacs
        self._reporting = reporting
        self._objects_of = objects_of
        self._enqueuer = enqueuer

    def attempt(self, delivery_id: str, turn: str) -> dict[str, Any]:
        """{"state", "retry_in_s"}; `retry_in_s` None when there is nothing left to do in this turn."""
        now = utc_now()
        with self._database.session() as session:
            delivery = session.get_one(Delivery, delivery_id)
            if delivery.workflow_id != turn:
                return {"state": delivery.state, "retry_in_s": None}  # a later turn has it now
            if delivery.state in _ENDED:
                return _end(delivery)  # also where a next attempt was still planned
            if delivery.state in _FINISHED and delivery.next_attempt_at is None:
                return {"state": delivery.state, "retry_in_s": None}
            destination = self._settings.get(delivery.destination)
            if destination is None:
                words = "destinations.toml no longer names this destination"
                return {"state": park_delivery(session, delivery_id, words), "retry_in_s": None}
            if isinstance(destination, FhirDestination) != (delivery.kind == "fhir"):
                words = _of_another_kind(delivery, destination)
                return {"state": park_delivery(session, delivery_id, words), "retry_in_s": None}
            delivery.kind = kind_of(destination)
            result = session.get_one(Result, delivery.result_id)
            # A report is one message: until its receipt is here, nothing of it is known to have been sent.
            unsent = _UNSENT if isinstance(destination, FhirDestination) else {DeliveryState.QUEUED}
            if result.state == ResultState.SUPERSEDED and delivery.state in unsent:
                return self._withhold(session, delivery, result, result.state_reason or "")
            stop = quarantine.reason_to_stop(session, result.study_instance_uid)
            if stop is not None and delivery.state in (DeliveryState.QUEUED, DeliveryState.SENT):
                return self._withhold(session, delivery, result, stop)
            if isinstance(destination, FhirDestination):
                wait_s = self._reporting.wait_s(session, delivery, now=now)
                if wait_s > 0:
                    return self._wait_for_image(session, delivery, turn, wait_s)
            row = destination_row(session, destination)
            wait_s = claim(session, row, destination)
            if wait_s > 0:
                return {"state": delivery.state, "retry_in_s": wait_s}
            learned = Learned.from_record(row.capability)
            recovered = cut_short(delivery)
            # Counted in the row before anything leaves: an attempt that was cut short is recognised by it.
            delivery.attempts += 1
        if isinstance(destination, FhirDestination):
            outcome = self._reporting.attempt(delivery_id, destination, now=now)
        else:
            outcome = self._send(delivery_id, destination, learned, recovered=recovered)
        away = outcome.pop("away", False)
        if not away and (outcome["retry_in_s"] or 0.0) > _WAITS_IN_PLACE_S:
            with self._database.session() as session:
                delivery = session.get_one(Delivery, delivery_id, with_for_update=True)
                return self._give_way(session, delivery, turn, outcome) if delivery.workflow_id == turn else outcome
        return outcome

    def _wait_for_image(self, session: Session, delivery: Delivery, turn: str, wait_s: float) -> dict[str, Any]:
        """The EMR is not asked meanwhile, so this counts as no attempt."""
        delivery.state_reason = "waits until a PACS has the image that it refers to"
        outcome = {"state": delivery.state, "retry_in_s": wait_s}
        return self._give_way(session, delivery, turn, outcome) if wait_s > _WAITS_IN_PLACE_S else outcome

    def _give_way(self, session: Session, delivery: Delivery, turn: str, outcome: dict[str, Any]) -> dict[str, Any]:
        """Back on the queue for later: what it waits for does not concern the others."""
        delivery.workflow_id = next_workflow_id(turn)
        enqueue_delivery(session, self._enqueuer, delivery, delay_s=float(outcome["retry_in_s"]))
        return {"state": outcome["state"], "retry_in_s": None}

    def _send(self, delivery_id: str, destination: AnyPacs, learned: Learned, *, recovered: bool) -> dict[str, Any]:
        with self._database.reading() as session:
            delivery = session.get_one(Delivery, delivery_id)
            result_id, state = delivery.result_id, _ladder(delivery)
        address = address_of(destination)
        if state.address not in (None, address):  # what has arrived elsewhere says nothing; what is here, it may tell
            state, recovered = elsewhere(state, utc_now()), True
        outcome = attempt(
            self._pacs[destination.name],
            destination,
            lambda encoding: self._objects_of(result_id, encoding),
            replace(state, address=address),
            learned=learned,
            recovered=recovered,
        )
        with self._database.session() as session:
            delivery = session.get_one(Delivery, delivery_id)
            before = delivery.state
            after = _unless_ended(outcome.state, delivery)
            delivery.state, delivery.state_reason = after.state, after.reason or None
            delivery.attempts = after.attempts
            delivery.next_attempt_at, delivery.updated_at = after.next_attempt_at, utc_now()
            delivery.objects = [after.as_dict()]
            row = destination_row(session, destination)
            row.capability = outcome.learned.as_record()
            if outcome.away or outcome.answered:
                note_contact(session, row, away=outcome.away, reason=outcome.state.reason)
            if after.state is DeliveryState.VERIFIED:
                clear_alarms(session, kind=QUERY_REFUSES, subject=f"destination:{destination.name}", by="gateway")
            for alarm in outcome.alarms:
                raise_alarm(session, kind=alarm.kind, subject=alarm.subject, message=alarm.message)
            result = session.get_one(Result, delivery.result_id)
            if delivery.state != before or after.finished:
                record_delivery(session, result, delivery, {"objects": _statuses(after)})
            session.flush()
            study_state.refresh(session, result.study_instance_uid)
            return {"state": delivery.state, "retry_in_s": after.retry_in_s(utc_now()), "away": outcome.away}

    def park_delivery(self, delivery_id: str, step: str, reason: str) -> str:
        """After a failure that is not the destination's: a missing file, an encoding that cannot be made."""
        with self._database.session() as session:
            return park_delivery(session, delivery_id, f"{step}: {reason}")

    def _withhold(self, session: Session, delivery: Delivery, result: Result, reason: str) -> dict[str, Any]:
        words = withheld_words(reason, unknown_end=cut_short(delivery) or delivery.state == DeliveryState.SENT)
        quarantine.withhold_delivery(session, result, delivery, words)
        session.flush()
        study_state.refresh(session, result.study_instance_uid)
        return {"state": delivery.state, "retry_in_s": None}


def awaited_destinations(database: Database) -> list[str]:
    """Destinations that unfinished deliveries wait for, whether or not destinations.toml still names them."""
    with database.reading() as session:
        return list(
            session.scalars(
                select(Delivery.destination)
                .where(Delivery.state.in_([DeliveryState.QUEUED, DeliveryState.SENT, DeliveryState.STORED]))
                .where(Delivery.next_attempt_at.is_not(None))
                .distinct()
                .order_by(Delivery.destination)
            )
        )


def _end(delivery: Delivery) -> dict[str, Any]:
    """Withheld or parked stays so; what an attempt was cut short by is said."""
    delivery.next_attempt_at = None
    if delivery.state == DeliveryState.WITHHELD:
        delivery.state_reason = withheld_words(delivery.state_reason or "", unknown_end=cut_short(delivery))
    return {"state": delivery.state, "retry_in_s": None}


def _unless_ended(state: LadderState, delivery: Delivery) -> LadderState:
    """The attempt's outcome; one that was withheld or parked while the attempt ran does not go on by itself."""
    if delivery.state not in _ENDED or state.finished or state.state not in _UNSENT:
        return state
    reason = delivery.state_reason or ""
    if delivery.state == DeliveryState.PARKED:
        return park(state, reason)
    return withhold(state, withheld_words(reason, unknown_end=state.state is DeliveryState.SENT))


def _ladder(delivery: Delivery) -> LadderState:
    """The kept state of a delivery, or a new one; with new patience where it was put on its queue anew since."""
    state = kept_state(delivery)
    return requeue(state, utc_now()) if state.finished or delivery.queued_at > state.since else state


def _of_another_kind(delivery: Delivery, destination: AnyDestination) -> str:
    return (
        f"destinations.toml now has {destination.name} as {kind_of(destination)}, but this delivery was made for "
        f"{delivery.kind}; give the new destination a name of its own, restore the old one, then say `seggate retry`"
    )


def _statuses(state: LadderState) -> list[dict[str, Any]]:
    return [
        {
            "role": o.role,
            "sop_instance_uid": o.sop_instance_uid,
            "encoding": o.encoding,
            "rung": str(o.rung),
            "status": f"{o.code:04X}" if o.code is not None else None,
            "meaning": o.meaning,
            "checked": o.checked,
        }
        for o in state.objects
    ]
