"""One attempt to deliver one result to one PACS: choose, send, fall back, read back.

The workflow calls `attempt` in a durable step, writes the outcome, sleeps `retry_in_s` durably and calls again until
`finished`. Nothing that is stored is sent again; where the outcome of a sending is unknown, the destination is asked
first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from gateway.delivery.capability import Learned
from gateway.delivery.destination import (
    Destination,
    DestinationAway,
    DestinationRefuses,
    ObjectStatus,
    OutgoingObject,
)
from gateway.delivery.ladder import LadderState, Rung, advance, heard, park, prepared, settled, withhold
from gateway.delivery.status import concerns_the_class
from gateway.settings import PacsDestination
from storage.records import DeliveryState, utc_now

DESTINATION_REFUSES, FALLBACK_ENCODING = "destination-refuses", "fallback-encoding"
QUERY_REFUSES = "query-refuses"
"""Alarm: objects are taken, but asking for them is not allowed; cleared by the next delivery that is verified."""

ObjectsByEncoding = Callable[[str], Sequence[OutgoingObject]]


@dataclass(frozen=True, kw_only=True)
class AlarmToRaise:
    """Something for a person, raised once per kind and subject until cleared."""

    kind: str
    subject: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Attempted:
    """What one attempt brought. `away`: the destination took nothing because it was not there, so its circuit opens.

    `answered`: it answered at least once. Neither holds where only the asking failed: the query service may be another
    machine, and says nothing on whether objects are taken.
    """

    state: LadderState
    learned: Learned
    alarms: tuple[AlarmToRaise, ...]
    away: bool
    answered: bool


def attempt(
    destination: Destination,
    settings: PacsDestination,
    objects_by_encoding: ObjectsByEncoding,
    state: LadderState,
    *,
    learned: Learned,
    recovered: bool = False,
    clock: Callable[[], datetime] = utc_now,
) -> Attempted:
    """The state after one attempt, what was learned of the destination, and what to alarm.

    `objects_by_encoding` gives the objects of the result in an encoding, in the order in which they are to be sent:
    the image first, so that the report that refers to it leaves only after it was stored. It is called only for
    encodings that are tried. `recovered`: this attempt may repeat one that was cut short, so the destination is asked
    before anything is sent.

    The destination's troubles are part of the state. Raises what `objects_by_encoding` raises, Permanent when a file
    is not the object it should be, storage.errors.ObjectChanged or ObjectMissing when it was altered or is gone.
    """
    if state.finished:
        return Attempted(state=state, learned=learned, alarms=(), away=False, answered=False)
    run = _Run(destination, settings, objects_by_encoding, learned, recovered, clock)
    return run.through(replace(state, attempts=state.attempts + 1))


class _Run:
    """The parts of one attempt share where they send, what was learned, and what is to be alarmed."""

    def __init__(
        self,
        destination: Destination,
        settings: PacsDestination,
        objects_by_encoding: ObjectsByEncoding,
        learned: Learned,
        recovered: bool,
        clock: Callable[[], datetime],
    ) -> None:
        self._destination = destination
        self._settings = settings
        self._objects_by_encoding = objects_by_encoding
        self._learned = learned
        self._recovered = recovered
        self._clock = clock
        self._alarms: list[AlarmToRaise] = []
        self._answered = False
        self._asking = False
        self._state: LadderState

    def through(self, state: LadderState) -> Attempted:
        self._state = state
        away = False
        try:
            while not self._state.finished:
                encoding = self._state.encoding or self._learned.choose(
                    self._settings.encodings, self._clock(), refused=self._state.refused
                )
                if encoding is None:
                    self._state = park(self._state, f"no encoding left for {self._destination.name}")
                    break
                self._deliver(encoding)
                if self._state.encoding is not None:
                    break
                self._fell_back_from(encoding)
        except (DestinationAway, DestinationRefuses) as error:
            away = not self._answered and not self._asking
            self._state = advance(self._state, error, now=self._clock(), settings=self._settings)
            if isinstance(error, DestinationRefuses):
                self._alarm(
                    QUERY_REFUSES if self._asking else DESTINATION_REFUSES,
                    f"destination:{self._destination.name}",
                    f"{error}. Results wait and go out by themselves once it is settled.",
                )
        if self._state.state is DeliveryState.PARKED:
            self._alarm(
                "delivery-parked",
                f"delivery:{self._state.delivery_id}",
                f"A delivery to {self._destination.name} is parked: {self._state.reason}",
            )
        return Attempted(
            state=self._state,
            learned=self._learned,
            alarms=tuple(self._alarms),
            away=away,
            answered=self._answered,
        )

    def _deliver(self, encoding: str) -> None:
        """Ask where it is unknown, send what is not there, read back what was stored; then judge."""
        objects = [o for o in self._objects_by_encoding(encoding) if o.role != "SR" or self._settings.send_sr]
        self._state = prepared(self._state, encoding, objects)
        if not objects:
            self._state = withhold(self._state, "nothing to send: the only object is a report and send_sr is false")
            return
        self._verify([o for o in objects if self._unclear(o)])
        unsent = [o for o in objects if self._rung(o) is Rung.QUEUED]
        # A report does not leave without its image, which may just have turned out to be another one there.
        if unsent and all(self._rung(o) is not Rung.REFUSED for o in objects):
            statuses = self._destination.send(unsent)
            # Only broken off: it is there, but what takes objects has not answered.
            self._answered = self._answered or any(s.outcome != "unknown" for s in statuses)
            self._state = heard(self._state, statuses)
            self._learn(encoding, unsent, statuses)
        if all(self._rung(o) in (Rung.STORED, Rung.VERIFIED) for o in objects):
            self._verify([o for o in objects if self._rung(o) is Rung.STORED])
        self._state = settled(self._state, self._clock(), self._settings)

    def _unclear(self, item: OutgoingObject) -> bool:
        rung = self._rung(item)
        return rung is Rung.SENT or (self._recovered and rung is Rung.QUEUED)

    def _verify(self, objects: Sequence[OutgoingObject]) -> None:
        if objects:
            self._asking = True
            self._state = heard(self._state, self._destination.verify(objects))
            self._asking, self._answered = False, True

    def _rung(self, item: OutgoingObject) -> Rung:
        return next(o.rung for o in self._state.current if o.sop_instance_uid == item.sop_instance_uid)

    def _learn(self, encoding: str, sent: Sequence[OutgoingObject], statuses: Sequence[ObjectStatus]) -> None:
        """Acceptance is remembered; a refusal too, unless it may concern just this object of a class that it takes."""
        roles = {o.sop_instance_uid: o.role for o in sent}
        for status in statuses:
            role = roles[status.sop_instance_uid]
            name = encoding if role in ("SEG", "SC") else "SR"
            if status.outcome in ("stored", "warning"):
                self._learned = self._learned.learn(name, "accepted", status.meaning, self._clock())
            elif status.outcome == "refused" and self._counts(name, status.code):
                self._learned = self._learned.learn(name, "refused", status.meaning, self._clock())

    def _counts(self, name: str, code: int | None) -> bool:
        return concerns_the_class(code) or self._learned.support(name, self._clock()) != "accepted"

    def _fell_back_from(self, encoding: str) -> None:
        now = self._clock()
        why = self._state.reason
        if self._learned.support(encoding, now) != "accepted":
            self._learned = self._learned.learn(encoding, "refused", why, now)
        following = self._learned.choose(self._settings.encodings, now, refused=self._state.refused)
        self._alarm(
            FALLBACK_ENCODING,
            f"destination:{self._destination.name}:{encoding}",
            f"{self._destination.name} does not take {encoding} ({why}); {following} is sent instead.",
        )

    def _alarm(self, kind: str, subject: str, message: str) -> None:
        self._alarms.append(AlarmToRaise(kind=kind, subject=subject, message=message))
