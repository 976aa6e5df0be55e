"""`seggate retry`: parked work goes on from where it stopped, under a new workflow id (QUE-30).

A study that no rule wanted, or whose series no model took, is judged again by the rules and models of today. What was
released while destinations.toml named nobody goes to the destinations of today.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import quarantine, study_state, superseding
from gateway.delivery.release import clear_if_none_is_unsent, send_unsent_of, unsent_studies
from gateway.destination_settings import DestinationSettings
from gateway.due_work import enqueue_delivery, enqueue_result, enqueue_version
from gateway.durable import URGENT, Enqueuer, next_workflow_id
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


def retriable_studies(database: Database) -> list[str]:
    """Studies in which something is parked, oldest first; then those with a result that had nowhere to go."""
    with database.reading() as session:
        parked = session.scalars(
            select(Study.study_instance_uid).where(Study.state == StudyState.FAILED).order_by(Study.last_received_at)
        )
        return list(dict.fromkeys([*parked, *unsent_studies(session)]))


def retry_study(
    database: Database, enqueuer: Enqueuer, destinations: DestinationSettings, study_instance_uid: str, *, actor: str
) -> Retried:
    """Put everything parked of a study's newest version back on its queue; raises KeyError for an unknown study.

    An unmatched study is routed again. What a quarantine stopped goes on as well, once the study is released from it.
    What had nowhere to go goes to `destinations`.
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
        why = study.state_reason
        if version is not None and study.state not in (StudyState.QUARANTINED, StudyState.DELETING):
            results = list(session.scalars(select(Result).where(Result.version_id == version.version_id)))
            unmade = [r for r in results if _to_be_ordered_anew(study, r)]
            results = [r for r in results if r not in unmade]
            retried = Retried(
                study_instance_uid=study_instance_uid,
                routing=_routing(session, enqueuer, study, version, unmade, results=len(results)),
                results=sum(_result(session, enqueuer, r) for r in results),
                deliveries=sum(
                    _delivery(session, enqueuer, d, actor=actor)
                    for r in results
                    for d in session.scalars(select(Delivery).where(Delivery.result_id == r.result_id))
                )
                + send_unsent_of(session, enqueuer, destinations, study_instance_uid, actor=actor),
            )
        if retried.anything:
            subject = ledger.study_subject(study_instance_uid)
            detail = {
                "reason": why,
                "routing": retried.routing,
                "results": retried.results,
                "deliveries": retried.deliveries,
            }
            ledger.append(session, subject=subject, kind="retried", actor=actor, detail=detail)
            alarms.clear_alarms(session, kind="parked", subject=subject, by=actor)
            superseding.clear_if_none_is_held(session, study_instance_uid, by=actor)
            clear_if_none_is_unsent(session, by=actor)
            if not retried.routing:
                study_state.refresh(session, study_instance_uid)
        return retried


def _routing(
    session: Session, enqueuer: Enqueuer, study: Study, version: StudyVersion, unmade: Sequence[Result], *, results: int
) -> int:
    """Routing and ordering once more, where nothing was ordered, not everything could be, or nothing was to run."""
    failed = study.state == StudyState.FAILED and (unmade or not results)
    if not failed and study.state != StudyState.UNMATCHED:
        return 0
    for result in unmade:
        session.delete(result)
    study.state, study.state_reason = StudyState.WHOLE, None
    route_again(session, enqueuer, version)
    return 1


def _to_be_ordered_anew(study: Study, result: Result) -> bool:
    """Nothing was made of it: its model could not be had, or the contract of the model of that day excluded it."""
    if study.state == StudyState.UNMATCHED:
        return result.state == ResultState.NOT_RUN
    return result.state == ResultState.FAILED and not result.weights_digest


def route_again(session: Session, enqueuer: Enqueuer, version: StudyVersion) -> None:
    """Put routing and ordering of a version back on their queue, ahead of routine work."""
    version.workflow_id = next_workflow_id(version.workflow_id)
    enqueue_version(session, enqueuer, version, priority=URGENT)


def resume_stopped(session: Session, enqueuer: Enqueuer, version_id: str, *, actor: str) -> tuple[int, int]:
    """Results and deliveries of a version that a quarantine stopped are back on their queues: how many of each.

    What is parked or held for another reason stays as it is.
    """
    results = session.scalars(select(Result).where(Result.version_id == version_id)).all()
    deliveries = session.scalars(select(Delivery).where(Delivery.result_id.in_([r.result_id for r in results]))).all()
    return (
        sum(_result(session, enqueuer, r) for r in results if _result_stopped(r)),
        sum(_delivery(session, enqueuer, d, actor=actor) for d in deliveries if _delivery_stopped(d)),
    )


def _result_stopped(result: Result) -> bool:
    return result.state == ResultState.HELD and quarantine.stopped(result.state_reason)


def _delivery_stopped(delivery: Delivery) -> bool:
    return delivery.state == DeliveryState.WITHHELD and quarantine.stopped(delivery.state_reason)


def _result(session: Session, enqueuer: Enqueuer, result: Result) -> int:
    if result.state != ResultState.FAILED and not _result_stopped(result):
        return 0
    result.state, result.state_reason, result.finished_at, result.attempts = ResultState.PENDING, None, None, 0
    result.workflow_id = next_workflow_id(result.workflow_id)
    enqueue_result(session, enqueuer, result, priority=URGENT)
    return 1


def _delivery(session: Session, enqueuer: Enqueuer, delivery: Delivery, *, actor: str) -> int:
    if delivery.state != DeliveryState.PARKED and not _delivery_stopped(delivery):
        return 0
    now = utc_now()
    delivery.state, delivery.state_reason = DeliveryState.QUEUED, None
    delivery.queued_at = delivery.updated_at = delivery.next_attempt_at = now
    delivery.workflow_id = next_workflow_id(delivery.workflow_id)
    enqueue_delivery(session, enqueuer, delivery, priority=URGENT)
    alarms.clear_alarms(session, kind="delivery-parked", subject=f"delivery:{delivery.delivery_id}", by=actor)
    return 1
