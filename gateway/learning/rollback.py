"""What a rollback means for studies: what the withdrawn version made and nobody got is done again by the stable one.

A result of the withdrawn version that is pending, failed or held by QA, of a study's newest version, is superseded by a
new one of the version that serves, ordered in the same transaction: each study keeps exactly one current result per
series and model. A run that is under way finds its row superseded and ends without effect. What was released stays and
is listed for a person. Every function may be called again at any time: it does what is left to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy import ColumnElement, Select, and_, or_, select
from sqlalchemy.orm import Session

from gateway import study_state, superseding
from gateway.due_work import enqueue_result
from gateway.durable import ROUTINE, URGENT, Enqueuer, next_workflow_id
from gateway.errors import is_of_the_machine, meaning
from gateway.model_shelf import ModelShelf
from gateway.results.contract import ContractFinding
from gateway.results.orders import content_key, place, plan_series, planned_failure, series_files
from gateway.routed_work import is_urgent
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.errors import StorageError
from storage.learning_records import ReviewTask, ServingPeriod
from storage.models import RegisteredModel
from storage.records import Result, ResultState, Study, StudyState, StudyVersion, utc_now
from storage.spool import Spool

_log = structlog.get_logger(__name__)
ROLLED_BACK = "model-rolled-back"
_PERIODS_LOOKED_AT = 20
_CLOCKS_APART = timedelta(minutes=1)  # of the hosts that write periods and results


def recent_periods(session: Session, name: str) -> Sequence[ServingPeriod]:
    """The latest periods of a model, newest first; the first is the one that serves where it has not ended."""
    return session.scalars(
        select(ServingPeriod)
        .where(ServingPeriod.model_name == name)
        .order_by(ServingPeriod.period_id.desc())
        .limit(_PERIODS_LOOKED_AT)
    ).all()


def withdrawn_periods(periods: Sequence[ServingPeriod]) -> list[ServingPeriod]:
    """Of `recent_periods` those of other versions than the one that serves that were rolled back, newest first."""
    if not periods or periods[0].ended_at is not None:
        return []
    return [p for p in periods[1:] if p.rolled_back and p.model_version != periods[0].model_version]


def withdrawn_since_promotion(periods: Sequence[ServingPeriod]) -> list[ServingPeriod]:
    """Of those the ones since a version was last promoted."""
    if not periods or periods[0].ended_at is not None:
        return []
    found: list[ServingPeriod] = []
    for period in periods[1:]:
        if not period.rolled_back:
            break
        if period.model_version != periods[0].model_version:
            found.append(period)
    return found


def is_unfinished(session: Session, period: ServingPeriod) -> bool:
    """Whether something is left to do for a period that was rolled back."""
    return (
        session.scalars(_to_do_again(period).limit(1)).first() is not None
        or session.scalars(_told(period)).first() is None
    )


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """What the stable version is to do of one series; `refused` by result_id."""

    version: StudyVersion
    results: tuple[Result, ...]
    refused: dict[str, list[ContractFinding]]


class Withdrawal:
    """Takes the results of a version back."""

    def __init__(self, *, database: Database, spool: Spool, shelf: ModelShelf, enqueuer: Enqueuer) -> None:
        self._database = database
        self._spool = spool
        self._shelf = shelf
        self._enqueuer = enqueuer

    def withdraw(self, period: ServingPeriod, stable: RegisteredModel, *, at_most: int | None = None) -> bool:
        """Do again by `stable` what the version of `period` left, then tell a person; false when `at_most` series were
        done and more are left.

        One transaction per series, so that a writer never waits for the reading of images. Raises BundleInvalid or
        ModelChanged before anything is done where the stable version cannot be loaded either.
        """
        self._shelf.bundle(stable)
        with self._database.reading() as session:
            works = list(
                dict.fromkeys((r.version_id, r.series_instance_uid) for r in session.scalars(_to_do_again(period)))
            )
        for version_id, series_instance_uid in works[:at_most]:
            self._do_again(period, stable, version_id, series_instance_uid)
        if at_most is not None and len(works) > at_most:
            return False
        self._tell(period, stable)
        return True

    def _do_again(
        self, period: ServingPeriod, stable: RegisteredModel, version_id: str, series_instance_uid: str
    ) -> None:
        mine = _to_do_again(period).where(
            Result.version_id == version_id, Result.series_instance_uid == series_instance_uid
        )
        planned = self._plan(stable, version_id, mine)
        if planned is None:
            return
        reason = _words(period, stable)
        with self._database.session() as session:
            # Looked at again, and locked: a run of the withdrawn version may be ending at this moment.
            old = session.scalars(mine.with_for_update(of=Result)).all()
            if not old:
                return
            urgent = any(is_urgent(session, result) for result in old)
            others = _others(session, old)
            new = [r for r in planned.results if r.part not in {other.part for other in others}]
            for result in old:
                instead = next((r for r in new if r.part == result.part), new[0] if new else None)
                superseding.withdrawn(session, result, reason, by=instead.result_id if instead else None)
            session.flush()
            added = [r for r in new if not self._revived(session, r, urgent=urgent)]
            pairs = [(r, urgent) for r in added]
            place(session, self._enqueuer, planned.version, pairs, planned.refused, reason=reason)
            session.flush()
            _refresh(session, planned.version.study_instance_uid)

    def _plan(self, stable: RegisteredModel, version_id: str, mine: Select[Result]) -> _Planned | None:
        with self._database.reading() as session:
            old = session.scalars(mine).all()
            if not old:
                return None
            version = session.get_one(StudyVersion, version_id)
            content = content_key(session, version)
        try:
            with self._database.reading() as session:
                files = series_files(session, self._spool, version, old[0])
            found = plan_series(version, content, old[0], files, stable, self._shelf.bundle(stable))
        except (OSError, StorageError) as error:
            if is_of_the_machine(error):
                raise
            # Its images are gone: that is said of this study, and the others go on.
            reason = f"order: {meaning(error).__name__}: {error}"
            failed = tuple(planned_failure(version, content, result, stable, reason=reason) for result in old)
            return _Planned(version=version, results=failed, refused={})
        return _Planned(
            version=version,
            results=tuple(result for result, _ in found),
            refused={result.result_id: refusals for result, refusals in found if refusals},
        )

    def _revived(self, session: Session, new: Result, *, urgent: bool) -> bool:
        """Whether this very result was ordered before. One that went when its version was withdrawn itself goes on."""
        known = session.get(Result, new.result_id, with_for_update=True)
        if known is None:
            return False
        if known.state == ResultState.SUPERSEDED and new.state == ResultState.PENDING:
            known.state, known.state_reason, known.finished_at, known.attempts = ResultState.PENDING, None, None, 0
            known.workflow_id = next_workflow_id(known.workflow_id)
            enqueue_result(session, self._enqueuer, known, priority=URGENT if urgent else ROUTINE)
        return True

    def _tell(self, period: ServingPeriod, stable: RegisteredModel) -> None:
        """Ledger event, review task and alarm, once per rollback."""
        name, semver = period.model_name, period.model_version
        with self._database.session() as session:
            session.get_one(ServingPeriod, period.period_id, with_for_update=True)
            if session.scalars(_told(period)).first() is not None:
                return
            made = select(Result.result_id).where(*made_in(period)).order_by(Result.created_at, Result.result_id)
            released = list(session.scalars(made.where(Result.state == ResultState.RELEASED)))
            again = list(
                session.scalars(
                    made.where(
                        Result.state == ResultState.SUPERSEDED,
                        Result.state_reason.startswith(_words(period, stable), autoescape=True),
                    )
                )
            )
            ledger.append(
                session,
                subject=ledger.model_subject(name),
                kind="results-withdrawn",
                actor="watch",
                detail={
                    "semver": semver,
                    "to": stable.semver,
                    "reason": period.ended_why,
                    "done_again": {"count": len(again), "result_ids": again},
                    "released": {"count": len(released), "result_ids": released},
                },
            )
            summary = (
                f"{name} {semver} was rolled back to {stable.semver}: {period.ended_why}. "
                f"Results done again: {len(again)}; released before and left as they are: {len(released)}"
            )
            session.add(
                ReviewTask(
                    kind="rollback",
                    model_name=name,
                    model_version=semver,
                    subject=_task_subject(period),
                    summary=summary,
                    result_ids=released,
                    opened_at=utc_now(),
                )
            )
            raise_alarm(session, kind=ROLLED_BACK, subject=ledger.model_subject(name), message=summary)
        _log.warning(
            "model rolled back",
            model=name,
            withdrawn=semver,
            stable=stable.semver,
            again=len(again),
            left=len(released),
        )


def _words(period: ServingPeriod, stable: RegisteredModel) -> str:
    return f"{period.model_name} {period.model_version} was withdrawn; done again by {stable.semver}"


def _task_subject(period: ServingPeriod) -> str:
    """One task per rollback: a version may be rolled back more than once."""
    return f"{ledger.model_subject(period.model_name)[:90]} {period.model_version} since {period.began_at.isoformat()}"


def _told(period: ServingPeriod) -> Select[int]:
    return select(ReviewTask.task_id).where(ReviewTask.kind == "rollback", ReviewTask.subject == _task_subject(period))


def made_in(period: ServingPeriod) -> tuple[ColumnElement[bool], ...]:
    """Conditions for the results of a period's version since it began, whatever became of them."""
    return (
        Result.model_name == period.model_name,
        Result.model_version == period.model_version,
        Result.created_at >= period.began_at - _CLOCKS_APART,
    )


def _to_do_again(period: ServingPeriod) -> Select[Result]:
    """Never released, and of the newest version of its study. What a quarantine or a pause stopped stays stopped."""
    return (
        select(Result)
        .join(StudyVersion, StudyVersion.version_id == Result.version_id)
        .join(Study, Study.study_instance_uid == Result.study_instance_uid)
        .where(
            *made_in(period),
            Study.version == StudyVersion.number,
            or_(
                Result.state.in_([ResultState.PENDING, ResultState.FAILED]),
                and_(Result.state == ResultState.HELD, Result.verdict == "hold"),
            ),
        )
        .order_by(Result.created_at, Result.result_id)
    )


def _others(session: Session, old: Sequence[Result]) -> Sequence[Result]:
    """What the same series has besides: parts that were released, or that the contract of the model excluded."""
    first = old[0]
    return session.scalars(
        select(Result).where(
            Result.version_id == first.version_id,
            Result.series_instance_uid == first.series_instance_uid,
            Result.model_name == first.model_name,
            Result.state != ResultState.SUPERSEDED,
            Result.result_id.not_in([r.result_id for r in old]),
        )
    ).all()


def _refresh(session: Session, study_instance_uid: str) -> None:
    """The study's state, and the alarm that it was parked, unless something else of it still is."""
    if study_state.refresh(session, study_instance_uid) != StudyState.FAILED:
        clear_alarms(session, kind="parked", subject=ledger.study_subject(study_instance_uid), by="watch")
