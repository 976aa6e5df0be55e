"""What became of canaries, and that they are late: alarms, without models or files (OPS-59).

The scheduler looks too: where no worker takes work, no worker can say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.durable import Enqueuer
from storage import alarms, ledger
from storage.canary_records import CanaryRun
from storage.database import Database
from storage.records import Result, ResultState, Study, utc_now

ALARM = "canary"
_BY = "canary"
_GATEWAY = "gateway"
_GRACE = timedelta(seconds=30)
"""That a worker has to compare a result before the scheduler calls it late."""


def tell(session: Session, model_name: str, what: str) -> None:
    """The canary's alarm of a model."""
    message = f"the canary of {model_name}: {what}"
    alarms.raise_alarm(session, kind=ALARM, subject=ledger.model_subject(model_name), message=message)


def record(
    session: Session,
    run: CanaryRun,
    *,
    outcome: str,
    detail: str | None,
    seconds: float | None = None,
    dice: Mapping[str, float | None] | None = None,
) -> str:
    """Keep what a run gave, and raise or clear the alarm; a run that was judged already stays as it is."""
    if run.outcome is not None:
        return run.outcome
    run.outcome, run.detail, run.judged_at = outcome, detail, utc_now()
    run.seconds, run.dice = seconds, dict(dice) if dice is not None else None
    if outcome == "wrong":
        tell(session, run.model_name, f"version {run.model_version}, {detail}")
    elif outcome == "good":
        for subject in (ledger.model_subject(run.model_name), _GATEWAY):
            alarms.clear_alarms(session, kind=ALARM, subject=subject, by=_BY)
    session.flush()
    return outcome


def overdue(session: Session, run: CanaryRun, now: datetime) -> tuple[str, str] | None:
    """Outcome and detail of a run that has no result in time: too slow, and where its study stands. None while there is
    time. One whose sender ended in the middle says nothing."""
    if now <= run.due_at:
        return None
    if run.sent_at is None:
        return "void", "its sender ended before all of it was sent"
    if _was_in_time(session, run):
        return None
    return "wrong", _why_late(session, run)


def _was_in_time(session: Session, run: CanaryRun) -> bool:
    """Whether its result came in time and only waits to be compared: the jobs of a worker take turns."""
    released = select(Result.result_id).where(
        Result.study_instance_uid == run.study_instance_uid,
        Result.state == ResultState.RELEASED,
        Result.finished_at <= run.due_at,
    )
    return session.scalars(released.limit(1)).first() is not None


def _why_late(session: Session, run: CanaryRun) -> str:
    within = f"slow: no result within {(run.due_at - run.started_at).total_seconds():g} s"
    study = session.get(Study, run.study_instance_uid)
    if study is None:
        return f"{within}; none of its objects is in the index, is the indexer up?"
    result = session.scalars(select(Result).where(Result.study_instance_uid == study.study_instance_uid)).first()
    if result is not None and result.state == "pending":
        begun = "an inference was begun" if result.attempts else "no worker has begun its inference"
        return f"{within}; {begun}"
    reason = f": {study.state_reason}" if study.state_reason else ""
    return f"{within}; its study is {study.state}{reason}"


class CanaryWatch:
    """Of one scheduler: tells that canaries are late. `job_id` is the workflow of a run of the job."""

    def __init__(self, database: Database, *, within_s: float) -> None:
        self._database = database
        self._within = timedelta(seconds=within_s)
        self._enqueued: dict[str, datetime] = {}

    def note(self, job_id: str, due: datetime) -> None:
        """A run of the job was put on the workers' queue."""
        self._enqueued.setdefault(job_id, due)

    def look(self, enqueuer: Enqueuer, now: datetime) -> int:
        """Tell what is late; how many. Raises DatabaseAway."""
        for job_id in enqueuer.ended(self._enqueued):
            del self._enqueued[job_id]
        waiting = [due for due in self._enqueued.values() if due + self._within < now]
        with self._database.session() as session:
            late = session.scalars(
                select(CanaryRun).where(CanaryRun.judged_at.is_(None), CanaryRun.due_at < now - _GRACE)
            ).all()
            for run in late:
                found = overdue(session, run, now)
                if found is not None:
                    record(session, run, outcome=found[0], detail=f"{found[1]}; no worker has compared it")
            if waiting:
                message = (
                    f"slow: the run of the job canary that was due at {min(waiting):%Y-%m-%d %H:%M} UTC has not ended; "
                    "is a worker up?"
                )
                alarms.raise_alarm(session, kind=ALARM, subject=_GATEWAY, message=message)
        return len(late) + len(waiting)
