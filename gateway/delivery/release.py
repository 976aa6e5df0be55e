"""Step `release`: a judged and encoded result becomes deliveries, in one transaction with its state (EMR-48)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import quarantine, study_state, superseding
from gateway.delivery.contact import AnyDestination, kind_of
from gateway.durable import ROUTINE, Enqueuer, delivery_queue
from gateway.settings import DestinationSettings
from gateway.workflows import DELIVER
from storage import ledger
from storage.alarms import raise_alarm
from storage.database import Database
from storage.records import Delivery, DeliveryState, Result, ResultObject, ResultState, StudyVersion, utc_now


class Release:
    """Step `release` of the story: "released", "held" or "superseded"."""

    def __init__(self, *, database: Database, destinations: DestinationSettings, enqueuer: Enqueuer) -> None:
        self._database = database
        self._destinations = destinations
        self._enqueuer = enqueuer

    def release(self, result_id: str) -> str:
        """Every destination gets its delivery and queue entry; a held result leaves only its notice, if configured."""
        with self._database.session() as session:
            result = session.get_one(Result, result_id)
            if result.state != ResultState.PENDING:
                return str(result.state)
            version = session.get_one(StudyVersion, result.version_id)
            if self._newer_was_declared(session, version):
                outcome = self._supersede(session, result)
            elif (stop := quarantine.reason_to_stop(session, result.study_instance_uid)) is not None:
                outcome = quarantine.hold_result(session, result, stop)
            elif result.verdict == "hold":
                outcome = self._hold(session, result)
            else:
                outcome = self._release(session, result)
            session.flush()
            study_state.refresh(session, result.study_instance_uid)
            return outcome

    def _release(self, session: Session, result: Result) -> str:
        result.state, result.finished_at = ResultState.RELEASED, utc_now()
        names = [d.name for d in self._destinations.all]
        self._deliver(session, result, self._destinations.all)
        session.flush()
        superseding.replaced_by(session, result)
        _record(session, result, "released", {"verdict": result.verdict, "destinations": names})
        if not names:
            message = "a result was released but destinations.toml names nobody to send it to"
            raise_alarm(session, kind="no-destination", subject="gateway", message=message)
        return str(ResultState.RELEASED)

    def _hold(self, session: Session, result: Result) -> str:
        failed = [c for c in result.checks or [] if c["verdict"] == "hold"]
        reason = "; ".join(f"{c['name']} {c['segment'] or ''}: {c['value']} (limit: {c['limit']})" for c in failed)
        result.state, result.finished_at = ResultState.HELD, utc_now()
        result.state_reason = f"held by QA: {reason}"
        notice = session.scalars(
            select(ResultObject).where(ResultObject.result_id == result.result_id, ResultObject.role == "notice")
        ).first()
        if notice is not None:
            self._deliver(session, result, self._destinations.pacs)
        _record(session, result, "held", {"checks": failed, "notice_sent": notice is not None})
        raise_alarm(
            session,
            kind=superseding.ALARM_HELD,
            subject=ledger.study_subject(result.study_instance_uid),
            message=f"{result.model_name} {result.model_version}: {result.state_reason}",
        )
        superseding.replaced_by_none(session, result)
        return str(ResultState.HELD)

    def _supersede(self, session: Session, result: Result) -> str:
        result.state, result.finished_at = ResultState.SUPERSEDED, utc_now()
        result.state_reason = "a newer version of the study was declared whole before this result was released"
        _record(session, result, "superseded", {"reason": result.state_reason})
        return str(ResultState.SUPERSEDED)

    def _deliver(self, session: Session, result: Result, destinations: Sequence[AnyDestination]) -> None:
        now = utc_now()
        for destination in destinations:
            key = hashlib.sha256(f"{result.result_id}\n{destination.name}".encode()).hexdigest()[:40]
            workflow_id = f"delivery-{key}"
            session.add(
                Delivery(
                    delivery_id=key,
                    result_id=result.result_id,
                    destination=destination.name,
                    kind=kind_of(destination),
                    state=DeliveryState.QUEUED,
                    attempts=0,
                    queued_at=now,
                    updated_at=now,
                    next_attempt_at=now,
                    workflow_id=workflow_id,
                )
            )
            self._enqueuer.enqueue(
                session,
                queue=delivery_queue(destination.name),
                workflow=DELIVER,
                workflow_id=workflow_id,
                argument=key,
                priority=ROUTINE,
            )

    @staticmethod
    def _newer_was_declared(session: Session, version: StudyVersion) -> bool:
        newer = session.scalars(
            select(StudyVersion.number)
            .where(StudyVersion.study_instance_uid == version.study_instance_uid, StudyVersion.number > version.number)
            .limit(1)
        ).first()
        return newer is not None


def _record(session: Session, result: Result, kind: str, detail: dict[str, object]) -> None:
    ledger.append(
        session,
        subject=ledger.study_subject(result.study_instance_uid),
        kind=kind,
        actor="worker",
        detail={"result_id": result.result_id, **detail},
    )
