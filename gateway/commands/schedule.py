"""`seggate schedule list` and `run`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from gateway.commands.output import local, print_json, say, table
from gateway.durable import Enqueuer
from gateway.scheduled_jobs import JOB_LIST, enqueue_job, last_due, next_due
from gateway.settings import load_settings
from gateway.state import existing_database
from storage.records import utc_now


def list_jobs(config: Path, *, as_json: bool) -> int:
    """0; the jobs with their cron lines, and when they were and will be due."""
    settings, now = load_settings(config).gateway.scheduler, utc_now()
    due = {job.name: _due(job.cron(settings), now) for job in JOB_LIST.values()}
    if as_json:
        print_json(
            [
                {
                    "job": job.name,
                    "cron": job.cron(settings),
                    "due_last": due[job.name][0],
                    "due_next": due[job.name][1],
                    "summary": job.summary,
                }
                for job in JOB_LIST.values()
            ]
        )
    else:
        rows = [
            (job.name, job.cron(settings) or "never", local(due[job.name][1]), job.summary) for job in JOB_LIST.values()
        ]
        table("", ("job", "cron (UTC)", "due next", "what it does"), rows)
    return 0


def run_job(config: Path, name: str, *, as_json: bool) -> int:
    """0 when a run was put on the workers' queue, 1 when there is no such job."""
    if name not in JOB_LIST:
        say(f"seggate: there is no job {name[:80]!r}; there are {', '.join(JOB_LIST)}")
        return 1
    database = existing_database(load_settings(config))
    enqueuer = Enqueuer(database)
    try:
        with database.session() as session:
            found = enqueue_job(session, enqueuer, name, utc_now())
    finally:
        enqueuer.close()
    if as_json:
        print_json({"ok": True, "workflow": found})
    else:
        say(f"{found}: on the queue of the workers")
    return 0


def _due(cron: str, now: datetime) -> tuple[datetime | None, datetime | None]:
    """Last and next."""
    return (last_due(cron, now), next_due(cron, now)) if cron else (None, None)
