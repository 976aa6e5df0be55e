"""Which objects a report to an EMR refers to: those that a PACS has (EMR-47, OUT-44).

A report waits until a PACS has the image, because which encoding a PACS takes is known only then. It waits for no PACS
that is away, and not for ever for one that is there: then it names what is on its way, as far as can be foreseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.delivery.capability import Learned
from gateway.delivery.destination import OutgoingObject
from gateway.delivery.ladder import LadderState
from gateway.destination_settings import PacsDestination
from storage.database import Database
from storage.records import Delivery, DeliveryState, DestinationState

ObjectsOf = Callable[[str, str], Sequence[OutgoingObject]]
"""(result_id, encoding) → the objects to send in that encoding, image first, encoded when first asked for."""

PATIENCE_S = 600.0
_FIRST_LOOK_S = 0.1  # a PACS that is well has the image within tenths of a second
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class _Way:
    """One delivery to a PACS, and how far it is."""

    delivery: Delivery
    state: LadderState

    @property
    def ended(self) -> bool:
        """All has arrived, or nothing more does without a person."""
        return self.delivery.state not in (DeliveryState.QUEUED, DeliveryState.SENT)


def taken_by_a_pacs(session: Session, result_id: str) -> tuple[str, ...]:
    """SOP Instance UIDs of what a PACS has of a result, image first; of several PACS the one that has most."""
    return max((w.state.taken for w in _ways(session, result_id) if w.ended), key=len, default=())


class ReportedObjects:
    """`pacs`: the configured destinations, in the order of destinations.toml."""

    def __init__(self, *, database: Database, pacs: Sequence[PacsDestination], objects_of: ObjectsOf) -> None:
        self._database = database
        self._pacs = pacs
        self._objects_of = objects_of

    def wait_s(self, session: Session, report: Delivery, *, now: datetime) -> float:
        """Seconds after which a report looks again whether a PACS has its image; 0: it does not wait (any more)."""
        waited_s = abs(now - report.queued_at).total_seconds()  # abs: the clock was set back, or is another host's
        if report.state != DeliveryState.QUEUED or waited_s >= PATIENCE_S:
            return 0.0
        ways = _ways(session, report.result_id)
        has_it = any(w.ended and w.state.taken for w in ways)
        if has_it or all(w.ended or _is_away(session, w.delivery.destination) for w in ways):
            return 0.0
        return min(_LONGEST_WAIT_S, max(_FIRST_LOOK_S, waited_s / 2))

    def objects(self, result_id: str, *, now: datetime) -> Sequence[OutgoingObject]:
        """Image first. What a PACS has; else what the first PACS that still waits for it will be sent next.

        Where nothing goes to a PACS it is the encoding that every result can be written in; where all of them have
        ended without taking anything, nothing. Raises what `objects_of` raises.
        """
        with self._database.reading() as session:
            encoding, wanted = self._choice(session, result_id, now)
        return [o for o in self._objects_of(result_id, encoding) if wanted(o)] if encoding else ()

    def _choice(
        self, session: Session, result_id: str, now: datetime
    ) -> tuple[str | None, Callable[[OutgoingObject], bool]]:
        """The encoding, if any, and which of its objects."""
        ways, taken = _ways(session, result_id), taken_by_a_pacs(session, result_id)
        if taken:
            state = next(w.state for w in ways if w.state.taken == taken)
            return state.encoding, lambda item: item.sop_instance_uid in taken
        if not ways:
            return "BINARY", lambda _: True
        waiting = {w.delivery.destination: w.state for w in ways if not w.ended}
        pacs = next((d for d in self._pacs if d.name in waiting), None)
        if pacs is None:
            return None, lambda _: False
        foreseen = waiting[pacs.name].encoding or self._foreseen(session, pacs, waiting[pacs.name], now)
        return foreseen, lambda item: pacs.send_sr or item.role != "SR"

    @staticmethod
    def _foreseen(session: Session, pacs: PacsDestination, state: LadderState, now: datetime) -> str | None:
        row = session.get(DestinationState, pacs.name)
        learned = Learned.from_record(row.capability if row else None)
        return learned.choose(pacs.encodings, now, refused=state.refused)


def _ways(session: Session, result_id: str) -> list[_Way]:
    deliveries = session.scalars(
        select(Delivery)
        .where(Delivery.result_id == result_id, Delivery.kind != "fhir")
        .order_by(Delivery.queued_at, Delivery.destination)
    )
    return [_Way(delivery=d, state=kept_state(d)) for d in deliveries]


def kept_state(delivery: Delivery) -> LadderState:
    """The ladder of a delivery to a PACS as its row has it, or a new one."""
    if not delivery.objects:
        return LadderState.new(delivery.delivery_id, delivery.queued_at)
    return LadderState.from_dict(delivery.objects[0])


def _is_away(session: Session, destination: str) -> bool:
    row = session.get(DestinationState, destination)
    return row is not None and row.circuit == "open"
