"""Trainings for a new version of a model: their rows, and how one is asked for, waits for labels and is queued.

    asked for ─▶ waiting (for labels) ─▶ queued ─▶ training ─▶ testing ─▶ candidate ─▶ promoted
                                                                     └──▶ refused

A model has one run at a time. Every change of state is a ledger event of the model.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.durable import ROUTINE, TRAINING, Enqueuer, next_workflow_id
from gateway.errors import Rejected
from gateway.learning.case_choice import CaseChoice
from gateway.monitoring.review_tasks import close_task, open_task_of
from gateway.workflows import FINISH_RUN, PREPARE_RUN, TRAIN_FOLD
from storage import alarms, ledger
from storage.learning_records import LearningRun, RunState, ServingPeriod
from storage.records import utc_now

Kind = Literal["fine-tuning", "retraining"]
FAILED, WAITS = "training-failed", "candidate-waits"
LABEL = "label"
"""Kind of the review task that asks readers for labels."""
UNDER_WAY = (RunState.WAITING, RunState.QUEUED, RunState.TRAINING, RunState.TESTING)
_FOLDERS = "learning"


def run_folder(models_dir: Path, run_id: str) -> Path:
    """Where the files of a run are; shared by all workers."""
    return models_dir / _FOLDERS / run_id


def get_run(session: Session, run_id: str, *, lock: bool = False) -> LearningRun:
    """Raises Rejected where there is none. `lock`: nobody else changes it until the transaction ends."""
    run = session.get(LearningRun, run_id, with_for_update=lock or None)
    if run is None:
        raise Rejected(f"no training {run_id!r}; see `seggate learn list`")
    return run


def run_under_way(session: Session, model_name: str) -> LearningRun | None:
    """What waits, trains or is tested for the model now."""
    return session.scalars(
        select(LearningRun).where(LearningRun.model_name == model_name, LearningRun.state.in_(UNDER_WAY)).limit(1)
    ).first()


def runs_of(session: Session, model_name: str | None, states: Sequence[RunState] | None = None) -> list[LearningRun]:
    """Newest first."""
    query = select(LearningRun).order_by(LearningRun.requested_at.desc(), LearningRun.run_id)
    if model_name is not None:
        query = query.where(LearningRun.model_name == model_name)
    if states is not None:
        query = query.where(LearningRun.state.in_(states))
    return list(session.scalars(query))


def request_run(
    session: Session,
    enqueuer: Enqueuer,
    choice: CaseChoice,
    *,
    kind: Kind,
    base_version: str,
    requested_by: str,
    reason: str,
) -> LearningRun:
    """A run that is queued when the chosen cases suffice, and waits for labels when not. Raises Rejected where one is
    under way."""
    other = run_under_way(session, choice.model_name)
    if other is not None:
        raise Rejected(f"{choice.model_name}: training {other.run_id} is {other.state}; one runs at a time")
    run_id = uuid.uuid4().hex
    now = utc_now()
    run = LearningRun(
        run_id=run_id,
        model_name=choice.model_name,
        kind=kind,
        base_version=base_version,
        requested_by=requested_by,
        reason=reason,
        state=RunState.WAITING,
        state_reason=choice.sentence,
        folder=f"{_FOLDERS}/{run_id}",
        requested_at=now,
        updated_at=now,
        workflow_id=f"learn-{run_id}",
    )
    session.add(run)
    session.flush()
    _record(session, run)
    if choice.ready or kind == "retraining":
        queue_run(session, enqueuer, run, choice)
    return run


def queue_run(session: Session, enqueuer: Enqueuer, run: LearningRun, choice: CaseChoice) -> None:
    """The cases are fixed from here on: those with labels, but for the ones that were drawn for monitoring."""
    run.cases = [
        {"result_id": case.result_id, "why": case.why, "confidence": case.confidence} for case in choice.to_learn
    ]
    move(session, run, RunState.QUEUED, choice.sentence)
    _enqueue(session, enqueuer, PREPARE_RUN, run.workflow_id, run.run_id)


def begin_folds(session: Session, enqueuer: Enqueuer, run: LearningRun, folds: Sequence[str]) -> None:
    """Each fold is a workflow of its own, taken by whichever worker is free. A repeat changes nothing."""
    if has_begun(run):
        return
    run.figures = {**(run.figures or {}), "begun": run.workflow_id, "folds": {fold: "queued" for fold in folds}}
    for fold in folds:
        _enqueue(session, enqueuer, TRAIN_FOLD, _fold_workflow(run, fold), f"{run.run_id}/{fold}")


def fold_done(session: Session, enqueuer: Enqueuer, run: LearningRun, fold: str) -> bool:
    """Whether it was the last: then the run is finished by another workflow. `run` is locked."""
    figures = dict(run.figures or {})
    folds = {**figures.get("folds", {}), fold: "done"}
    run.figures, run.updated_at = {**figures, "folds": folds}, utc_now()
    if set(folds.values()) != {"done"}:
        return False
    _enqueue(session, enqueuer, FINISH_RUN, _finish_workflow(run), run.run_id)
    return True


def move(session: Session, run: LearningRun, state: RunState, reason: str | None = None) -> None:
    """The run is in `state` now; a repeat changes nothing."""
    if run.state == state and run.state_reason == reason:
        return
    run.state, run.state_reason, run.updated_at = state, reason, utc_now()
    session.flush()
    _record(session, run)


def fail_run(session: Session, run: LearningRun, step: str, reason: str) -> str:
    """FAILED with step and reason, and an alarm; `seggate learn retry` goes on. What is trained is kept."""
    if run.state not in UNDER_WAY:
        return str(run.state)
    words = f"{step}: {reason}"
    move(session, run, RunState.FAILED, words)
    alarms.raise_alarm(
        session, kind=FAILED, subject=f"model:{run.model_name}", message=f"training {run.run_id}: {words}"
    )
    return "failed"


def retry_run(session: Session, enqueuer: Enqueuer, run: LearningRun, *, actor: str) -> None:
    """A failed run goes on with what it has. Raises Rejected for one that has not failed."""
    if run.state != RunState.FAILED:
        raise Rejected(f"training {run.run_id} is {run.state}: only one that has failed can go on")
    other = run_under_way(session, run.model_name)
    if other is not None:
        raise Rejected(f"{run.model_name}: training {other.run_id} is {other.state}; one runs at a time")
    run.workflow_id = next_workflow_id(run.workflow_id)
    move(session, run, RunState.QUEUED, f"started again by {actor}")
    alarms.clear_alarms(session, kind=FAILED, subject=f"model:{run.model_name}", by=actor)
    _enqueue(session, enqueuer, PREPARE_RUN, run.workflow_id, run.run_id)


def give_up(session: Session, run: LearningRun, *, actor: str, reason: str) -> None:
    """A run is ended by a person; a fold that trains stops at its next look. Raises Rejected for one that is over."""
    if run.state not in (*UNDER_WAY, RunState.FAILED, RunState.CANDIDATE):
        raise Rejected(f"training {run.run_id} is {run.state} already")
    told = WAITS if run.state == RunState.CANDIDATE else FAILED
    move(session, run, RunState.REFUSED, f"given up by {actor}: {reason}")
    alarms.clear_alarms(session, kind=told, subject=f"model:{run.model_name}", by=actor)
    close_label_task(session, run, by=actor, outcome=f"the training was given up: {reason}")


def label_subject(run: LearningRun) -> str:
    """Of the review task that asks readers for labels."""
    return f"model:{run.model_name} training"


def close_label_task(session: Session, run: LearningRun, *, by: str, outcome: str) -> None:
    """Readers need not look any more, if they were asked to."""
    task = open_task_of(session, kind=LABEL, subject=label_subject(run))
    if task is not None:
        close_task(session, task.task_id, by=by, outcome=outcome)


def left_behind(session: Session, before: datetime) -> list[LearningRun]:
    """Runs that are queued, train or are tested, and of which nothing was heard since `before`."""
    at_work = (RunState.QUEUED, RunState.TRAINING, RunState.TESTING)
    return [run for run in runs_of(session, None, at_work) if run.updated_at < before]


def awaited_workflows(run: LearningRun) -> list[str]:
    """The workflows that a run which is `left_behind` cannot go on without."""
    if not has_begun(run):
        return [run.workflow_id]
    folds = (run.figures or {})["folds"]
    awaited = [_fold_workflow(run, fold) for fold, state in folds.items() if state != "done"]
    return awaited or [_finish_workflow(run)]


def has_begun(run: LearningRun) -> bool:
    """Whether the folds of this attempt are on their queue already."""
    return (run.figures or {}).get("begun") == run.workflow_id


def close_decided(session: Session, model_name: str) -> None:
    """Candidates that somebody has promoted since are decided."""
    for run in runs_of(session, model_name, [RunState.CANDIDATE]):
        served = session.scalars(
            select(ServingPeriod)
            .where(
                ServingPeriod.model_name == model_name,
                ServingPeriod.model_version == run.semver,
                ServingPeriod.began_at >= run.requested_at,
            )
            .order_by(ServingPeriod.period_id)
            .limit(1)
        ).first()
        if served is not None:
            move(session, run, RunState.PROMOTED, f"by {served.began_by}")
            alarms.clear_alarms(session, kind=WAITS, subject=f"model:{model_name}", by=served.began_by)


def is_wanted(session: Session, run_id: str) -> bool:
    """Whether a run is still to go on."""
    run = session.get(LearningRun, run_id)
    return run is not None and run.state in UNDER_WAY


def _fold_workflow(run: LearningRun, fold: str) -> str:
    return f"{run.workflow_id}-fold-{fold}"


def _finish_workflow(run: LearningRun) -> str:
    return f"{run.workflow_id}-finish"


def _enqueue(session: Session, enqueuer: Enqueuer, workflow: str, workflow_id: str, argument: str) -> None:
    enqueuer.enqueue(
        session, queue=TRAINING, workflow=workflow, workflow_id=workflow_id, argument=argument, priority=ROUTINE
    )


def _record(session: Session, run: LearningRun) -> None:
    ledger.append(
        session,
        subject=ledger.model_subject(run.model_name),
        kind=f"training-{run.state}",
        actor=run.requested_by,
        detail={
            "run_id": run.run_id,
            "kind": run.kind,
            "base_version": run.base_version,
            "semver": run.semver,
            "reason": run.state_reason or run.reason,
            "cases": len(run.cases or []),
        },
    )
