"""The tables: what survives a restart besides the spool and the models folder.

SQLAlchemy 2 declarative models; `migrations/` holds the same as Alembic revisions and a test proves both equal.
Times are timezone-aware UTC. Identifiers of ours are hex strings; DICOM UIDs are stored as received after a check.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """Timezone-aware UTC in, timezone-aware UTC out, on SQLite too (which forgets zones)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime reached the database; use storage.records.utc_now()")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_now() -> datetime:
    """The current time, timezone-aware."""
    return datetime.now(UTC)


class Record(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {  # noqa: RUF012 - read by SQLAlchemy at class creation
        dict[str, Any]: JSON,
        list[Any]: JSON,
        datetime: UtcDateTime,
    }


class StudyState(enum.StrEnum):
    """Where a study is on its way (the way of a study: docs/architecture.md)."""

    RECEIVING = "receiving"  # objects arrive; not yet declared whole
    WHOLE = "whole"  # declared whole, with evidence; its workflow is enqueued
    PROCESSING = "processing"  # routing or a model is at work
    UNMATCHED = "unmatched"  # no rule wanted any series; the reasons are in the ledger
    DELIVERING = "delivering"  # results exist and are on their way
    VERIFIED = "verified"  # every result reached every destination as far as it can be checked
    HELD = "held"  # QA held a result: nothing but a notice leaves
    QUARANTINED = "quarantined"  # two identities, or a conflict only a person can decide
    FAILED = "failed"  # parked: the ledger says at which step and why; `seggate retry`
    DELETING = "deleting"  # its deletion was decided; nothing is made of it or sent, and soon it is gone


class InstanceState(enum.StrEnum):
    """What became of one received object. Every acknowledged object has exactly one of these."""

    CURRENT = "current"  # part of its study
    DUPLICATE = "duplicate"  # the same SOP Instance UID with the same data set digest: counted, nothing else
    CONFLICT = "conflict"  # the same SOP Instance UID with other content, kept beside the first, not used
    REPLACED = "replaced"  # was current; the policy took a newer version instead
    QUARANTINED = "quarantined"  # unreadable or illegal; the reason names the attribute
    OWN_RESULT = "own_result"  # a result of this (or another) gateway that came back


class ResultState(enum.StrEnum):
    """Where one model's result for one series is."""

    PENDING = "pending"  # its workflow is enqueued or running
    NOT_RUN = "not_run"  # the model's contract excludes the series; the reason is machine-readable
    HELD = "held"  # QA verdict hold
    RELEASED = "released"  # objects written; deliveries exist
    SUPERSEDED = "superseded"  # a newer version of the study replaced it
    FAILED = "failed"


class DeliveryState(enum.StrEnum):
    """The delivery ladder (OUT-42). Nothing below STORED is ever called delivered."""

    QUEUED = "queued"
    SENT = "sent"  # bytes left; no per-object status yet
    STORED = "stored"  # every object answered with success or a warning
    VERIFIED = "verified"  # read back by query
    PARKED = "parked"  # given up, with the reason; `seggate retry`
    WITHHELD = "withheld"  # not sent on purpose (superseded or held), with the reason


class Association(Record):
    """One DICOM association, as evidence for completeness."""

    __tablename__ = "associations"
    association_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    calling_ae: Mapped[str] = mapped_column(String(16))
    called_ae: Mapped[str] = mapped_column(String(16))
    peer_address: Mapped[str] = mapped_column(String(64))
    opened_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    ended: Mapped[str | None] = mapped_column(String(16))  # released | aborted | lost
    instances: Mapped[int] = mapped_column(Integer, default=0)


class Refusal(Record):
    """An association or object that was refused, counted per peer and reason (REC-04)."""

    __tablename__ = "refusals"
    refusal_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(32))  # association | object
    calling_ae: Mapped[str] = mapped_column(String(16))
    called_ae: Mapped[str] = mapped_column(String(16))
    peer_address: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(Text)
    first_at: Mapped[datetime]
    last_at: Mapped[datetime]
    count: Mapped[int] = mapped_column(Integer, default=1)
    __table_args__ = (UniqueConstraint("kind", "calling_ae", "called_ae", "peer_address", "reason"),)


class Study(Record):
    """One study as received; the identity attributes are the first non-empty values seen (CMP-18)."""

    __tablename__ = "studies"
    study_instance_uid: Mapped[str] = mapped_column(String(64), primary_key=True)
    study_key: Mapped[str] = mapped_column(String(32), unique=True)  # folder name in the spool
    state: Mapped[str] = mapped_column(String(16), index=True)
    state_reason: Mapped[str | None] = mapped_column(Text)
    patient_id: Mapped[str | None] = mapped_column(String(256))
    patient_name: Mapped[str | None] = mapped_column(Text)
    patient_birth_date: Mapped[str | None] = mapped_column(String(32))
    patient_sex: Mapped[str | None] = mapped_column(String(16))
    issuer_of_patient_id: Mapped[str | None] = mapped_column(String(256))
    accession_number: Mapped[str | None] = mapped_column(String(64))
    study_id: Mapped[str | None] = mapped_column(String(64))
    study_date: Mapped[str | None] = mapped_column(String(32))
    study_description: Mapped[str | None] = mapped_column(Text)
    first_received_at: Mapped[datetime]
    last_received_at: Mapped[datetime]
    calling_ae: Mapped[str] = mapped_column(String(16))  # of the last object: settings are per sender
    version: Mapped[int] = mapped_column(Integer, default=0)  # of the last StudyVersion, 0 = none yet
    wish: Mapped[str | None] = mapped_column(String(16))  # operator: complete | wait
    __table_args__ = (Index("ix_studies_state_last", "state", "last_received_at"),)


class Series(Record):
    """One series of a study; a series UID that appears under two studies is a row in each."""

    __tablename__ = "series"
    study_instance_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_instance_uid"), primary_key=True)
    series_instance_uid: Mapped[str] = mapped_column(String(64), primary_key=True)
    modality: Mapped[str | None] = mapped_column(String(16))
    series_description: Mapped[str | None] = mapped_column(Text)
    first_received_at: Mapped[datetime]
    last_received_at: Mapped[datetime]


class Instance(Record):
    """One acknowledged object: exactly one row per object in the spool (the conservation law)."""

    __tablename__ = "instances"
    object_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    study_instance_uid: Mapped[str | None] = mapped_column(String(64), index=True)  # None: unreadable
    series_instance_uid: Mapped[str | None] = mapped_column(String(64))
    sop_instance_uid: Mapped[str | None] = mapped_column(String(64), index=True)
    sop_class_uid: Mapped[str | None] = mapped_column(String(64))
    transfer_syntax_uid: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), index=True)
    state_reason: Mapped[str | None] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(String(64))  # SHA-256 of the data set bytes as received
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    spool_path: Mapped[str] = mapped_column(Text)  # relative to the spool's root
    received_at: Mapped[datetime]
    association_id: Mapped[str] = mapped_column(String(32))
    calling_ae: Mapped[str] = mapped_column(String(16))
    called_ae: Mapped[str] = mapped_column(String(16))
    peer_address: Mapped[str] = mapped_column(String(64))


class StudyVersion(Record):
    """A study as declared whole: the set of objects, the evidence, and the workflow made from it."""

    __tablename__ = "study_versions"
    version_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    study_instance_uid: Mapped[str] = mapped_column(ForeignKey("studies.study_instance_uid"), index=True)
    number: Mapped[int] = mapped_column(Integer)
    content_digest: Mapped[str] = mapped_column(String(64))  # SHA-256 over sorted (SOP Instance UID, digest)
    declared_at: Mapped[datetime]
    rule: Mapped[str] = mapped_column(String(32))  # which completeness rule declared it
    evidence: Mapped[dict[str, Any]]
    object_ids: Mapped[list[Any]]
    workflow_id: Mapped[str] = mapped_column(String(128), unique=True)
    rule_set_digest: Mapped[str | None] = mapped_column(String(64))
    routed_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("study_instance_uid", "number"),)


class RoutingDecision(Record):
    """For one series of one version and one rule: true or false, with the values that decided (RTE-21)."""

    __tablename__ = "routing_decisions"
    decision_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("study_versions.version_id"), index=True)
    series_instance_uid: Mapped[str] = mapped_column(String(64))
    rule: Mapped[str] = mapped_column(String(128))
    matched: Mapped[bool]
    model: Mapped[str | None] = mapped_column(String(128))
    explanation: Mapped[dict[str, Any]]


class RuleSet(Record):
    """A routes file that was valid and has been used; the text is kept so that the past explains itself."""

    __tablename__ = "rule_sets"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    loaded_at: Mapped[datetime]
    text: Mapped[str] = mapped_column(Text)


class Result(Record):
    """One model's result for one series (or one split part of it) of one study version."""

    __tablename__ = "results"
    result_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("study_versions.version_id"), index=True)
    study_instance_uid: Mapped[str] = mapped_column(String(64), index=True)
    series_instance_uid: Mapped[str] = mapped_column(String(64))
    part: Mapped[str] = mapped_column(String(64), default="")  # which split part of the series (CMP-20)
    rule: Mapped[str] = mapped_column(String(128))
    model_name: Mapped[str] = mapped_column(String(128))
    model_version: Mapped[str] = mapped_column(String(32))
    weights_digest: Mapped[str] = mapped_column(String(64))
    configuration_digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), index=True)
    state_reason: Mapped[str | None] = mapped_column(Text)
    workflow_id: Mapped[str] = mapped_column(String(128), unique=True)
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(Integer, default=0)  # inferences begun; above the limit it is parked
    verdict: Mapped[str | None] = mapped_column(String(16))  # pass | review | hold
    checks: Mapped[list[Any] | None] = mapped_column(JSON)  # QA checks: name, value, limit, verdict
    measurements: Mapped[list[Any] | None] = mapped_column(JSON)  # per segment: label, volume_ml, voxels, ...
    runtime: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # backend, provider, seconds per stage, memory
    supersedes: Mapped[str | None] = mapped_column(String(40))  # result_id of the version this one replaces
    report_id: Mapped[str | None] = mapped_column(String(128))  # DiagnosticReport id at the EMR


class StudyFacts(Record):
    """What is kept of the study behind a result, to notice drift: written once, with the result's measurements."""

    __tablename__ = "study_facts"
    result_id: Mapped[str] = mapped_column(ForeignKey("results.result_id"), primary_key=True)
    model_name: Mapped[str] = mapped_column(String(128))
    model_version: Mapped[str] = mapped_column(String(32))
    scanner: Mapped[str] = mapped_column(String(128))  # manufacturer and model, "" where the headers do not say
    recorded_at: Mapped[datetime]
    acquisition: Mapped[dict[str, Any]]  # categories and numbers by stream (gateway/monitoring/acquisition.py)
    image: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # engine.intensity_baseline.StudySummary
    __table_args__ = (Index("ix_study_facts_model", "model_name", "model_version", "recorded_at"),)


class ResultObject(Record):
    """A DICOM object of a result, written once to the spool and sent again unchanged (QUE-27)."""

    __tablename__ = "result_objects"
    sop_instance_uid: Mapped[str] = mapped_column(String(64), primary_key=True)
    result_id: Mapped[str] = mapped_column(ForeignKey("results.result_id"), index=True)
    role: Mapped[str] = mapped_column(String(16))  # SEG | SR | SC | notice
    encoding: Mapped[str] = mapped_column(String(16))  # BINARY | LABELMAP | SR | SC
    sop_class_uid: Mapped[str] = mapped_column(String(64))
    series_instance_uid: Mapped[str] = mapped_column(String(64))
    transfer_syntax_uid: Mapped[str] = mapped_column(String(64))
    spool_path: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(String(64))  # SHA-256 of the whole file
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    repairs: Mapped[list[Any] | None] = mapped_column(JSON)  # what was repaired or dropped in source headers


class Delivery(Record):
    """One result on its way to one destination; `objects` holds each object's own status."""

    __tablename__ = "deliveries"
    delivery_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    result_id: Mapped[str] = mapped_column(ForeignKey("results.result_id"), index=True)
    destination: Mapped[str] = mapped_column(String(64), index=True)
    kind: Mapped[str] = mapped_column(String(16))  # dimse | dicomweb | orthanc | fhir
    state: Mapped[str] = mapped_column(String(16), index=True)
    state_reason: Mapped[str | None] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    queued_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    next_attempt_at: Mapped[datetime | None]
    workflow_id: Mapped[str] = mapped_column(String(128), unique=True)
    objects: Mapped[list[Any] | None] = mapped_column(JSON)
    __table_args__ = (UniqueConstraint("result_id", "destination"),)


class DestinationState(Record):
    """What is known of a destination: is it up (circuit), and what does it accept (capability)."""

    __tablename__ = "destination_states"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    address: Mapped[str | None] = mapped_column(String(64))  # SHA-256 of kind and address that the rest is true of
    circuit: Mapped[str] = mapped_column(String(8), default="closed")  # closed = in use, open = down
    since: Mapped[datetime]
    failures: Mapped[int] = mapped_column(Integer, default=0)
    last_error: Mapped[str | None] = mapped_column(Text)
    capability: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class Executor(Record):
    """Heartbeat of a process that runs workflows, so that a live one can take over a dead one's work."""

    __tablename__ = "executors"
    executor_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    role: Mapped[str] = mapped_column(String(16))
    host: Mapped[str] = mapped_column(String(128))
    pid: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[datetime]
    beat_at: Mapped[datetime] = mapped_column(index=True)
    busy_with: Mapped[str | None] = mapped_column(String(128))  # result_id of a running inference
    deadline_at: Mapped[datetime | None]  # past this the supervisor ends the process (QUE-28)
    stopped_at: Mapped[datetime | None]  # clean stop


class LedgerEvent(Record):
    """One event of the append-only, hash-chained record (storage/ledger.py)."""

    __tablename__ = "ledger"
    event_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    subject: Mapped[str] = mapped_column(String(160), index=True)  # study:<uid> | model:<name> | gateway
    sequence: Mapped[int] = mapped_column(Integer)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(64), index=True)
    actor: Mapped[str] = mapped_column(String(128))
    detail: Mapped[dict[str, Any]]
    previous_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))
    __table_args__ = (UniqueConstraint("subject", "sequence"),)


class Alarm(Record):
    """Something a person must look at; stays until cleared."""

    __tablename__ = "alarms"
    alarm_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(160))
    message: Mapped[str] = mapped_column(Text)
    raised_at: Mapped[datetime]
    last_at: Mapped[datetime]
    count: Mapped[int] = mapped_column(Integer, default=1)
    cleared_at: Mapped[datetime | None]
    cleared_by: Mapped[str | None] = mapped_column(String(128))
    seen_at: Mapped[datetime | None]  # somebody has taken it on: it stays open, and quiet
    seen_by: Mapped[str | None] = mapped_column(String(128))
    seen_reason: Mapped[str | None] = mapped_column(Text)
    quiet_until: Mapped[datetime | None]  # snoozed: quiet until then; None with seen_at: acknowledged
    __table_args__ = (Index("ix_alarms_open", "kind", "subject", "cleared_at"),)
