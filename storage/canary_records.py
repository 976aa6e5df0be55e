"""Canary studies (OPS-59): the table of those that this gateway has sent to itself.

A study is a canary because its Study Instance UID, which nobody else knows before it is sent, stands here: nothing in
an object makes it one. What it leads to leaves the gateway to nobody and counts in no figure.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ColumnElement, Float, Index, String, Text, exists
from sqlalchemy.orm import InstrumentedAttribute, Mapped, Session, mapped_column

from storage.records import Record

CANARY_RULE = "seggate:canary"
"""The rule of routing decisions and results of canaries. No rule of routes.toml can be called so."""


class CanaryRun(Record):
    """One canary study: a sanity case of a model's version, what was expected of it, and what came."""

    __tablename__ = "canary_runs"
    study_instance_uid: Mapped[str] = mapped_column(String(64), primary_key=True)
    model_name: Mapped[str] = mapped_column(String(128))
    model_version: Mapped[str] = mapped_column(String(32))
    case_name: Mapped[str] = mapped_column(String(64))
    calling_ae: Mapped[str] = mapped_column(String(16))
    address: Mapped[str] = mapped_column(String(64))  # of the receiver, where all of its objects come from, too
    started_at: Mapped[datetime]
    due_at: Mapped[datetime]  # a result that is not there by then is too slow
    sent_at: Mapped[datetime | None]  # when all of its objects were stored
    judged_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(8))  # good | wrong | void
    detail: Mapped[str | None] = mapped_column(Text)  # what is wrong, or why it says nothing
    seconds: Mapped[float | None] = mapped_column(Float)  # from its start to its result
    dice: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # by label name, against what the bundle says
    removed_at: Mapped[datetime | None]  # when its objects and rows were deleted
    __table_args__ = (Index("ix_canary_runs_model", "model_name", "started_at"),)


def is_canary(session: Session, study_instance_uid: str) -> bool:
    return session.get(CanaryRun, study_instance_uid) is not None


def no_canary(study_instance_uid: InstrumentedAttribute[str]) -> ColumnElement[bool]:
    """For a query: the study in this column is not a canary."""
    return ~exists().where(CanaryRun.study_instance_uid == study_instance_uid)
