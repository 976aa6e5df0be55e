"""The tables of the loop: which version serves, what readers said, what is learnt from it, tested and tried in shadow.

The same rules as in storage/records.py. No column holds anything that names a patient but DICOM UIDs.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from storage.records import Record


class RunState(enum.StrEnum):
    """Where a training for a new version is."""

    WAITING = "waiting"  # for labels of chosen cases, from a reader
    QUEUED = "queued"
    TRAINING = "training"  # cases are being written, or the network trained
    TESTING = "testing"  # the bundle is there; the sanity suite runs
    CANDIDATE = "candidate"  # ACCEPTED; in shadow, or waiting for a person
    PROMOTED = "promoted"
    REFUSED = "refused"  # REJECTED or OUTSIDE_PLAN
    FAILED = "failed"  # with the reason


class ServingPeriod(Record):
    """A version as champion, from its promotion to the next; the open one (`ended_at` NULL) is what should serve."""

    __tablename__ = "serving_periods"
    period_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    model_name: Mapped[str] = mapped_column(String(128))
    model_version: Mapped[str] = mapped_column(String(32))
    weights_digest: Mapped[str] = mapped_column(String(64))
    previous_version: Mapped[str | None] = mapped_column(String(32))  # what served before, to roll back to
    began_at: Mapped[datetime]
    began_by: Mapped[str] = mapped_column(String(128))
    watched_until: Mapped[datetime | None]  # when the first studies had passed the watch; None: still watched
    ended_at: Mapped[datetime | None]
    ended_why: Mapped[str | None] = mapped_column(Text)
    rolled_back: Mapped[bool] = mapped_column(default=False)
    __table_args__ = (Index("ix_serving_periods_open", "model_name", "ended_at"),)


class ModelPause(Record):
    """A model that runs on no new study; what is ordered meanwhile is held and run when it resumes."""

    __tablename__ = "model_pauses"
    model_name: Mapped[str] = mapped_column(String(128), primary_key=True)
    since: Mapped[datetime]
    by: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str] = mapped_column(Text)


class Correction(Record):
    """What a reader said of a result: the labels that are right for its series. A later one replaces an earlier one."""

    __tablename__ = "corrections"
    correction_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    result_id: Mapped[str] = mapped_column(ForeignKey("results.result_id"), index=True)
    model_name: Mapped[str] = mapped_column(String(128), index=True)
    kind: Mapped[str] = mapped_column(String(16))  # approved | corrected | rejected | opened
    by: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str | None] = mapped_column(Text)
    recorded_at: Mapped[datetime]
    labels_path: Mapped[str | None] = mapped_column(Text)  # relative to the spool's root; None without other labels
    labels_digest: Mapped[str | None] = mapped_column(String(64))
    dice: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # of the result against these labels, by label name
    seconds: Mapped[int | None] = mapped_column(Integer)  # that the reader took
    learnt_by: Mapped[str | None] = mapped_column(String(40))  # run_id of the training that used it


class LearningRun(Record):
    """A fine-tuning or full training for a new version of a model, from the choice of cases to the verdict."""

    __tablename__ = "learning_runs"
    run_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    model_name: Mapped[str] = mapped_column(String(128), index=True)
    kind: Mapped[str] = mapped_column(String(16))  # fine-tuning | retraining
    base_version: Mapped[str] = mapped_column(String(32))
    semver: Mapped[str | None] = mapped_column(String(32))  # of the candidate, once it is registered
    requested_by: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16), index=True)
    state_reason: Mapped[str | None] = mapped_column(Text)
    cases: Mapped[list[Any] | None] = mapped_column(JSON)  # result_id, why it was chosen, confidence
    folder: Mapped[str | None] = mapped_column(Text)  # below the models folder
    requested_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    workflow_id: Mapped[str] = mapped_column(String(128), unique=True)
    figures: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class GateReport(Record):
    """One examination of a version by the sanity suite: a look at the locked cases that is never repeated unseen."""

    __tablename__ = "gate_reports"
    report_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    model_name: Mapped[str] = mapped_column(String(128), index=True)
    model_version: Mapped[str] = mapped_column(String(32))
    champion_version: Mapped[str | None] = mapped_column(String(32))
    weights_digest: Mapped[str] = mapped_column(String(64))
    plan_digest: Mapped[str] = mapped_column(String(64))  # of the change plan that it was measured by
    change: Mapped[str] = mapped_column(String(16))  # fine-tuning | retraining | import
    requested_by: Mapped[str] = mapped_column(String(128))
    examined_at: Mapped[datetime]
    verdict: Mapped[str] = mapped_column(String(16))  # ACCEPTED | REJECTED | OUTSIDE_PLAN
    report: Mapped[dict[str, Any]]


class ShadowRun(Record):
    """What a version in shadow made of a study beside the champion. There are no objects, so nothing can leave."""

    __tablename__ = "shadow_runs"
    shadow_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    result_id: Mapped[str] = mapped_column(ForeignKey("results.result_id"), index=True)
    model_name: Mapped[str] = mapped_column(String(128))
    model_version: Mapped[str] = mapped_column(String(32))
    workflow_id: Mapped[str] = mapped_column(String(128), unique=True)
    ordered_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(Integer, default=0)  # begun; above the limit it has failed
    state: Mapped[str] = mapped_column(String(16))  # pending | done | failed | skipped
    state_reason: Mapped[str | None] = mapped_column(Text)
    verdict: Mapped[str | None] = mapped_column(String(16))  # of QA: pass | review | hold
    dice: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # against the champion's labels, by label name
    figures: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # volumes, confidence, seconds
    __table_args__ = (UniqueConstraint("result_id", "model_version"),)


class ReviewTask(Record):
    """Something that a person is asked to look at, with the studies that show it."""

    __tablename__ = "review_tasks"
    task_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(16))  # drift | training-data | label | rollback
    model_name: Mapped[str] = mapped_column(String(128), index=True)
    model_version: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(String(160))
    summary: Mapped[str] = mapped_column(Text)
    result_ids: Mapped[list[Any]]
    picture: Mapped[str | None] = mapped_column(Text)  # below the state folder
    opened_at: Mapped[datetime]
    closed_at: Mapped[datetime | None]
    closed_by: Mapped[str | None] = mapped_column(String(128))
    outcome: Mapped[str | None] = mapped_column(Text)
