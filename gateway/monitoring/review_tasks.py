"""Review tasks: what a person is asked to look at, with the studies that show it and a picture where there is one.

Of one kind and subject one task is open at a time: what happens again brings it up to date. A task is closed by a
person, with what came of it; the ledger keeps both.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.errors import Rejected
from storage import ledger
from storage.learning_records import ReviewTask
from storage.records import utc_now


def open_task(
    session: Session,
    *,
    kind: str,
    model_name: str,
    model_version: str,
    subject: str,
    summary: str,
    result_ids: Sequence[str],
    picture: str | None,
) -> ReviewTask:
    """A new task, or the open one of this kind and subject brought up to date. `picture`: below the state folder."""
    task = open_task_of(session, kind=kind, subject=subject)
    if task is None:
        task = ReviewTask(
            kind=kind,
            model_name=model_name,
            model_version=model_version,
            subject=subject,
            summary=summary,
            result_ids=list(result_ids),
            picture=picture,
            opened_at=utc_now(),
        )
        session.add(task)
        session.flush()
        _record(session, task, "review-task-opened", "gateway", {"summary": summary, "results": list(result_ids)})
    else:
        task.model_version, task.summary, task.result_ids = model_version, summary, list(result_ids)
        task.picture = picture or task.picture
        session.flush()
    return task


def open_task_of(session: Session, *, kind: str, subject: str) -> ReviewTask | None:
    """The open task of a kind and subject."""
    return session.scalars(
        select(ReviewTask)
        .where(ReviewTask.kind == kind, ReviewTask.subject == subject, ReviewTask.closed_at.is_(None))
        .order_by(ReviewTask.task_id)
        .limit(1)
    ).first()


def open_tasks(session: Session, *, model_name: str | None = None) -> Sequence[ReviewTask]:
    """All open tasks, oldest first, or those of a model."""
    query = select(ReviewTask).where(ReviewTask.closed_at.is_(None)).order_by(ReviewTask.opened_at, ReviewTask.task_id)
    return session.scalars(query if model_name is None else query.where(ReviewTask.model_name == model_name)).all()


def close_task(session: Session, task_id: int, *, by: str, outcome: str) -> ReviewTask:
    """Close an open task; raises Rejected, also for one that somebody has closed."""
    task = session.get(ReviewTask, task_id, with_for_update=True)
    if task is None:
        raise Rejected(f"there is no review task {task_id}")
    if task.closed_at is not None:
        raise Rejected(f"review task {task_id} was closed by {task.closed_by} at {task.closed_at:%Y-%m-%d %H:%M} UTC")
    task.closed_at, task.closed_by, task.outcome = utc_now(), by, outcome
    session.flush()
    _record(session, task, "review-task-closed", by, {"outcome": outcome})
    return task


def _record(session: Session, task: ReviewTask, kind: str, actor: str, detail: dict[str, object]) -> None:
    ledger.append(
        session,
        subject=ledger.model_subject(task.model_name),
        kind=kind,
        actor=actor,
        detail={"task": task.task_id, "kind": task.kind, "subject": task.subject, **detail},
    )
