"""The scheduler: APScheduler fires cron lines from the configuration; its jobs live in memory only.

`sweep` looks for work that was left behind: versions, results and deliveries whose workflow was never enqueued are
enqueued; those whose workflow has ended without them (it ran into its recovery limit, or failed in a way that nobody
foresaw) are parked with the reason, so that an operator sees them and `seggate retry` puts them back. A training of
which a workflow has ended like that has failed, with its alarm; `seggate learn retry` goes on. Results that were
released while destinations.toml named nobody go to those that it names now. Enqueuing twice is once (the workflow id),
so several schedulers may sweep at the same time. The first sweep is at the start.

Other jobs (gateway/scheduled_jobs.py) are durable workflows of a worker, which the scheduler starts when they are due.
That canaries are late is told here too: where no worker takes work, no worker can say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import structlog
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from gateway import parking
from gateway.delivery.release import send_unsent
from gateway.due_work import enqueue_delivery, enqueue_result, enqueue_version
from gateway.durable import Enqueuer
from gateway.learning import runs
from gateway.monitoring.canary_watch import CanaryWatch
from gateway.scheduled_jobs import JOB_LIST, Job, enqueue_job, last_due
from gateway.settings import Settings
from storage.database import Database
from storage.errors import DatabaseAway
from storage.records import (
    Delivery,
    DeliveryState,
    Result,
    ResultState,
    Study,
    StudyState,
    StudyVersion,
    utc_now,
)

_log = structlog.get_logger(__name__)
_LEFT_BEHIND_AFTER = timedelta(minutes=5)


class Scheduler:
    """Fires the configured jobs until stopped."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._enqueuer: Enqueuer | None = None
        self._canaries = CanaryWatch(database, within_s=settings.gateway.canary.result_within_s)
        # However late: a busy machine delays a job, and never skips it.
        defaults = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        self._scheduler = BackgroundScheduler(timezone="UTC", job_defaults=defaults)

    def start(self) -> None:
        """Raises ValueError on a malformed cron line."""
        cron = self._settings.gateway.scheduler.sweep_cron
        if cron:
            trigger = CronTrigger.from_crontab(cron, timezone="UTC")
            self._scheduler.add_job(self._sweep, trigger, id="sweep", next_run_time=utc_now())
        for job in JOB_LIST.values():
            line = job.cron(self._settings.gateway.scheduler)
            if line:
                trigger = CronTrigger.from_crontab(line, timezone="UTC")
                # At the start too: a run that was missed is made up for.
                self._scheduler.add_job(self._start_due, trigger, args=[job], id=job.name, next_run_time=utc_now())
        self._enqueuer = Enqueuer(self._database)
        self._scheduler.start()

    def stop(self) -> None:
        self._scheduler.shutdown(wait=True)
        if self._enqueuer is not None:
            self._enqueuer.close()

    def _sweep(self) -> None:
        if self._enqueuer is None:
            return
        try:
            found = sweep(self._database, self._enqueuer)
            late = send_unsent(self._database, self._enqueuer, self._settings.destinations)
            self._canaries.look(self._enqueuer, utc_now())
        except DatabaseAway as error:
            _log.warning("sweep skipped", error=str(error))
            return
        if found:
            _log.info("sweep found work that was left behind", count=found)
        if late:
            _log.info("results that had nowhere to go are on their way", deliveries=late)

    def _start_due(self, job: Job) -> None:
        """The run that was due last, once, whoever finds it."""
        due = last_due(job.cron(self._settings.gateway.scheduler), utc_now())
        if self._enqueuer is None or due is None:
            return
        try:
            with self._database.session() as session:
                started = enqueue_job(session, self._enqueuer, job.name, due)
            if job.name == "canary":
                self._canaries.note(started, due)
        except DatabaseAway as error:
            _log.warning("job not started", job=job.name, error=str(error))


def sweep(database: Database, enqueuer: Enqueuer) -> int:
    """Enqueue what has no workflow and park what has lost it; returns how much was looked at.

    Work whose workflow waits or runs is untouched: the same workflow id is the same workflow.
    """
    before = utc_now() - _LEFT_BEHIND_AFTER
    with database.reading() as session:
        workflow_ids = [
            *(version.workflow_id for version in _versions(session, before)),
            *(result.workflow_id for result in _results(session, before)),
            *(delivery.workflow_id for delivery in _deliveries(session, before)),
            *(workflow for run in runs.left_behind(session, before) for workflow in runs.awaited_workflows(run)),
        ]
    ended = enqueuer.ended(workflow_ids)
    with database.session() as session:
        # Looked up again: what a workflow did before it ended is seen now.
        versions, results, deliveries = (
            _versions(session, before),
            _results(session, before),
            _deliveries(session, before),
        )
        for version in versions:
            if version.workflow_id in ended:
                parking.park_study(session, version.version_id, "sweep", _lost(ended[version.workflow_id]))
                continue
            enqueue_version(session, enqueuer, version)
        for result in results:
            if result.workflow_id in ended:
                parking.park_result(session, result.result_id, "sweep", _lost(ended[result.workflow_id]))
                continue
            enqueue_result(session, enqueuer, result)
        for delivery in deliveries:
            if delivery.workflow_id in ended:
                parking.park_delivery(session, delivery.delivery_id, _lost(ended[delivery.workflow_id]))
                continue
            enqueue_delivery(session, enqueuer, delivery)
        lost = _fail_trainings(session, before, ended)
    return len(versions) + len(results) + len(deliveries) + lost


def _fail_trainings(session: Session, before: datetime, ended: Mapping[str, str]) -> int:
    """How many can never go on. They wait for days, and rightly, while their workflows do."""
    lost = 0
    for run in runs.left_behind(session, before):
        how = next((ended[workflow] for workflow in runs.awaited_workflows(run) if workflow in ended), None)
        if how is not None:
            runs.fail_run(session, runs.get_run(session, run.run_id, lock=True), "sweep", _lost(how))
            lost += 1
    return lost


def _lost(how: str) -> str:
    return f"its workflow ended ({how.lower()}) and left it unfinished; see the log"


def _versions(session: Session, before: datetime) -> Sequence[StudyVersion]:
    """Newest versions that wait for routing or for their results to be ordered."""
    return session.scalars(
        select(StudyVersion)
        .join(Study, Study.study_instance_uid == StudyVersion.study_instance_uid)
        .where(
            Study.state.in_([StudyState.WHOLE, StudyState.PROCESSING]),
            Study.version == StudyVersion.number,
            StudyVersion.declared_at < before,
            ~exists().where(Result.version_id == StudyVersion.version_id),
        )
    ).all()


def _results(session: Session, before: datetime) -> Sequence[Result]:
    return session.scalars(select(Result).where(Result.state == ResultState.PENDING, Result.created_at < before)).all()


def _deliveries(session: Session, before: datetime) -> Sequence[Delivery]:
    """Deliveries under way whose next attempt is long due."""
    return session.scalars(
        select(Delivery).where(
            Delivery.state.in_([DeliveryState.QUEUED, DeliveryState.SENT, DeliveryState.STORED]),
            Delivery.next_attempt_at.is_not(None),
            Delivery.next_attempt_at < before,
            Delivery.updated_at < before,
        )
    ).all()
