"""`seggate tasks list`, `show` and `close`: what a person is asked to look at."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

from gateway.commands.output import local, print_json, printable, say, table
from gateway.errors import Rejected
from gateway.monitoring.review_tasks import close_task, open_tasks
from gateway.settings import Settings, load_settings
from gateway.state import existing_database
from storage.learning_records import ReviewTask
from storage.records import Result


def list_(config: Path, *, model: str | None, as_json: bool) -> int:
    """0; the open tasks, oldest first."""
    settings = load_settings(config)
    with existing_database(settings).reading() as session:
        found = open_tasks(session, model_name=model)
    if as_json:
        print_json([_document(task, settings) for task in found])
    elif not found:
        say("no open review tasks")
    else:
        rows = [(task.task_id, task.kind, task.subject, task.summary, local(task.opened_at)) for task in found]
        table("", ("no.", "kind", "subject", "what", "since"), rows)
    return 0


def show(config: Path, number: int, *, as_json: bool) -> int:
    """0 with the task, its studies and its picture; 1 where there is no such task."""
    settings = load_settings(config)
    with existing_database(settings).reading() as session:
        task = session.get(ReviewTask, number)
        if task is None:
            say(f"seggate: there is no review task {number}")
            return 1
        studies = {
            result_id: result.study_instance_uid if (result := session.get(Result, result_id)) else None
            for result_id in task.result_ids
        }
    document = {**_document(task, settings), "studies": studies}
    if as_json:
        print_json(document)
        return 0
    closed = f"closed by {task.closed_by} at {local(task.closed_at)}: {task.outcome}" if task.closed_at else "open"
    say(f"review task {number}, {task.kind}, {printable(task.subject)}, since {local(task.opened_at)}; {closed}")
    say(printable(task.summary))
    if document["picture"]:
        say(f"picture: {document['picture']}")
    if studies:
        table("", ("result", "study"), list(studies.items()), whole=("result", "study"))
    return 0


def close(config: Path, number: int, *, outcome: str | None, as_json: bool) -> int:
    """0 when the task was closed, 1 where there is no such open task, 2 without an outcome."""
    if not outcome or not outcome.strip():
        say("seggate: --outcome is needed: what came of it")
        return 2
    settings = load_settings(config)
    try:
        with existing_database(settings).session() as session:
            task = close_task(session, number, by=f"user:{getpass.getuser()}", outcome=outcome.strip())
    except Rejected as error:
        say(f"seggate: {error}")
        return 1
    if as_json:
        print_json(_document(task, settings))
    else:
        say(f"review task {number} closed")
    return 0


def _document(task: ReviewTask, settings: Settings) -> dict[str, Any]:
    document = {column.key: getattr(task, column.key) for column in ReviewTask.__table__.columns}
    return {**document, "picture": str(settings.state_dir / task.picture) if task.picture else None}
