"""Work that a change has made due, put on its queue in the transaction of the change: one function per kind of row.

The workflow's id is the row's own, so that asking twice is asking once; whoever wants a second run gives the row
another id first (gateway/retrying.py).
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from gateway.durable import INFERENCE, JOBS, ROUTINE, SHADOW, STUDIES, URGENT_INFERENCE, Enqueuer, delivery_queue
from gateway.routed_work import is_urgent
from gateway.workflows import DELIVER, MAKE_RESULT, PROCESS_STUDY, RUN_JOB, SHADOW_RESULT
from storage.learning_records import ShadowRun
from storage.records import Delivery, Result, StudyVersion

CANARY_CHECK, DELETION = "canary-check", "deletion"


def enqueue_version(session: Session, enqueuer: Enqueuer, version: StudyVersion, *, priority: int = ROUTINE) -> None:
    """Routing and ordering."""
    enqueuer.enqueue(
        session,
        queue=STUDIES,
        workflow=PROCESS_STUDY,
        workflow_id=version.workflow_id,
        argument=version.version_id,
        priority=priority,
    )


def enqueue_result(session: Session, enqueuer: Enqueuer, result: Result, *, priority: int = ROUTINE) -> None:
    """Inference, judgement, encoding, release. `priority`: within its queue, of urgent results or of the others."""
    enqueuer.enqueue(
        session,
        queue=URGENT_INFERENCE if is_urgent(session, result) else INFERENCE,
        workflow=MAKE_RESULT,
        workflow_id=result.workflow_id,
        argument=result.result_id,
        priority=priority,
    )


def enqueue_shadow(session: Session, enqueuer: Enqueuer, run: ShadowRun, *, delay_s: float = 0.0) -> None:
    """A version in shadow on the series of a result, taken up after `delay_s` at the earliest."""
    enqueuer.enqueue(
        session,
        queue=SHADOW,
        workflow=SHADOW_RESULT,
        workflow_id=run.workflow_id,
        argument=str(run.shadow_id),
        delay_s=delay_s,
    )


def enqueue_delivery(
    session: Session, enqueuer: Enqueuer, delivery: Delivery, *, priority: int = ROUTINE, delay_s: float = 0.0
) -> None:
    """Delivery to its destination, taken up after `delay_s` at the earliest."""
    enqueuer.enqueue(
        session,
        queue=delivery_queue(delivery.destination),
        workflow=DELIVER,
        workflow_id=delivery.workflow_id,
        argument=delivery.delivery_id,
        priority=priority,
        delay_s=delay_s,
    )


def enqueue_canary_check(
    session: Session, enqueuer: Enqueuer, study_instance_uid: str, *, why: str, delay_s: float = 0.0
) -> None:
    """Comparing what canaries gave; `why` and the study make it one run (gateway/monitoring/canary.py)."""
    enqueuer.enqueue(
        session,
        queue=JOBS,
        workflow=RUN_JOB,
        workflow_id=f"{CANARY_CHECK} {study_instance_uid} {why}",
        argument=CANARY_CHECK,
        priority=ROUTINE,
        delay_s=delay_s,
    )


def enqueue_deletion(session: Session, enqueuer: Enqueuer, deletion_id: str, *, why: str, delay_s: float) -> None:
    """Finishing deletions, should whoever began this one not do it (gateway/deletion/deletions.py)."""
    enqueuer.enqueue(
        session,
        queue=JOBS,
        workflow=RUN_JOB,
        workflow_id=f"{DELETION} {deletion_id} {why}",
        argument=DELETION,
        priority=ROUTINE,
        delay_s=delay_s,
    )
