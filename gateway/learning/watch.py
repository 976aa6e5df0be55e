"""The first studies of a new champion, watched: beyond a limit the version before it serves again, by itself (ART-23).

Of each study that the version has judged or failed on three things are counted: a result of it failed, QA held one, or
found an expected label empty. From `watch_least` studies on, the version is rolled back as soon as one of the three
counts, divided by the studies so far, is above its limit in the change plan, and at least two studies show it (one,
where `watch_least` is 1): a single odd study says nothing of a version. After `watch_studies` studies without that the
version is kept. The limits are looked at after every study, so a version whose true rate is near a limit is rolled back
more often than by a single look; docs/learning.md has the figures. To go back too early harms nobody.

After a rollback the stable version is watched where its own first studies had not ended, with the one before it to go
back to: never what was just withdrawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.errors import BundleInvalid, EngineError
from gateway.errors import GatewayError, is_of_the_machine
from gateway.learning.idle_versions import close_idle_versions
from gateway.learning.promotion import roll_back
from gateway.learning.rollback import (
    Withdrawal,
    is_unfinished,
    made_in,
    recent_periods,
    withdrawn_periods,
    withdrawn_since_promotion,
)
from gateway.learning.serving import settle
from gateway.learning_settings import ChangePlan, LearningSettings
from gateway.model_shelf import ModelShelf
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.canary_records import CANARY_RULE
from storage.database import Database
from storage.errors import ModelChanged, ModelMissing, StorageError
from storage.learning_records import ServingPeriod
from storage.models import ModelRegistry, RegisteredModel
from storage.records import Result, ResultState, utc_now

_log = structlog.get_logger(__name__)
ACTOR = "watch"
ROLLBACK_FAILED, UNUSABLE = "rollback-failed", "model-unusable"
_TEND_EVERY_S = 10.0
_SERIES_AT_ONCE = 10  # that are planned anew in one turn of the worker's own loop


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How many of the studies so far show something, against the share of them that may."""

    what: str
    studies: int
    limit: float


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What is known of a version's first studies; `wanted` of them are watched, fewer than `least` say nothing."""

    studies: int
    wanted: int
    least: int
    rates: tuple[Rate, ...]

    def beyond(self) -> Rate | None:
        """The first rate that asks for a rollback."""
        if self.studies < self.least:
            return None
        enough = min(2, self.least)
        return next((r for r in self.rates if r.studies >= enough and r.studies > r.limit * self.studies), None)

    @property
    def is_passed(self) -> bool:
        return self.studies >= self.wanted and self.beyond() is None


def is_watched(periods: Sequence[ServingPeriod]) -> bool:
    """Of `recent_periods`: whether the version that serves is new, with one to go back to that was not withdrawn."""
    return (
        bool(periods)
        and periods[0].ended_at is None
        and periods[0].watched_until is None
        and periods[0].previous_version is not None
        and periods[0].previous_version not in {p.model_version for p in withdrawn_since_promotion(periods)}
    )


def watched_rates(session: Session, period: ServingPeriod, plan: ChangePlan) -> Watched:
    """Counts over the first studies of a period: those with a result of its version that was judged or has failed."""
    rows = session.execute(
        select(Result.study_instance_uid, Result.state, Result.verdict, Result.checks)
        .where(
            *made_in(period),
            Result.rule != CANARY_RULE,
            Result.verdict.is_not(None) | (Result.state == ResultState.FAILED),
        )
        .order_by(Result.created_at, Result.result_id)
    )
    failed: set[str] = set()
    held: set[str] = set()
    empty: set[str] = set()
    studies: dict[str, None] = {}
    for study, state, verdict, checks in rows:
        if study not in studies and len(studies) == plan.watch_studies:
            continue
        studies[study] = None
        if state == ResultState.FAILED:
            failed.add(study)
        if verdict == "hold":
            held.add(study)
        if any(check["name"] == "empty" and check["verdict"] != "pass" for check in checks or ()):
            empty.add(study)
    return Watched(
        studies=len(studies),
        wanted=plan.watch_studies,
        least=plan.watch_least,
        rates=(
            Rate(what="failed", studies=len(failed), limit=plan.max_error_rate),
            Rate(what="were held by QA", studies=len(held), limit=plan.max_hold_rate),
            Rate(what="have an empty label", studies=len(empty), limit=plan.max_empty_rate),
        ),
    )


class Watch:
    """Looks at the champions, rolls back, and finishes what a crash left of a rollback."""

    def __init__(
        self,
        *,
        database: Database,
        registry: ModelRegistry,
        shelf: ModelShelf,
        learning: LearningSettings,
        withdrawal: Withdrawal,
    ) -> None:
        self._database = database
        self._registry = registry
        self._shelf = shelf
        self._learning = learning
        self._withdrawal = withdrawal
        self._next_tend = 0.0

    def look(self, name: str) -> None:
        """After each result of a model that was judged or parked. One query where nothing is watched."""
        with self._alarmed(name):
            with self._database.reading() as session:
                periods = recent_periods(session, name)
                unfinished = any(is_unfinished(session, p) for p in withdrawn_periods(periods))
                watched = is_watched(periods)
                rates = watched_rates(session, periods[0], self._learning.of(name).change_plan) if watched else None
            if unfinished:
                self._finish(name)
            elif rates is not None and (rate := rates.beyond()) is not None:
                reason = f"of its first {rates.studies} studies {rate.studies} {rate.what} (limit {rate.limit:.0%})"
                self._roll_back(periods[0], reason)
            elif rates is not None and rates.is_passed:
                self._keep(periods[0], rates)

    def tend(self) -> None:
        """Now and then from the worker's own loop: finish rollbacks, whoever began them, and let networks go that
        nothing needs. Raises DatabaseAway."""
        if time.monotonic() < self._next_tend:
            return
        self._next_tend = time.monotonic() + _TEND_EVERY_S
        with self._database.reading() as session:
            names = session.scalars(select(ServingPeriod.model_name).where(ServingPeriod.rolled_back).distinct()).all()
            unfinished = [
                name
                for name in names
                if any(is_unfinished(session, p) for p in withdrawn_periods(recent_periods(session, name)))
            ]
        for name in unfinished:
            with self._alarmed(name):
                self._finish(name, at_most=_SERIES_AT_ONCE)
        close_idle_versions(self._database, self._shelf)

    def check_at_start(self, check: Callable[[RegisteredModel], Sequence[str]]) -> None:
        """Before a worker takes work: a champion that cannot be loaded, or a new one in which `check` finds faults, is
        rolled back where it is watched; else a person is told."""
        with self._database.reading() as session:
            names = session.scalars(
                select(ServingPeriod.model_name).where(ServingPeriod.ended_at.is_(None)).distinct()
            ).all()
            serving = [recent_periods(session, name) for name in names]
        for periods in serving:
            period = periods[0]
            with self._alarmed(period.model_name):
                fault = self._fault_at_start(period, check if is_watched(periods) else lambda _model: ())
                if fault is None:
                    with self._database.session() as session:
                        clear_alarms(session, kind=UNUSABLE, subject=_subject(period), by=ACTOR)
                elif is_watched(periods):
                    self._roll_back(period, f"at the start of a worker: {fault}")
                else:
                    message = f"{period.model_name} {period.model_version}: {fault}"
                    with self._database.session() as session:
                        raise_alarm(session, kind=UNUSABLE, subject=_subject(period), message=message)

    def unusable(self, model: RegisteredModel, why: str) -> bool:
        """A champion's bundle cannot be loaded: true when the version before it serves since."""
        with self._database.reading() as session:
            periods = recent_periods(session, model.name)
        if not is_watched(periods) or periods[0].model_version != model.semver:
            return False
        with self._alarmed(model.name):
            self._roll_back(periods[0], why)
            return True
        return False

    def _fault_at_start(self, period: ServingPeriod, check: Callable[[RegisteredModel], Sequence[str]]) -> str | None:
        try:
            model = self._shelf.version(period.model_name, period.model_version)
            self._shelf.bundle(model)
            # A device that is busy, or memory that others use, is raised: it says nothing of the model.
            return "; ".join(check(model)) or None
        except (BundleInvalid, ModelChanged, ModelMissing) as error:
            return str(error)

    def _roll_back(self, period: ServingPeriod, reason: str) -> None:
        name, version = period.model_name, period.model_version
        # By the version that is meant: two workers that see the same fault must not go back two.
        roll_back(self._database, self._registry, name, actor=ACTOR, reason=reason, withdrawn=version)
        self._finish(name)

    def _finish(self, name: str, *, at_most: int | None = None) -> None:
        """The aliases and the results follow a rollback that is in our tables."""
        with self._database.reading() as session:
            periods = recent_periods(session, name)
            left = [p for p in withdrawn_periods(periods) if is_unfinished(session, p)]
        if not left:
            return
        settle(self._database, self._registry, name)
        self._shelf.forget(name)
        stable = self._registry.get(name, periods[0].model_version)
        for period in left:
            self._withdrawal.withdraw(period, stable, at_most=at_most)
        with self._database.session() as session:
            clear_alarms(session, kind=ROLLBACK_FAILED, subject=ledger.model_subject(name), by=ACTOR)

    def _keep(self, period: ServingPeriod, rates: Watched) -> None:
        with self._database.session() as session:
            ledger.hold(session, ledger.model_subject(period.model_name))  # in the order in which a promotion holds
            row = session.get_one(ServingPeriod, period.period_id, with_for_update=True)
            if row.watched_until is not None or row.ended_at is not None:
                return
            row.watched_until = utc_now()
            ledger.append(
                session,
                subject=ledger.model_subject(row.model_name),
                kind="model-kept",
                actor=ACTOR,
                detail={
                    "semver": row.model_version,
                    "studies": rates.studies,
                    "rates": {rate.what: {"studies": rate.studies, "limit": rate.limit} for rate in rates.rates},
                },
            )

    @contextmanager
    def _alarmed(self, name: str) -> Iterator[None]:
        """What goes wrong with a rollback is told and stops no study; disk and database are waited for."""
        try:
            yield
        except (GatewayError, StorageError, EngineError) as error:
            if is_of_the_machine(error):
                raise
            _log.error("the watch of a model failed", model=name, error=str(error))
            with self._database.session() as session:
                message = f"{name} cannot be rolled back or watched: {error}"
                raise_alarm(session, kind=ROLLBACK_FAILED, subject=ledger.model_subject(name), message=message)


def _subject(period: ServingPeriod) -> str:
    return ledger.model_subject(period.model_name)
