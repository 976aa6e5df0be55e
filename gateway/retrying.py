"""`seggate retry`: parked work goes on from where it stopped, under a new workflow id (QUE-30)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import quarantine, study_state
from gateway.durable import INFERENCE, STUDIES, URGENT, Enqueuer, delivery_queue, next_workflow_id
from gateway.workflows import DELIVER, MAKE_RESULT, PROCESS_STUDY
from storage import alarms, ledger
from storage.database import Database
from storage.records import Delivery, DeliveryState, Result, ResultState, Study, StudyState, StudyVersion, utc_now


@dataclass(frozen=True, kw_only=True)
class Retried:
    """What was put back on its queue."""

    study_instance_uid: str
    routing: int
    results: int
    deliveries: int

    @property
    def anything(self) -> bool:
        return bool(self.routing or self.results or self.deliveries)


def parked_studies(database: Database) -> list[str]:
    """Studies in which something is parked, oldest first."""
    with database.reading() as session:
        return list(
            session.scalars(
                select(Study.study_instance_uid)
                .where(Study.state == StudyState.FAILED)
                .order_by(Study.last_received_at)
            )
        )


def retry_study(database: Database, enqueuer: Enqueuer, study_instance_uid: str, *, actor: str) -> Retried:
    """Put everything parked of a study's newest version back on its queue; raises KeyError for an unknown study.

    What a quarantine stopped goes on as well, once the study is released from it.
    """
    with database.session() as session:
        study = session.get(Study, study_instance_uid)
        if study is None:
            raise KeyError(study_instance_uid)
        version = session.scalars(
            select(StudyVersion).where(
                StudyVersion.study_instance_uid == study_instance_uid, StudyVersion.number == study.version
            )
        ).first()
        retried = Retried(study_instance_uid=study_instance_uid, routing=0, results=0, deliveries=0)
        if version is not None and study.state != StudyState.QUARANTINED:
            results = list(session.scalars(select(Result).where(Result.version_id == version.version_id)))
            # Ordered while their model could not be had: they have no identity and are ordered anew.
            unmade = [r for r in results if r.state == ResultState.FAILED and not r.weights_digest]
            results = [r for r in results if r not in unmade]
            retried = Retried(
                study_instance_uid=study_instance_uid,
                routing=_routing(session, enqueuer, study, version, unmade, results=len(results)),
                results=sum(_result(session, enqueuer, r) for r in results),
                deliveries=sum(
                    _delivery(session, enqueuer, d, actor=actor)
                    for r in results
                    for d in session.scalars(select(Delivery).where(Delivery.result_id == r.result_id))
                ),
            )
        if retried.anything:
            subject = ledger.study_subject(study_instance_uid)
            detail = {"routing": retried.routing, "results": retried.results, "deliveries": retried.deliveries}
            ledger.append(session, subject=subject, kind="retried", actor=actor, detail=detail)
            alarms.clear_alarms(session, kind="parked", subject=subject, by=actor)
            if not retried.routing:
                study_state.refresh(session, study_instance_uid)
        return retried


def _routing(
    session: Session, enqueuer: Enqueuer, study: Study, version: StudyVersion, unmade: Sequence[Result], *, results: int
) -> int:
    """Routing and ordering once more, where nothing was ordered or not everything could be."""
    if study.state != StudyState.FAILED or (results and not unmade):
        return 0
    for result in unmade:
        session.delete(result)
    version.workflow_id = next_workflow_id(version.workflow_id)
    study.state, study.state_reason = StudyState.WHOLE, None
    enqueuer.enqueue(
        session,
        queue=STUDIES,
        workflow=PROCESS_STUDY,
        workflow_id=version.workflow_id,
        argument=version.version_id,
        priority=URGENT,
    )
    return 1


def _result(session: Session, enqueuer: Enqueuer, result: Result) -> int:
    stopped = result.state == ResultState.HELD and quarantine.stopped(result.state_reason)
    if result.state != ResultState.FAILED and not stopped:
        return 0
    result.state, result.state_reason, result.finished_at, result.attempts = ResultState.PENDING, None, None, 0
    result.workflow_id = next_workflow_id(result.workflow_id)
    enqueuer.enqueue(
        session,
        queue=INFERENCE,
        workflow=MAKE_RESULT,
        workflow_id=result.workflow_id,
        argument=result.result_id,
        priority=URGENT,
    )
    return 1


def _delivery(session: Session, enqueuer: Enqueuer, delivery: Delivery, *, actor: str) -> int:
    stopped = delivery.state == DeliveryState.WITHHELD and quarantine.stopped(delivery.state_reason)
    if delivery.state != DeliveryState.PARKED and not stopped:
        return 0
    now = utc_now()
    delivery.state, delivery.state_reason = DeliveryState.QUEUED, None
    delivery.queued_at = delivery.updated_at = delivery.next_attempt_at = now
    delivery.workflow_id = next_workflow_id(delivery.workflow_id)
    enqueuer.enqueue(
        session,
        queue=delivery_queue(delivery.destination),
        workflow=DELIVER,
        workflow_id=delivery.workflow_id,
        argument=delivery.delivery_id,
        priority=URGENT,
    )
    alarms.clear_alarms(session, kind="delivery-parked", subject=f"delivery:{delivery.delivery_id}", by=actor)
    return 1
