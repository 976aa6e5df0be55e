"""Why a study must not be deleted: all of it, for one study or for all, in a dozen queries.

Each reason has a kind and a sentence. `legal-hold`, `canary` and `deleting` stand against everybody. The others stand
against retention; those of NEED_FORCE against a person who asks, too, unless he says that he means it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, exists, func, select, true
from sqlalchemy.orm import InstrumentedAttribute, Session

from gateway.learning.corrections import USABLE, corrections_of_model
from gateway.learning.runs import UNDER_WAY
from gateway.settings import RetentionSettings
from storage import ledger
from storage.canary_records import CanaryRun
from storage.deletion_records import LegalHold
from storage.learning_records import Correction, LearningRun, ReviewTask, RunState, ServingPeriod, ShadowRun
from storage.records import (
    Alarm,
    Delivery,
    DeliveryState,
    Instance,
    InstanceState,
    Result,
    ResultObject,
    ResultState,
    Study,
    StudyState,
)

ALWAYS = frozenset({"legal-hold", "canary", "deleting"})
"""Nobody deletes such a study."""
NEED_FORCE = frozenset({"state", "undelivered", "not-finished", "aside", "chosen-to-learn", "learnt-from"})
"""A person who asks for the deletion must say that he means it."""
_AT_ONCE = 500
_WORDS_OF_STATE = {
    StudyState.RECEIVING: "objects of it still arrive",
    StudyState.WHOLE: "it waits for its routing",
    StudyState.PROCESSING: "a model is at work on it",
    StudyState.DELIVERING: "its results are not where they are to go",
    StudyState.HELD: "a result is held",
    StudyState.QUARANTINED: "it is quarantined",
    StudyState.FAILED: "something of it is parked",
}


@dataclass(frozen=True, kw_only=True)
class Reason:
    kind: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A study, how long it is done with, and what stands against its deletion.

    `done_at`: the last delivery that ended, or the last object where nothing was to be delivered. `size_bytes`: of its
    objects and of the DICOM objects made of it.
    """

    study_instance_uid: str
    state: str
    done_at: datetime
    size_bytes: int
    reasons: tuple[Reason, ...]

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(reason.kind for reason in self.reasons)


def judge_studies(
    session: Session,
    settings: RetentionSettings,
    *,
    now: datetime,
    late_window_s: float,
    in_shadow: Collection[tuple[str, str]] = (),
    only: str | None = None,
) -> list[Judged]:
    """Every study but canaries, what has been done with the longest first. `in_shadow`: model and version of those that
    are being tried; `only`: this one study, a canary too."""
    look = _Look(session, only)
    late = now - timedelta(seconds=late_window_s)
    look.at_states(settings, late)
    look.at_deliveries(settings)
    look.at_results()
    look.at_people(settings)
    look.at_learning(settings)
    look.at_trials(frozenset(in_shadow))
    sizes, delivered = look.sizes(), look.delivered()
    found = [
        Judged(
            study_instance_uid=uid,
            state=study.state,
            done_at=max(study.last_received_at, delivered.get(uid, study.last_received_at)),
            size_bytes=sizes.get(uid, 0),
            reasons=tuple(look.reasons.get(uid, ())),
        )
        for uid, study in look.studies.items()
    ]
    return sorted(found, key=lambda study: (study.done_at, study.study_instance_uid))


class _Look:
    """One look at the rows; each method adds to `reasons`. `only` narrows every query to one study."""

    def __init__(self, session: Session, only: str | None) -> None:
        self._session = session
        self._only = only
        canary = exists().where(CanaryRun.study_instance_uid == Study.study_instance_uid)
        query = select(Study).where(~canary if only is None else Study.study_instance_uid == only)
        self.studies = {study.study_instance_uid: study for study in session.scalars(query)}
        self.reasons: dict[str, list[Reason]] = defaultdict(list)

    def at_states(self, settings: RetentionSettings, late: datetime) -> None:
        """The study's own state, and whether objects may still come that belong to it."""
        for uid, study in self.studies.items():
            if study.state == StudyState.DELETING:
                self._add("deleting", "it is being deleted", [uid])
            elif study.state not in (StudyState.VERIFIED, StudyState.UNMATCHED):
                words = _WORDS_OF_STATE[StudyState(study.state)]
                self._add("state", f"{words}: {study.state_reason}" if study.state_reason else words, [uid])
            elif study.state == StudyState.UNMATCHED and not settings.unmatched_days:
                self._add("unmatched", "no model wanted it, and unmatched_days is 0", [uid])
            if study.last_received_at > late:
                self._add("late-window", "late objects may still make a new version of it", [uid])

    def at_deliveries(self, settings: RetentionSettings) -> None:
        done = [DeliveryState.VERIFIED, DeliveryState.WITHHELD]
        rows = self._session.execute(
            select(Result.study_instance_uid, Delivery.destination, Delivery.state, Delivery.next_attempt_at)
            .join(Delivery, Delivery.result_id == Result.result_id)
            .where(self._mine(Result.study_instance_uid), Delivery.state.not_in(done))
            .order_by(Delivery.destination)
        )
        for uid, destination, state, next_attempt_at in rows:
            if state != DeliveryState.STORED or next_attempt_at is not None:
                self._add("undelivered", f"delivery to {destination} is {state}", [uid])
            elif not settings.stored_is_enough:
                words = f"{destination} said that it stored it, and cannot be asked (stored_is_enough)"
                self._add("not-verified", words, [uid])

    def at_results(self) -> None:
        """Older versions' results too; objects that a person has to decide about."""
        unfinished = [ResultState.PENDING, ResultState.HELD, ResultState.FAILED]
        for uid, state in self._session.execute(
            select(Result.study_instance_uid, Result.state)
            .where(self._mine(Result.study_instance_uid), Result.state.in_(unfinished))
            .distinct()
        ):
            self._add("not-finished", f"a result of it is {state}", [uid])
        aside = [InstanceState.QUARANTINED, InstanceState.CONFLICT]
        for owner, kept, count in self._session.execute(
            select(Instance.study_instance_uid, Instance.state, func.count())
            .where(self._mine(Instance.study_instance_uid), Instance.state.in_(aside))
            .group_by(Instance.study_instance_uid, Instance.state)
        ):
            self._add("aside", f"{count} objects of it are kept aside: {kept}", [owner] if owner else [])

    def at_people(self, settings: RetentionSettings) -> None:
        """What somebody forbade, or is still to look at."""
        holds = select(LegalHold).where(self._mine(LegalHold.study_instance_uid))
        for hold in self._session.scalars(holds):
            self._add("legal-hold", f"legal hold by {hold.by}: {hold.reason}", [hold.study_instance_uid])
        if self._only is not None and self._session.get(CanaryRun, self._only) is not None:
            self._add("canary", "a canary: it goes by itself after canary.keep_days", [self._only])
        tasks = self._session.scalars(select(ReviewTask).where(ReviewTask.closed_at.is_(None)))
        for task in tasks:
            self._add("review-task", f"review task {task.task_id} shows it", self._studies_of(task.result_ids))
        prefix = ledger.study_subject("")
        alarms = select(Alarm.subject, Alarm.kind).where(Alarm.cleared_at.is_(None))
        narrow = Alarm.subject.startswith(prefix) if self._only is None else Alarm.subject == prefix + self._only
        for subject, kind in self._session.execute(alarms.where(narrow)):
            self._add("alarm", f"the alarm {kind} is open", [subject.removeprefix(prefix)])
        if settings.keep_unreviewed:
            read = exists().where(Correction.result_id == Result.result_id, Correction.kind != "opened")
            unread = select(Result.study_instance_uid).where(
                self._mine(Result.study_instance_uid),
                Result.verdict == "review",
                Result.state == ResultState.RELEASED,
                ~read,
            )
            words = "QA asked for a review of a result, and no reader has said anything (keep_unreviewed)"
            self._add("unreviewed", words, self._session.scalars(unread))

    def at_learning(self, settings: RetentionSettings) -> None:
        said = {
            result_id: correction
            for result_id, correction in corrections_of_model(self._session).items()
            if correction.kind in USABLE
        }
        for state, learnt in (("learnt-from", True), ("labelled", False)):
            results = [result_id for result_id, c in said.items() if (c.learnt_by is not None) is learnt]
            if not results or (learnt and not settings.keep_labelled):
                continue
            words = "a training took it; a reader's labels exist only here (keep_labelled)"
            self._add(state, words if learnt else "a reader's labels exist only here", self._studies_of(results))
        runs = self._session.scalars(
            select(LearningRun).where(LearningRun.state.in_([*UNDER_WAY, RunState.CANDIDATE, RunState.FAILED]))
        )
        for run in runs:
            chosen = [str(case["result_id"]) for case in run.cases or []]
            words = f"training {run.run_id} of {run.model_name} was given it, and is {run.state}"
            self._add("chosen-to-learn", words, self._studies_of(chosen))

    def at_trials(self, in_shadow: frozenset[tuple[str, str]]) -> None:
        """Versions that are judged by it: in shadow, or new in service."""
        shadows = self._session.execute(
            select(Result.study_instance_uid, ShadowRun.model_name, ShadowRun.model_version, ShadowRun.state)
            .join(Result, Result.result_id == ShadowRun.result_id)
            .where(self._mine(Result.study_instance_uid))
        )
        for uid, name, version, state in shadows:
            if state == "pending" or (name, version) in in_shadow:
                self._add("on-trial", f"{name} {version} is tried on it in shadow", [uid])
        watched = self._session.execute(
            select(Result.study_instance_uid, Result.model_name, Result.model_version)
            .join(
                ServingPeriod,
                (ServingPeriod.model_name == Result.model_name)
                & (ServingPeriod.model_version == Result.model_version)
                & (ServingPeriod.began_at <= Result.created_at),
            )
            .where(
                self._mine(Result.study_instance_uid),
                ServingPeriod.ended_at.is_(None),
                ServingPeriod.watched_until.is_(None),
                ServingPeriod.previous_version.is_not(None),
            )
        )
        for uid, name, version in watched:
            self._add("on-trial", f"{name} {version} is new, and its first studies are watched", [uid])

    def sizes(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        objects = select(Instance.study_instance_uid, func.sum(Instance.size_bytes)).group_by(
            Instance.study_instance_uid
        )
        made = (
            select(Result.study_instance_uid, func.sum(ResultObject.size_bytes))
            .join(ResultObject, ResultObject.result_id == Result.result_id)
            .group_by(Result.study_instance_uid)
        )
        for query, column in ((objects, Instance.study_instance_uid), (made, Result.study_instance_uid)):
            for uid, size_bytes in self._session.execute(query.where(self._mine(column))):
                found[str(uid)] += int(size_bytes)
        return found

    def delivered(self) -> dict[str, datetime]:
        """When the last delivery of each study ended."""
        rows = self._session.execute(
            select(Result.study_instance_uid, func.max(Delivery.updated_at))
            .join(Delivery, Delivery.result_id == Result.result_id)
            .where(self._mine(Result.study_instance_uid))
            .group_by(Result.study_instance_uid)
        )
        return dict((uid, at) for uid, at in rows)

    def _add(self, kind: str, words: str, studies: Iterable[str]) -> None:
        for uid in dict.fromkeys(studies):
            if uid in self.studies:
                self.reasons[uid].append(Reason(kind=kind, words=words))

    def _mine(self, column: InstrumentedAttribute[str] | InstrumentedAttribute[str | None]) -> ColumnElement[bool]:
        return true() if self._only is None else column == self._only

    def _studies_of(self, result_ids: Sequence[str]) -> list[str]:
        found: list[str] = []
        for start in range(0, len(result_ids), _AT_ONCE):
            some = result_ids[start : start + _AT_ONCE]
            query = select(Result.study_instance_uid).where(Result.result_id.in_(some))
            found += self._session.scalars(query.where(self._mine(Result.study_instance_uid)))
        return found
