"""What speaks for a study being whole, and the rule that decides it (CMP-15).

Gathering reads rows only; slice positions come from a cache that assembly fills. Deciding is a pure function of the
evidence, the sender's settings and the time, so that every past decision can be checked against its evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from gateway.intake.slice_gaps import SliceGap
from gateway.settings import Completeness
from storage.records import Association, Instance, InstanceState, Series, Study

RULES = ("operator", "expected-count", "quiet-after-release", "quiet-open", "give-up")

_MAX_GAPS_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class AssociationEvidence:
    """One association that delivered objects of the study; `ended` is open, released, aborted, lost or unknown."""

    association_id: str
    ended: str
    ended_at: datetime | None
    objects: int
    resumed: bool  # interrupted, and released associations delivered into every series of it afterwards


@dataclass(frozen=True, kw_only=True)
class ExpectedCount:
    """The answer of the peer that was asked how many instances the study has.

    `count` is None where there was no usable answer; `problem` then says why. `pending`: asked, not yet answered.
    """

    source: str
    count: int | None = None
    problem: str = ""
    pending: bool = False


@dataclass(frozen=True, kw_only=True)
class StudyEvidence:
    """Everything a completeness rule looks at.

    `objects` counts those in use, `received` all distinct instances, `own_results` the distinct results of ours that
    came back, `quarantined` the objects set aside of which no other copy is in use, `conflicting` those in conflict
    of which none is in their own series: another series or study holds the SOP Instance UID.
    """

    study_instance_uid: str
    objects: int
    received: int
    object_states: Mapping[str, int]
    series: Mapping[str, int]  # Series Instance UID -> objects in use
    last_object_at: datetime  # in whatever state
    last_new_object_at: datetime  # of those in use
    first_object_at: datetime
    associations: tuple[AssociationEvidence, ...]
    expected: ExpectedCount | None = None
    gaps: tuple[SliceGap, ...] = ()
    gaps_checked: bool = False
    wish: str | None = None
    own_results: int = 0
    quarantined: int = 0
    conflicting: int = 0

    @property
    def counted(self) -> int:
        """What is compared with the expected count: objects in use, and own results, which the peer counts too."""
        return self.objects + self.own_results

    @property
    def released(self) -> bool:
        """Every association has said goodbye, or what it broke off was delivered again to the end."""
        return bool(self.associations) and all(a.ended == "released" or a.resumed for a in self.associations)

    @property
    def ended(self) -> bool:
        """No association is open."""
        return all(a.ended in {"released", "aborted", "lost"} for a in self.associations)

    @property
    def interrupted(self) -> bool:
        """An association broke off, and nothing has made up for it (REC-13)."""
        return any(a.ended in {"aborted", "lost"} and not a.resumed for a in self.associations)

    def to_json(self, now: datetime) -> dict[str, Any]:
        """The evidence as the version and the ledger keep it."""
        return {
            "objects": self.objects,
            "received": self.received,
            "own_results": self.own_results,
            "quarantined": self.quarantined,
            "conflicting": self.conflicting,
            "object_states": dict(self.object_states),
            "series": dict(self.series),
            "first_object_at": self.first_object_at.isoformat(),
            "last_object_at": self.last_object_at.isoformat(),
            "last_new_object_at": self.last_new_object_at.isoformat(),
            "quiet_s": round((now - self.last_object_at).total_seconds(), 3),
            "associations": [
                {**asdict(a), "ended_at": a.ended_at.isoformat() if a.ended_at else None} for a in self.associations
            ],
            "released": self.released,
            "interrupted": self.interrupted,
            "expected": asdict(self.expected) if self.expected else None,
            "gaps_checked": self.gaps_checked,
            "gaps": [asdict(g) for g in self.gaps[:_MAX_GAPS_LISTED]],
            "gaps_total": len(self.gaps),
            "wish": self.wish,
        }


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`rule` declares the study whole, or None; `waiting_for` then says for what. `because` lists what prolonged it."""

    rule: str | None
    waiting_for: str = ""
    because: tuple[str, ...] = ()


def decide(evidence: StudyEvidence, settings: Completeness, now: datetime) -> Decision:
    """The first rule that holds: operator, expected-count, quiet-after-release, quiet-open, give-up.

    `now`: the moment up to which nothing newer than the evidence was acknowledged (gateway.intake.index_mark).
    """
    longer = max(settings.quiet_s, settings.quiet_open_s)
    patience = max(settings.give_up_s, longer)
    quiet = (now - evidence.last_object_at).total_seconds()
    without_new = (now - evidence.last_new_object_at).total_seconds()
    if without_new >= patience:
        quiet = without_new  # a sender that repeats what is here already does not keep the study open for ever
    if evidence.wish == "wait":
        return Decision(rule=None, waiting_for="the operator, who said wait")
    if evidence.wish == "complete":
        return Decision(rule="operator")
    expected = evidence.expected if settings.expected_count == "wait" else None
    set_aside = ((evidence.quarantined, "quarantined objects"), (evidence.conflicting, "objects in conflict"))
    aside = tuple(f"{what}: {count}" for count, what in set_aside if count)
    if expected is not None and expected.count == evidence.counted and evidence.ended and not aside:
        return Decision(rule="expected-count")
    # Someone knows of more objects than can be used: only time, or a person, says that they will not come.
    if expected is not None and expected.count is not None and evidence.counted < expected.count:
        if quiet >= patience:
            return Decision(rule="give-up", because=("fewer objects than expected", *aside))
        return Decision(rule=None, waiting_for=f"{expected.source}, which has more objects of this study")
    if quiet < (settings.quiet_s if evidence.released else longer):
        if evidence.released:
            return Decision(rule=None, waiting_for=f"{settings.quiet_s:g} s without a new object")
        why = "an association that broke off" if evidence.interrupted else "an association that is not released"
        return Decision(rule=None, waiting_for=f"{why}, at most {longer:g} s")
    if quiet < longer:
        if expected is not None and expected.pending:
            return Decision(rule=None, waiting_for=f"the answer of {expected.source}, at most {longer:g} s")
        if settings.gap_check and evidence.gaps:
            return Decision(rule=None, waiting_for=f"missing slices, at most {longer:g} s")
        if aside:
            missed = " and ".join(f"{count} {what}" for count, what in set_aside if count)
            return Decision(rule=None, waiting_for=f"another copy of {missed}, at most {longer:g} s")
    prolonged = [*aside]
    if settings.gap_check and evidence.gaps:
        prolonged.append("slice gaps")
    if evidence.interrupted:
        prolonged.append("interrupted association")
    return Decision(rule="quiet-after-release" if evidence.released else "quiet-open", because=tuple(prolonged))


@dataclass(frozen=True, kw_only=True)
class _Delivered:
    """What one association brought of a study, in whatever state the objects are now."""

    series: frozenset[str]
    objects: int
    first_at: datetime
    last_at: datetime


def gather(session: Session, study: Study, *, expected: ExpectedCount | None = None) -> StudyEvidence | None:
    """The evidence that the rows hold; None for a study of which no object is in use."""
    uid = study.study_instance_uid
    states: Counter[str] = Counter()
    for state, count in session.execute(
        select(Instance.state, func.count()).where(Instance.study_instance_uid == uid).group_by(Instance.state)
    ):
        states[str(state)] = count
    if not states[InstanceState.CURRENT]:
        return None
    first, received = session.execute(
        select(func.min(Instance.received_at), func.count(Instance.sop_instance_uid.distinct())).where(
            Instance.study_instance_uid == uid
        )
    ).one()
    last_new = session.scalar(select(func.max(Series.last_received_at)).where(Series.study_instance_uid == uid))
    series = {
        str(series_uid): count
        for series_uid, count in session.execute(
            select(Instance.series_instance_uid, func.count())
            .where(Instance.study_instance_uid == uid, Instance.state == InstanceState.CURRENT)
            .group_by(Instance.series_instance_uid)
        )
    }
    return StudyEvidence(
        study_instance_uid=uid,
        objects=states[InstanceState.CURRENT],
        received=received,
        object_states=dict(sorted(states.items())),
        series=series,
        first_object_at=first,
        last_object_at=study.last_received_at,
        last_new_object_at=last_new or study.last_received_at,
        associations=_associations(session, uid),
        expected=expected,
        wish=study.wish,
        own_results=len(_instances(session, uid, InstanceState.OWN_RESULT)) if states[InstanceState.OWN_RESULT] else 0,
        quarantined=(
            len(_instances(session, uid, InstanceState.QUARANTINED) - _instances(session, uid, InstanceState.CURRENT))
            if states[InstanceState.QUARANTINED]
            else 0
        ),
        conflicting=(
            len(_in_series(session, uid, InstanceState.CONFLICT) - _in_series(session, uid, InstanceState.CURRENT))
            if states[InstanceState.CONFLICT]
            else 0
        ),
    )


def object_counts(session: Session, study_instance_uid: str) -> dict[str, int]:
    """Objects of a study per state."""
    rows = session.execute(
        select(Instance.state, func.count())
        .where(Instance.study_instance_uid == study_instance_uid)
        .group_by(Instance.state)
    )
    return {str(state): count for state, count in rows}


def _instances(session: Session, uid: str, state: InstanceState) -> set[str]:
    """SOP Instance UIDs of a study's objects in a state; an object without one counts by its own id."""
    rows = session.execute(
        select(Instance.sop_instance_uid, Instance.object_id).where(
            Instance.study_instance_uid == uid, Instance.state == state
        )
    )
    return {str(sop_instance_uid or object_id) for sop_instance_uid, object_id in rows}


def _in_series(session: Session, uid: str, state: InstanceState) -> set[tuple[str | None, str | None]]:
    """(Series, SOP Instance UID) of a study's objects in a state."""
    rows = session.execute(
        select(Instance.series_instance_uid, Instance.sop_instance_uid).where(
            Instance.study_instance_uid == uid, Instance.state == state
        )
    )
    return {(series_uid, sop_instance_uid) for series_uid, sop_instance_uid in rows}


def _associations(session: Session, uid: str) -> tuple[AssociationEvidence, ...]:
    delivered: dict[str, _Delivered] = {}
    for association_id, series_uid, count, first, last in session.execute(
        select(
            Instance.association_id, Instance.series_instance_uid, func.count(),
            func.min(Instance.received_at), func.max(Instance.received_at),
        )
        .where(Instance.study_instance_uid == uid)
        .group_by(Instance.association_id, Instance.series_instance_uid)
    ):  # fmt: skip
        so_far = delivered.get(association_id)
        delivered[association_id] = _Delivered(
            series=frozenset({str(series_uid)}) | (so_far.series if so_far else frozenset()),
            objects=count + (so_far.objects if so_far else 0),
            first_at=min(first, so_far.first_at) if so_far else first,
            last_at=max(last, so_far.last_at) if so_far else last,
        )
    rows = {
        a.association_id: a
        for a in session.scalars(select(Association).where(Association.association_id.in_(list(delivered))))
    }
    return tuple(
        AssociationEvidence(
            association_id=association_id,
            ended=_ended(rows.get(association_id)),
            ended_at=rows[association_id].ended_at if association_id in rows else None,
            objects=mine.objects,
            resumed=_resumed(association_id, delivered, rows),
        )
        for association_id, mine in sorted(delivered.items())
    )


def _ended(association: Association | None) -> str:
    """`unknown` where the index was rebuilt from the spool and the association's own events are gone."""
    if association is None:
        return "unknown"
    return association.ended or "open"


def _resumed(association_id: str, delivered: Mapping[str, _Delivered], rows: Mapping[str, Association]) -> bool:
    """Whether released associations delivered, after it, into every series that this interrupted one had begun."""
    broken, mine = rows.get(association_id), delivered[association_id]
    if broken is None or broken.ended not in {"aborted", "lost"}:
        return False
    later: frozenset[str] = frozenset()
    for other_id, other in delivered.items():
        row = rows.get(other_id)
        if row is not None and row.ended == "released" and other.first_at >= mine.last_at:
            later |= other.series
    return mine.series <= later
