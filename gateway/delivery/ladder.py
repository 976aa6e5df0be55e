"""The delivery ladder: queued → sent → stored → verified, per object and per delivery (OUT-42, OUT-44, QUE-29).

Pure: state, news and time in, state out; attempt.py does what it says. A delivery is never dropped: it ends verified,
stored (at a destination that cannot be queried), withheld, or parked with the reason.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from gateway.delivery.destination import (
    DestinationAway,
    DestinationRefuses,
    ObjectStatus,
    OutgoingObject,
    Role,
    Verification,
)
from gateway.delivery.retry import backoff_s, overdue_attempts, patience_ended
from gateway.settings import PacsDestination
from storage.records import DeliveryState

_IMAGE_ROLES = ("SEG", "SC")  # these have another encoding to fall back to
_RESEND_AFTER_ABSENCES = 8  # stored, but not found so often in a row: sent once more (about ten minutes by default)
_DOUBTS_THAT_REFUSE = 8  # "processing failure" without a reason so often in a row: the next encoding


class Rung(enum.StrEnum):
    """How far one object is."""

    QUEUED = "queued"
    SENT = "sent"  # it left, and no answer came
    STORED = "stored"
    VERIFIED = "verified"
    REFUSED = "refused"  # not taken in this encoding


_HEIGHT = {Rung.REFUSED: 0, Rung.QUEUED: 0, Rung.SENT: 0, Rung.STORED: 1, Rung.VERIFIED: 2}

# (rung, what was heard) → rung. What is heard are the outcomes of ObjectStatus and Verification.
# A pair that is not listed changes nothing.
STEPS: Mapping[tuple[Rung, str], Rung] = {
    **{(rung, "stored"): Rung.STORED for rung in (Rung.QUEUED, Rung.SENT)},
    **{(rung, "warning"): Rung.STORED for rung in (Rung.QUEUED, Rung.SENT)},
    **{(rung, "refused"): Rung.REFUSED for rung in (Rung.QUEUED, Rung.SENT)},
    **{(rung, "failed"): Rung.QUEUED for rung in (Rung.QUEUED, Rung.SENT)},
    **{(rung, "doubtful"): Rung.QUEUED for rung in (Rung.QUEUED, Rung.SENT)},
    (Rung.QUEUED, "unknown"): Rung.SENT,
    (Rung.QUEUED, "verified"): Rung.VERIFIED,
    (Rung.SENT, "verified"): Rung.VERIFIED,
    (Rung.STORED, "verified"): Rung.VERIFIED,
    (Rung.SENT, "absent"): Rung.QUEUED,  # it did not arrive
    (Rung.SENT, "not-queryable"): Rung.QUEUED,  # no way to know: the same bytes under the same UID once more
    (Rung.QUEUED, "differs"): Rung.REFUSED,
    (Rung.SENT, "differs"): Rung.REFUSED,
    (Rung.STORED, "differs"): Rung.REFUSED,
}


@dataclass(frozen=True, kw_only=True)
class ObjectProgress:
    """One object's own truth. `code`, `outcome` and `meaning` are the last answer to sending, `checked` and `detail`
    those to asking. Kept for refused encodings as well."""

    sop_instance_uid: str
    sop_class_uid: str
    role: Role
    encoding: str
    rung: Rung = Rung.QUEUED
    code: int | None = None
    outcome: str = ""
    meaning: str = ""
    checked: str = ""
    detail: str = ""
    absences: int = 0
    doubts: int = 0


@dataclass(frozen=True, kw_only=True)
class LadderState:
    """One delivery. `since` starts the clock of give_up_after_s; `overdue` counts attempts in a row that failed after
    it; `failures` counts attempts in a row without progress. `address` is the digest of where it was sent.

    `reason` says in words why it is not further, or what is worth knowing of a finished one.
    """

    delivery_id: str
    state: DeliveryState = DeliveryState.QUEUED
    reason: str = ""
    encoding: str | None = None
    refused: tuple[str, ...] = ()
    objects: tuple[ObjectProgress, ...] = ()
    attempts: int = 0
    failures: int = 0
    overdue: int = 0
    since: datetime
    next_attempt_at: datetime | None
    address: str | None = None

    @classmethod
    def new(cls, delivery_id: str, now: datetime) -> LadderState:
        return cls(delivery_id=delivery_id, since=now, next_attempt_at=now)

    @property
    def finished(self) -> bool:
        """Nothing more will be tried without a person."""
        return self.next_attempt_at is None

    @property
    def current(self) -> tuple[ObjectProgress, ...]:
        """The objects of the encoding that is being delivered."""
        return tuple(o for o in self.objects if o.encoding == self.encoding)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of stored objects, as what they are."""
        return tuple(f"{o.sop_instance_uid}: {o.meaning}" for o in self.current if o.outcome == "warning")

    def retry_in_s(self, now: datetime) -> float | None:
        """Seconds to sleep before the next attempt; None when finished."""
        return None if self.next_attempt_at is None else max(0.0, (self.next_attempt_at - now).total_seconds())

    def as_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        fields["since"] = self.since.isoformat()
        fields["next_attempt_at"] = self.next_attempt_at.isoformat() if self.next_attempt_at else None
        return {**fields, "refused": list(self.refused), "objects": [asdict(o) for o in self.objects]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LadderState:
        next_attempt_at = fields["next_attempt_at"]
        return cls(
            **{
                **fields,
                "state": DeliveryState(fields["state"]),
                "since": datetime.fromisoformat(fields["since"]),
                "next_attempt_at": datetime.fromisoformat(next_attempt_at) if next_attempt_at else None,
                "refused": tuple(fields["refused"]),
                "objects": tuple(ObjectProgress(**{**o, "rung": Rung(o["rung"])}) for o in fields["objects"]),
            }
        )


def advance(
    state: LadderState,
    news: Sequence[ObjectStatus] | Sequence[Verification] | DestinationAway | DestinationRefuses,
    *,
    now: datetime,
    settings: PacsDestination,
) -> LadderState:
    """The state after this news. A finished delivery does not change any more."""
    if state.finished:
        return state
    if isinstance(news, DestinationAway | DestinationRefuses):
        return _later(state, str(news), now, settings)
    return settled(heard(state, news), now, settings)


def withhold(state: LadderState, reason: str) -> LadderState:
    """Not sent on purpose (superseded, held). What was stored already stays stored in the objects' own rungs."""
    return replace(state, state=DeliveryState.WITHHELD, reason=reason, next_attempt_at=None)


def park(state: LadderState, reason: str) -> LadderState:
    """Given up until a person says `seggate retry`."""
    return replace(state, state=DeliveryState.PARKED, reason=reason, next_attempt_at=None)


def requeue(state: LadderState, now: datetime) -> LadderState:
    """After `seggate retry`: a new patience, refused encodings may be tried again, what is stored stays stored."""
    objects = tuple(
        replace(o, rung=Rung.QUEUED if o.rung is Rung.REFUSED else o.rung, absences=0, doubts=0) for o in state.objects
    )
    return replace(
        state,
        state=_overall(objects),
        reason="",
        encoding=None,
        refused=(),
        objects=objects,
        failures=0,
        overdue=0,
        since=now,
        next_attempt_at=now,
    )


def elsewhere(state: LadderState, now: datetime) -> LadderState:
    """For a destination that is at another address now: nothing of what is known holds there."""
    return replace(LadderState.new(state.delivery_id, now), attempts=state.attempts)


def prepared(state: LadderState, encoding: str, objects: Sequence[OutgoingObject]) -> LadderState:
    """With an entry for every object of this encoding, and none for what is no longer to be sent (send_sr = false).

    Entries that exist keep their rung.
    """
    wanted = {o.sop_instance_uid for o in objects}
    kept = tuple(o for o in state.objects if o.encoding != encoding or o.sop_instance_uid in wanted)
    known = {o.sop_instance_uid for o in kept if o.encoding == encoding}
    new = tuple(
        ObjectProgress(
            sop_instance_uid=o.sop_instance_uid, sop_class_uid=o.sop_class_uid, role=o.role, encoding=encoding
        )
        for o in objects
        if o.sop_instance_uid not in known
    )
    return replace(state, encoding=encoding, objects=kept + new)


def heard(state: LadderState, news: Sequence[ObjectStatus] | Sequence[Verification]) -> LadderState:
    """Each object of the current encoding moved along STEPS; the delivery itself is not judged yet (`settled`)."""
    by_uid: dict[str, ObjectStatus | Verification] = {n.sop_instance_uid: n for n in news}
    objects = tuple(
        _moved(o, by_uid[o.sop_instance_uid]) if o.encoding == state.encoding and o.sop_instance_uid in by_uid else o
        for o in state.objects
    )
    climbed = any(_HEIGHT[new.rung] > _HEIGHT[old.rung] for old, new in zip(state.objects, objects, strict=True))
    return replace(state, objects=objects, failures=0 if climbed else state.failures)


def _moved(item: ObjectProgress, news: ObjectStatus | Verification) -> ObjectProgress:
    rung = STEPS.get((item.rung, news.outcome), item.rung)
    if isinstance(news, ObjectStatus):
        doubts = item.doubts + 1 if news.outcome == "doubtful" else item.doubts
        return replace(
            item, rung=rung, code=news.code, outcome=news.outcome, meaning=news.meaning, doubts=doubts, checked=""
        )
    absences = item.absences + 1 if item.rung is Rung.STORED and news.outcome == "absent" else item.absences
    if absences >= _RESEND_AFTER_ABSENCES:
        rung, absences = Rung.QUEUED, 0
    return replace(item, rung=rung, checked=news.outcome, detail=news.detail, absences=absences)


def settled(state: LadderState, now: datetime, settings: PacsDestination) -> LadderState:
    """The delivery judged by its objects: finished, to be continued at once (fallback), or later."""
    current = state.current
    for item in current:
        if item.rung is Rung.REFUSED and item.checked == "differs":
            return park(state, f"{item.role} {item.sop_instance_uid}: {item.detail}")
    fallback_left = any(e not in state.refused and e != state.encoding for e in settings.encodings)
    for item in current:
        tired = item.rung is Rung.QUEUED and item.doubts >= _DOUBTS_THAT_REFUSE and fallback_left
        if item.role in _IMAGE_ROLES and (item.rung is Rung.REFUSED or tired):
            refused = (*state.refused, str(state.encoding))
            if not fallback_left:
                return park(replace(state, refused=refused), f"{state.encoding} is refused, too: {item.meaning}")
            return replace(
                state,
                state=DeliveryState.QUEUED,
                reason=item.meaning,
                encoding=None,
                refused=refused,
                next_attempt_at=now,
            )
        if item.rung is Rung.REFUSED:
            hint = "; set send_sr = false if this destination takes no reports" if item.role == "SR" else ""
            return park(state, f"{item.role} is refused: {item.meaning}{hint}")
    if current and all(o.rung is Rung.VERIFIED for o in current):
        return replace(
            state, state=DeliveryState.VERIFIED, reason="; ".join(state.warnings), next_attempt_at=None, failures=0
        )
    arrived = [o for o in current if o.rung in (Rung.STORED, Rung.VERIFIED)]
    if current and len(arrived) == len(current):
        open_ends = [o for o in arrived if o.rung is Rung.STORED]
        if all(o.checked == "not-queryable" for o in open_ends):
            reason = "; ".join([*state.warnings, f"not verified: {open_ends[0].detail}"])
            return replace(state, state=DeliveryState.STORED, reason=reason, next_attempt_at=None, failures=0)
    return _later(state, _obstacle(current), now, settings)


def _later(state: LadderState, reason: str, now: datetime, settings: PacsDestination) -> LadderState:
    """To be tried again after the backoff, or at an end when the patience is used up."""
    overall = _overall(state.current)
    patience_s = settings.give_up_after_s
    overdue = overdue_attempts(state.overdue, state.since, now, give_up_after_s=patience_s)
    if patience_ended(overdue):
        lost = any(o.checked == "absent" for o in state.current)
        words = f"given up after {patience_s / 3600:g} h: {reason}"
        if overall is DeliveryState.STORED and not lost:
            return replace(state, state=overall, reason=f"not verified, {words}", next_attempt_at=None)
        return park(state, words)
    failures = state.failures + 1
    wait_s = backoff_s(
        failures,
        first_retry_s=settings.first_retry_s,
        max_retry_s=settings.max_retry_s,
        key=state.delivery_id,
    )
    return replace(
        state,
        state=overall,
        reason=reason,
        failures=failures,
        overdue=overdue,
        next_attempt_at=now + timedelta(seconds=wait_s),
    )


def _overall(objects: Sequence[ObjectProgress]) -> DeliveryState:
    """The rung of a delivery that goes on: that of its lowest object, but sent as soon as anything left."""
    if not objects or all(o.rung in (Rung.QUEUED, Rung.REFUSED) for o in objects):
        return DeliveryState.QUEUED
    if all(o.rung in (Rung.STORED, Rung.VERIFIED) for o in objects):
        return DeliveryState.STORED
    return DeliveryState.SENT


def _obstacle(objects: Sequence[ObjectProgress]) -> str:
    """Why the first object that is not there yet is not there."""
    for item in objects:
        if item.rung is Rung.STORED and item.checked == "absent":
            return f"{item.role} was stored but is not found yet: {item.detail}"
        if item.rung in (Rung.QUEUED, Rung.SENT) and item.meaning:
            return f"{item.role}: {item.meaning}"
    return "not sent yet"
