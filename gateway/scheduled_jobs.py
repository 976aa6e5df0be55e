"""Jobs that recur: what each does, when it is due, and how one run of it is started once by however many schedulers.

A run is a durable workflow in a worker. Its id is made of the job and the time that it was due, so that several
schedulers that find the same run due start it once. A run that was missed while no scheduler was there is made up for
once, if it was due less than MADE_UP_FOR ago; those before it are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType

from apscheduler.triggers.cron import CronTrigger
from sqlalchemy.orm import Session

from gateway.durable import JOBS, ROUTINE, Enqueuer
from gateway.settings import SchedulerSettings
from gateway.workflows import RUN_JOB
from storage import alarms
from storage.database import Database

MADE_UP_FOR = timedelta(days=1)
FAILED = "job-failed"
_MOST_RUNS = 2 * 24 * 60  # of a job that is due each minute, in the time that is looked at


@dataclass(frozen=True, kw_only=True)
class Job:
    """`cron` reads its line from the configuration; empty is never."""

    name: str
    summary: str
    cron: Callable[[SchedulerSettings], str]


JOB_LIST: Mapping[str, Job] = MappingProxyType(
    {
        job.name: job
        for job in (
            Job(
                name="drift",
                summary="compares each model's latest studies with its first",
                cron=lambda settings: settings.drift_cron,
            ),
            Job(
                name="learning",
                summary="looks whether enough labelled cases wait for a fine-tuning",
                cron=lambda settings: settings.learning_cron,
            ),
            Job(
                name="retraining",
                summary="trains each model anew that has new labelled cases",
                cron=lambda settings: settings.retraining_cron,
            ),
            Job(
                name="canary",
                summary="sends a synthetic study for each model and compares what comes",
                cron=lambda settings: settings.canary_cron,
            ),
            Job(
                name="retention",
                summary="deletes what was delivered, as [retention] says",
                cron=lambda settings: settings.retention_cron,
            ),
        )
    }
)


def last_due(cron: str, now: datetime) -> datetime | None:
    """When a job was due last, at most MADE_UP_FOR ago; None where it was not. ValueError for a malformed line."""
    trigger = CronTrigger.from_crontab(cron, timezone="UTC")
    found: datetime | None = None
    fires: datetime | None = trigger.get_next_fire_time(None, now - MADE_UP_FOR)
    for _ in range(_MOST_RUNS):
        if fires is None or fires > now:
            break
        found, fires = fires, trigger.get_next_fire_time(fires, fires)
    return found


def next_due(cron: str, now: datetime) -> datetime | None:
    """When a job is due next. ValueError for a malformed line."""
    due: datetime | None = CronTrigger.from_crontab(cron, timezone="UTC").get_next_fire_time(None, now)
    return due


def workflow_id(job: str, at: datetime) -> str:
    return f"job {job} {at.isoformat(timespec='seconds')}"


def enqueue_job(session: Session, enqueuer: Enqueuer, job: str, at: datetime) -> str:
    """The id of the workflow; one that is there already is left as it is."""
    name = workflow_id(job, at)
    enqueuer.enqueue(session, queue=JOBS, workflow=RUN_JOB, workflow_id=name, argument=job, priority=ROUTINE)
    return name


class JobSteps:
    """Who does the jobs in a worker: `work` by name, each returns a sentence, with which the workflow ends."""

    def __init__(self, database: Database, work: Mapping[str, Callable[[], str]]) -> None:
        self._database = database
        self._work = work

    def run(self, job: str) -> str:
        said = self._work[job]()
        with self._database.session() as session:
            alarms.clear_alarms(session, kind=FAILED, subject=f"job:{job}", by="worker")
        return said

    def park_job(self, job: str, step: str, reason: str) -> str:
        """The run is given up with an alarm; the next one is due by its cron line."""
        del step
        with self._database.session() as session:
            alarms.raise_alarm(session, kind=FAILED, subject=f"job:{job}", message=reason)
        return "failed"
