"""Deleted studies, those that must not be, and what is kept of them for drift (OPS-57): tables without identity.

What remains of a deleted study is a digest of its Study Instance UID and of its objects' ids, which nobody can turn
back. Both are needed: an old copy of the spool must not bring the study back, and what is sent again is new work.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, LargeBinary, String, Text, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from storage.records import Record

_TAIL_BYTES = 8


class DeletionState(enum.StrEnum):
    UNDER_WAY = "under-way"  # decided, and not to be undone; nothing reads or writes the study any more
    DONE = "done"  # rows and files are gone from their places


class StudyDeletion(Record):
    """One deletion of a study, written down before anything of it is removed."""

    __tablename__ = "study_deletions"
    deletion_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    study_key: Mapped[str] = mapped_column(String(32), index=True)  # a digest of the UID (storage/spool.py)
    study_instance_uid: Mapped[str | None] = mapped_column(String(64))  # None once it is done
    why: Mapped[str] = mapped_column(String(16))  # retention | request
    by: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str] = mapped_column(Text)
    in_spite_of: Mapped[list[Any]]  # kinds of reasons that stood against it (--force)
    state: Mapped[str] = mapped_column(String(16), index=True)
    asked_at: Mapped[datetime]
    done_at: Mapped[datetime | None]
    objects: Mapped[int] = mapped_column(Integer, default=0)
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    object_tails: Mapped[bytes] = mapped_column(LargeBinary, default=b"")  # the random half of each object id
    # What a step that was at work may still write, and its workflows; None once they are swept.
    result_ids: Mapped[list[Any] | None] = mapped_column(JSON)
    workflow_ids: Mapped[list[Any] | None] = mapped_column(JSON)


class LegalHold(Record):
    """A study that neither retention nor a request deletes, until somebody lifts it."""

    __tablename__ = "legal_holds"
    study_instance_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_instance_uid"), primary_key=True)
    since: Mapped[datetime]
    by: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str] = mapped_column(Text)


class PastFacts(Record):
    """What was kept of a study for drift, and goes on counting after retention removed it: no UID, no name, no id that
    leads anywhere (StudyFacts and what the model made of it)."""

    __tablename__ = "past_facts"
    facts_id: Mapped[str] = mapped_column(String(40), primary_key=True)  # by chance
    model_name: Mapped[str] = mapped_column(String(128))
    model_version: Mapped[str] = mapped_column(String(32))
    scanner: Mapped[str] = mapped_column(String(128))
    recorded_at: Mapped[datetime]
    acquisition: Mapped[dict[str, Any]]
    image: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    measurements: Mapped[list[Any] | None] = mapped_column(JSON)
    mean_confidence: Mapped[float | None] = mapped_column(Float)
    verdict: Mapped[str] = mapped_column(String(16))
    __table_args__ = (Index("ix_past_facts_model", "model_name", "model_version", "recorded_at"),)


def object_tail(object_id: str) -> bytes:
    """The random half of an object id (storage/spool.py)."""
    return bytes.fromhex(object_id)[-_TAIL_BYTES:]


def tails_of(joined: bytes) -> frozenset[bytes]:
    """Those of one row."""
    return frozenset(joined[start : start + _TAIL_BYTES] for start in range(0, len(joined), _TAIL_BYTES))


def deleted_objects(session: Session, study_keys: Collection[str]) -> dict[tuple[str, bytes], str]:
    """(study key, object tail) of what was deleted of these studies → the deletion."""
    rows = session.execute(
        select(StudyDeletion.study_key, StudyDeletion.deletion_id, StudyDeletion.object_tails).where(
            StudyDeletion.study_key.in_(study_keys)
        )
    )
    return {(key, tail): deletion_id for key, deletion_id, joined in rows for tail in tails_of(joined)}


def times_deleted(session: Session, study_key: str) -> int:
    """How often a study with this key was here and is gone."""
    return (
        session.scalar(select(func.count()).select_from(StudyDeletion).where(StudyDeletion.study_key == study_key)) or 0
    )
