"""Rows of a study on its way, for tests of what works on rows: study, version, result, deliveries."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from gateway.delivery.destination import Role
from gateway.delivery.ladder import LadderState, ObjectProgress, Rung
from gateway.durable import Enqueuer
from storage.learning_records import LearningRun, RunState
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

STUDY_UID = "1.2.3.4"
SERIES_UID = "1.2.3.4.5"


@dataclass
class NotedQueue(Enqueuer):
    """Notes what is enqueued and forgotten instead of doing it; `gone` are workflows that have ended, with how."""

    gone: dict[str, str] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def enqueue(self, session: Session, **how: Any) -> None:
        assert session.in_transaction()
        self.calls.append(how)

    def ended(self, workflow_ids: Collection[str]) -> dict[str, str]:
        return {w: self.gone[w] for w in workflow_ids if w in self.gone}

    def forget(self, workflow_ids: Collection[str]) -> None:
        self.forgotten.extend(sorted(workflow_ids))

    def close(self) -> None:
        pass

    @property
    def ids(self) -> list[str]:
        return [str(call["workflow_id"]) for call in self.calls]


def add_study(session: Session, state: StudyState, *, version: int = 1, uid: str = STUDY_UID) -> Study:
    now = utc_now()
    study = Study(
        study_instance_uid=uid,
        study_key=f"key of {uid}",
        state=state,
        version=version,
        first_received_at=now,
        last_received_at=now,
        calling_ae="CT1",
    )
    session.add(study)
    session.flush()
    return study


def add_version(
    session: Session,
    number: int = 1,
    *,
    content_digest: str = "",
    declared_at: datetime | None = None,
    routed: bool = True,
    uid: str = STUDY_UID,
) -> StudyVersion:
    now = utc_now()
    version = StudyVersion(
        version_id=f"{uid} v{number}",
        study_instance_uid=uid,
        number=number,
        content_digest=content_digest or f"{number}" * 64,
        declared_at=declared_at or now,
        rule="quiet-after-release",
        evidence={},
        object_ids=[],
        workflow_id=f"study {uid} {number}",
        routed_at=now if routed else None,
    )
    session.add(version)
    session.flush()
    return version


def add_result(
    session: Session,
    state: ResultState,
    *,
    result_id: str = "r1",
    version: int = 1,
    created_at: datetime | None = None,
    uid: str = STUDY_UID,
    **columns: Any,
) -> Result:
    result = Result(
        result_id=result_id,
        version_id=f"{uid} v{version}",
        study_instance_uid=uid,
        series_instance_uid=SERIES_UID,
        part="",
        rule="hippocampus",
        model_name="tiny",
        model_version="1.0.0",
        weights_digest="w" * 64,
        configuration_digest="c" * 64,
        state=state,
        workflow_id=f"result {result_id}",
        created_at=created_at or utc_now(),
        attempts=0,
        **columns,
    )
    session.add(result)
    session.flush()
    return result


def add_delivery(
    session: Session,
    state: DeliveryState,
    *,
    destination: str = "pacs",
    result_id: str = "r1",
    updated_at: datetime | None = None,
    next_attempt_at: datetime | None = None,
    **columns: Any,
) -> Delivery:
    now = utc_now()
    delivery = Delivery(
        delivery_id=f"{result_id} to {destination}",
        result_id=result_id,
        destination=destination,
        kind="dimse",
        state=state,
        attempts=columns.pop("attempts", 0),
        queued_at=columns.pop("queued_at", now),
        updated_at=updated_at or now,
        next_attempt_at=next_attempt_at,
        workflow_id=f"delivery {result_id} {destination}",
        **columns,
    )
    session.add(delivery)
    session.flush()
    return delivery


def kept_ladder(encoding: str, *taken: str, refused: Sequence[str] = ()) -> dict[str, Any]:
    """What a delivery to a PACS keeps in `objects`: an image and, if named, its report, taken in this encoding."""
    now = utc_now()
    roles: tuple[tuple[Role, str], ...] = (("SC" if encoding == "SC" else "SEG", "1.2.3"), ("SR", "1.2.4"))
    objects = tuple(
        ObjectProgress(sop_instance_uid=uid, sop_class_uid=sop_class, role=role, encoding=encoding, rung=Rung.STORED)
        for uid, (role, sop_class) in zip(taken, roles, strict=False)
    )
    state = replace(LadderState.new("d", now), encoding=encoding, refused=tuple(refused), objects=objects)
    return state.as_dict()


def add_training(
    session: Session, state: RunState, *, run_id: str = "a", model: str = "liver", updated_at: datetime | None = None
) -> LearningRun:
    now = utc_now()
    run = LearningRun(
        run_id=run_id,
        model_name=model,
        kind="fine-tuning",
        base_version="1.0.0",
        requested_by="policy",
        reason="drift of noise",
        state=state,
        requested_at=now,
        updated_at=updated_at or now,
        workflow_id=f"learn-{run_id}",
    )
    session.add(run)
    session.flush()
    return run
