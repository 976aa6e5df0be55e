"""A study that was received, judged, delivered and verified, with everything that a gateway keeps of it: rows in every
table, files in the spool, events in the ledger."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.learning_records import ReviewTask, ShadowRun
from storage.records import (
    Association,
    DeliveryState,
    Instance,
    InstanceState,
    Record,
    Result,
    ResultObject,
    ResultState,
    RoutingDecision,
    Series,
    StudyFacts,
    StudyState,
    utc_now,
)
from storage.spool import Spool, object_path, study_key
from tests.support.story_rows import SERIES_UID, add_delivery, add_result, add_study, add_version

UID = "1.2.3.4"
NAME, PATIENT, ACCESSION = "Ferrari^Enzo", "MRN-4711", "ACC-0815"
OBJECT_BYTES = 1000


def add_finished(
    database: Database,
    spool: Spool,
    uid: str = UID,
    *,
    days_ago: float = 30,
    objects: int = 3,
    state: StudyState = StudyState.VERIFIED,
    delivered: bool = True,
    verdict: str = "pass",
) -> str:
    """The id of its result. It was received and delivered so many days ago."""
    at = utc_now() - timedelta(days=days_ago)
    result_id = f"r-{study_key(uid)[:20]}"
    key = study_key(uid)
    ids = [spool.new_id() for _ in range(objects)]
    for object_id in ids:
        path = spool.root / object_path(key, object_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * OBJECT_BYTES)
    seg_path, seg_digest = spool.store_result_file(key, result_id, "seg.dcm", b"S" * 500)
    with database.session() as session:
        _add_study(session, uid, state, at, ids)
        labels = {"labels": {"path": seg_path, "sha256": seg_digest}, "mean_confidence": 0.9}
        result = add_result(
            session,
            ResultState.RELEASED if delivered else ResultState.NOT_RUN,
            result_id=result_id,
            uid=uid,
            created_at=at,
            finished_at=at,
            verdict=verdict,
            runtime=labels,
            measurements=[{"name": "liver", "value": 1, "voxels": 9, "volume_ml": 3.5, "confidence": 0.9}],
        )
        _add_what_belongs_to_it(session, result, seg_path, seg_digest, at)
        if delivered:
            delivery = add_delivery(session, DeliveryState.VERIFIED, result_id=result_id, updated_at=at)
            _tell(session, uid, delivery.delivery_id)
        for kind in ("study-opened", "declared-whole", "inferred", "released"):
            detail = {"object_id": ids[0] if ids else None, "result_id": result_id}
            ledger.append(session, subject=ledger.study_subject(uid), kind=kind, actor="worker", detail=detail)
    return result_id


def _add_study(session: Session, uid: str, state: StudyState, at: datetime, ids: list[str]) -> None:
    study = add_study(session, state, uid=uid)
    study.study_key = study_key(uid)
    study.patient_name, study.patient_id, study.accession_number = NAME, PATIENT, ACCESSION
    study.first_received_at = study.last_received_at = at
    add_version(session, uid=uid, declared_at=at).object_ids = list(ids)
    session.add(
        Series(
            study_instance_uid=uid,
            series_instance_uid=SERIES_UID,
            series_description="CT of Enzo",
            first_received_at=at,
            last_received_at=at,
        )
    )
    association = f"a {study_key(uid)[:20]}"
    session.add(
        Association(
            association_id=association,
            calling_ae="CT1",
            called_ae="SEGGATE",
            peer_address="192.0.2.1",
            opened_at=at,
            ended="released",
            instances=len(ids),
        )
    )
    for number, object_id in enumerate(ids):
        session.add(
            Instance(
                object_id=object_id,
                study_instance_uid=uid,
                series_instance_uid=SERIES_UID,
                sop_instance_uid=f"{uid}.7.{number}",
                state=InstanceState.CURRENT,
                digest="d" * 64,
                size_bytes=OBJECT_BYTES,
                spool_path=object_path(study_key(uid), object_id),
                received_at=at,
                association_id=association,
                calling_ae="CT1",
                called_ae="SEGGATE",
                peer_address="192.0.2.1",
            )
        )
    session.flush()


def _add_what_belongs_to_it(session: Session, result: Result, path: str, digest: str, at: datetime) -> None:
    uid = result.study_instance_uid
    session.add(
        RoutingDecision(
            version_id=result.version_id,
            series_instance_uid=SERIES_UID,
            rule="liver",
            matched=True,
            explanation={"values": [NAME]},
        )
    )
    session.add(
        StudyFacts(
            result_id=result.result_id,
            model_name="tiny",
            model_version="1.0.0",
            scanner="ACME One",
            recorded_at=at,
            acquisition={"categories": {"modality": "CT"}, "numbers": {"kvp": 120.0}},
            image=None,
        )
    )
    session.add(
        ResultObject(
            sop_instance_uid=f"{uid}.9",
            result_id=result.result_id,
            role="SEG",
            encoding="BINARY",
            sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4",
            series_instance_uid=f"{uid}.8",
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            spool_path=path,
            digest=digest,
            size_bytes=500,
        )
    )
    session.add(
        ShadowRun(
            result_id=result.result_id,
            model_name="tiny",
            model_version="1.1.0",
            workflow_id=f"shadow {result.result_id}",
            ordered_at=at,
            state="done",
        )
    )
    session.add(
        ReviewTask(
            kind="drift",
            model_name="tiny",
            model_version="1.0.0",
            subject="model:tiny 1.0.0",
            summary="intensities",
            result_ids=[result.result_id, "another"],
            opened_at=at,
            closed_at=at,
        )
    )
    session.flush()


def _tell(session: Session, uid: str, delivery_id: str) -> None:
    """Alarms of the past, one of which quotes what an EMR answered."""
    for kind, subject in (("parked", ledger.study_subject(uid)), ("report-held", f"delivery:{delivery_id}")):
        raise_alarm(session, kind=kind, subject=subject, message=f"the EMR knows no {PATIENT}")
        ledger.append(session, subject=subject, kind="alarm-cleared", actor="user:x", detail={"message": PATIENT})
        clear_alarms(session, kind=kind, subject=subject, by="x")


def everything_in(database: Database) -> str:
    """Every row of every table of ours, as text."""
    with database.reading() as session:
        return "\n".join(
            f"{table.name}: {tuple(row)!r}"
            for table in Record.metadata.sorted_tables
            for row in session.execute(select(table))
        )


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
