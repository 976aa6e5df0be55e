"""Step `release`: a judged and encoded result becomes deliveries, in one transaction with its state (EMR-48).

A result that was released while destinations.toml named nobody becomes deliveries once it names somebody
(`send_unsent`). A result that went anywhere is not sent to destinations that are added later. The result of a canary is
released, whatever its verdict, and becomes no delivery; whoever compares it is told (OPS-59).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sqlalchemy import Select, exists, select
from sqlalchemy.orm import Session

from gateway import quarantine, study_state, superseding
from gateway.delivery.contact import AnyDestination, kind_of
from gateway.destination_settings import DestinationSettings
from gateway.due_work import enqueue_canary_check, enqueue_delivery
from gateway.durable import Enqueuer
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.canary_records import CANARY_RULE, is_canary
from storage.database import Database
from storage.records import (
    Delivery,
    DeliveryState,
    Result,
    ResultObject,
    ResultState,
    Study,
    StudyState,
    StudyVersion,
    utc_now,
)

_NO_DESTINATION = {"kind": "no-destination", "subject": "gateway"}


class Release:
    """Step `release` of the story: "released", "held" or "superseded"."""

    def __init__(self, *, database: Database, destinations: DestinationSettings, enqueuer: Enqueuer) -> None:
        self._database = database
        self._destinations = destinations
        self._enqueuer = enqueuer

    def release(self, result_id: str) -> str:
        """Every destination gets its delivery and queue entry; a held result leaves only its notice, if configured."""
        with self._database.session() as session:
            result = session.get_one(Result, result_id, with_for_update=True)
            if result.state != ResultState.PENDING:
                return str(result.state)
            version = session.get_one(StudyVersion, result.version_id)
            if self._newer_was_declared(session, version):
                outcome = self._supersede(session, result)
            elif (stop := quarantine.reason_to_stop(session, result.study_instance_uid)) is not None:
                outcome = quarantine.hold_result(session, result, stop)
            elif result.rule == CANARY_RULE:
                outcome = self._release_canary(session, result)
            elif result.verdict == "hold":
                outcome = self._hold(session, result)
            else:
                outcome = self._release(session, result)
            session.flush()
            study_state.refresh(session, result.study_instance_uid)
            return outcome

    def _release(self, session: Session, result: Result) -> str:
        result.state, result.finished_at = ResultState.RELEASED, utc_now()
        names = _deliver(session, self._enqueuer, result, self._destinations.all)
        session.flush()
        superseding.replaced_by(session, result)
        _record(session, result, "released", {"verdict": result.verdict, "destinations": names})
        if not names:
            message = (
                "a result was released but destinations.toml names nobody to send it to; "
                "it is sent once a destination is named and the gateway was started again"
            )
            raise_alarm(session, **_NO_DESTINATION, message=message)
        return str(ResultState.RELEASED)

    def _release_canary(self, session: Session, result: Result) -> str:
        result.state, result.finished_at = ResultState.RELEASED, utc_now()
        _record(session, result, "released", {"verdict": result.verdict, "destinations": [], "canary": True})
        enqueue_canary_check(session, self._enqueuer, result.study_instance_uid, why="released")
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
            _deliver(session, self._enqueuer, result, self._destinations.pacs)
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

    @staticmethod
    def _newer_was_declared(session: Session, version: StudyVersion) -> bool:
        newer = session.scalars(
            select(StudyVersion.number)
            .where(StudyVersion.study_instance_uid == version.study_instance_uid, StudyVersion.number > version.number)
            .limit(1)
        ).first()
        return newer is not None


def send_unsent(database: Database, enqueuer: Enqueuer, destinations: DestinationSettings) -> int:
    """Deliveries of all results that were released while nobody was named; how many. None while nobody is."""
    if not destinations.all:
        return 0
    with database.reading() as session:
        studies = unsent_studies(session)
    made = 0
    for study_instance_uid in studies:
        with database.session() as session:
            made += send_unsent_of(session, enqueuer, destinations, study_instance_uid, actor="sweep")
    with database.session() as session:
        clear_if_none_is_unsent(session, by="sweep")
    return made


def unsent_studies(session: Session) -> list[str]:
    """Studies with a result that was released while nobody was named, oldest result first."""
    return list(dict.fromkeys(row.study_instance_uid for row in session.execute(_unsent())))


def send_unsent_of(
    session: Session, enqueuer: Enqueuer, destinations: DestinationSettings, study_instance_uid: str, *, actor: str
) -> int:
    """The same for one study, in the caller's transaction; the alarm is left to `clear_if_none_is_unsent`."""
    made = 0
    for result_id in session.scalars(_unsent().where(Result.study_instance_uid == study_instance_uid)).all():
        result = session.get_one(Result, result_id, with_for_update=True)
        # Asked once more behind the lock: another process may have done the same in between.
        if not destinations.all or session.execute(_unsent().where(Result.result_id == result_id)).first() is None:
            continue
        names = _deliver(session, enqueuer, result, destinations.all)
        _record(session, result, "queued-late", {"destinations": names}, actor=actor)
        made += len(names)
    if made:
        session.flush()
        study_state.refresh(session, study_instance_uid)
    return made


def clear_if_none_is_unsent(session: Session, *, by: str) -> None:
    """The alarm `no-destination` goes with the last result that has nowhere to go."""
    session.flush()
    if session.execute(_unsent().limit(1)).first() is None:
        clear_alarms(session, **_NO_DESTINATION, by=by)


def _unsent() -> Select[str, str]:
    """Released results of newest versions without a delivery; those of a quarantined study have to wait."""
    return (
        select(Result.result_id, Result.study_instance_uid)
        .join(StudyVersion, StudyVersion.version_id == Result.version_id)
        .join(Study, Study.study_instance_uid == Result.study_instance_uid)
        .where(
            Result.state == ResultState.RELEASED,
            Study.version == StudyVersion.number,
            Study.state != StudyState.QUARANTINED,
            Result.rule != CANARY_RULE,
            ~exists().where(Delivery.result_id == Result.result_id),
        )
        .order_by(Result.finished_at, Result.result_id)
    )


def _deliver(session: Session, enqueuer: Enqueuer, result: Result, destinations: Sequence[AnyDestination]) -> list[str]:
    """A delivery per destination and its queue entry; the destinations' names. None for a canary, whoever asks."""
    if result.rule == CANARY_RULE or is_canary(session, result.study_instance_uid):
        return []
    now = utc_now()
    for destination in destinations:
        key = hashlib.sha256(f"{result.result_id}\n{destination.name}".encode()).hexdigest()[:40]
        delivery = Delivery(
            delivery_id=key,
            result_id=result.result_id,
            destination=destination.name,
            kind=kind_of(destination),
            state=DeliveryState.QUEUED,
            attempts=0,
            queued_at=now,
            updated_at=now,
            next_attempt_at=now,
            workflow_id=f"delivery-{key}",
        )
        session.add(delivery)
        enqueue_delivery(session, enqueuer, delivery)
    return [d.name for d in destinations]


def _record(session: Session, result: Result, kind: str, detail: dict[str, object], *, actor: str = "worker") -> None:
    ledger.append(
        session,
        subject=ledger.study_subject(result.study_instance_uid),
        kind=kind,
        actor=actor,
        detail={"result_id": result.result_id, **detail},
    )
