"""Rows of a canary study, for tests of what works on rows."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from storage.canary_records import CANARY_RULE, CanaryRun
from storage.records import Association, Instance, InstanceState, Result, ResultState, StudyState, utc_now
from storage.spool import object_path, study_key
from tests.support.story_rows import add_result, add_study, add_version

UID, SERIES = "2.25.42", "2.25.43"
AE = "SEGGATE_CANARY"


def add_run(session: Session, *, uid: str = UID, started_at: datetime | None = None, within_s: float = 60) -> CanaryRun:
    """A canary of the model "tiny" that was sent just now."""
    started = started_at or utc_now()
    run = CanaryRun(
        study_instance_uid=uid,
        model_name="tiny",
        model_version="1.0.0",
        case_name="plans-grid",
        calling_ae=AE,
        address="127.0.0.1",
        started_at=started,
        due_at=started + timedelta(seconds=within_s),
        sent_at=started,
    )
    session.add(run)
    session.flush()
    return run


def add_objects(
    session: Session, count: int = 2, *, uid: str = UID, calling_ae: str = AE, peer_address: str = "127.0.0.1"
) -> list[Instance]:
    """Objects of the study from one association."""
    session.add(
        Association(
            association_id=f"a {uid}",
            calling_ae=calling_ae,
            called_ae="SEGGATE",
            peer_address=peer_address,
            opened_at=utc_now(),
            instances=count,
        )
    )
    rows = []
    for number in range(count):
        object_id = f"{int(uid.split('.')[-1]):016x}{number:016x}"
        rows.append(
            Instance(
                object_id=object_id,
                study_instance_uid=uid,
                series_instance_uid=SERIES,
                sop_instance_uid=f"{uid}.{number}",
                state=InstanceState.CURRENT,
                digest="d" * 64,
                size_bytes=1,
                spool_path=object_path(study_key(uid), object_id),
                received_at=utc_now(),
                association_id=f"a {uid}",
                calling_ae=calling_ae,
                called_ae="SEGGATE",
                peer_address=peer_address,
            )
        )
    session.add_all(rows)
    session.flush()
    return rows


def add_canary(
    session: Session,
    state: ResultState = ResultState.PENDING,
    *,
    uid: str = UID,
    result_id: str = "canary",
    verdict: str | None = "pass",
    started_at: datetime | None = None,
) -> Result:
    """Run, study, objects, version and result of a canary that is at work."""
    add_run(session, uid=uid, started_at=started_at)
    add_study(session, StudyState.PROCESSING, uid=uid).study_key = study_key(uid)
    objects = add_objects(session, uid=uid)
    add_version(session, uid=uid).object_ids = [row.object_id for row in objects]
    result = add_result(session, state, result_id=result_id, uid=uid, verdict=verdict)
    result.rule = CANARY_RULE
    session.flush()
    return result
