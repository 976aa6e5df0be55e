"""One attempt to bring one result's report to one EMR (CARD-04, EMR-47)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from emr.content import (
    Code,
    ReportCheck,
    ReportContent,
    ReportModel,
    ReportObject,
    ReportSegment,
    ReportSeries,
    Verdict,
)
from emr.errors import EmrError, Misconfigured, PatientNotResolved, TryLater
from emr.receipt import ReportReceipt
from emr.report import build_bundle
from engine.bundle import Bundle
from gateway import quarantine, study_state
from gateway.delivery.attempt import DESTINATION_REFUSES, QUERY_REFUSES
from gateway.delivery.bookkeeping import cut_short, record_delivery, withheld_words
from gateway.delivery.contact import destination_row, note_contact
from gateway.delivery.destination import OutgoingObject
from gateway.delivery.emr_connection import Emr
from gateway.delivery.reported import ReportedObjects
from gateway.delivery.retry import backoff_s, overdue_attempts, patience_ended
from gateway.destination_settings import FhirDestination
from gateway.errors import Permanent
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.records import Delivery, DeliveryState, Result, ResultState, Series, Study, utc_now

BundleOf = Callable[[str, str], Bundle]
"""(model name, version) → its bundle."""

_LOOKS = 8  # accepted, but asked for so often and not shown: a person has to look (about ten minutes by default)


class Reporting:
    """Sends reports; `clients` by destination name."""

    def __init__(
        self,
        *,
        database: Database,
        clients: Mapping[str, Emr],
        reported: ReportedObjects,
        bundle_of: BundleOf,
        institution: str,
        software_version: str,
    ) -> None:
        self._database = database
        self._clients = clients
        self._reported = reported
        self._bundle_of = bundle_of
        self._institution = institution
        self._software_version = software_version

    def wait_s(self, session: Session, delivery: Delivery, *, now: datetime) -> float:
        """See ReportedObjects.wait_s."""
        return self._reported.wait_s(session, delivery, now=now)

    def attempt(self, delivery_id: str, destination: FhirDestination, *, now: datetime) -> dict[str, Any]:
        """{"state", "retry_in_s"}, and "away" where the EMR as a whole is.

        What the EMR has accepted is never sent again, only asked for. A patient that is not resolved holds the report,
        an EMR that is not set up for us holds all of them: asked again, and alarmed. Raises Permanent when the EMR
        refuses the content, when the patience is used up, and for a result that is not released.
        """
        client = self._clients[destination.name]
        with self._database.reading() as session:
            delivery = session.get_one(Delivery, delivery_id)
            result = session.get_one(Result, delivery.result_id)
            result_id, report_id = result.result_id, _report_id(delivery)
            if report_id is None:
                _require_release(result, destination)
        if report_id is None:
            objects = self._reported.objects(result_id, now=now)
            with self._database.reading() as session:
                content = self._content(session, session.get_one(Result, result_id), destination, objects)
            try:
                receipt = client.send(content)
            except (TryLater, PatientNotResolved) as error:
                return self._later(delivery_id, destination, error, now=now)
            except EmrError as error:
                self._answered(destination)
                raise Permanent(f"{destination.name}: {error}") from error
            self._accepted(delivery_id, destination, receipt)
            report_id = receipt.report_id
        try:
            found = client.verify(str(report_id), result_id)
        except EmrError as error:
            return self._not_verified(delivery_id, destination, error, now=now)
        if not found:
            return self._not_verified(delivery_id, destination, None, now=now)
        return self._verified(delivery_id, destination)

    @staticmethod
    def rehearse() -> None:
        """Build one invented report and throw it away: the FHIR models are made at first use, which takes seconds."""
        content = ReportContent(
            result_id="rehearsal",
            study_instance_uid="2.25.1",
            series=ReportSeries(series_instance_uid="2.25.5"),
            patient_id="rehearsal",
            model=ReportModel(name="rehearsal", version="0.0.0", weights_digest="0" * 64),
            segments=(
                ReportSegment(
                    number=1,
                    name="rehearsal",
                    code=Code(scheme="SCT", value="91723000", meaning="Anatomical Structure"),
                    volume_ml=0.0,
                    voxels=0,
                ),
            ),
            verdict=Verdict.PASS,
            checks=(ReportCheck(name="rehearsal", value="none", limit="none", verdict=Verdict.PASS),),
            objects=(
                ReportObject(
                    role="SEG", sop_class_uid="2.25.2", sop_instance_uid="2.25.3", series_instance_uid="2.25.4"
                ),
            ),
            issued=datetime(2026, 1, 1, tzinfo=UTC),
            software_version="0",
        )
        build_bundle(content, "Patient/rehearsal")

    def _answered(self, destination: FhirDestination) -> None:
        with self._database.session() as session:
            note_contact(session, destination_row(session, destination), away=False, reason="")

    def _accepted(self, delivery_id: str, destination: FhirDestination, receipt: ReportReceipt) -> None:
        """Before anything else is asked: whatever happens now, the report is not sent again."""
        with self._database.session() as session:
            delivery = session.get_one(Delivery, delivery_id)
            result = session.get_one(Result, delivery.result_id)
            entries = [
                {"type": e.resource_type, "reference": e.reference, "created": e.created} for e in receipt.entries
            ]
            delivery.state, delivery.state_reason = DeliveryState.STORED, None
            delivery.next_attempt_at = delivery.updated_at = utc_now()
            delivery.objects = [
                {"attempts": delivery.attempts, "report_id": receipt.report_id, "how": receipt.how, "entries": entries}
            ]
            result.report_id = receipt.report_id
            note_contact(session, destination_row(session, destination), away=False, reason="")
            clear_alarms(session, kind=DESTINATION_REFUSES, subject=_writing(destination), by="gateway")
            clear_alarms(session, kind="report-held", subject=f"delivery:{delivery_id}", by="gateway")
            fallback = {"kind": "fallback-document", "subject": f"destination:{destination.name}"}
            if receipt.refusal:
                words = f"{destination.name} refuses the report ({receipt.refusal}); one DocumentReference stands in"
                raise_alarm(session, **fallback, message=words)
            elif receipt.how != "document-reference":
                clear_alarms(session, **fallback, by="gateway")

    def _verified(self, delivery_id: str, destination: FhirDestination) -> dict[str, Any]:
        with self._database.session() as session:
            delivery = session.get_one(Delivery, delivery_id)
            delivery.state, delivery.state_reason = DeliveryState.VERIFIED, None
            delivery.next_attempt_at, delivery.updated_at = None, utc_now()
            note_contact(session, destination_row(session, destination), away=False, reason="")
            clear_alarms(session, kind=QUERY_REFUSES, subject=f"destination:{destination.name}", by="gateway")
            return _recorded(session, delivery)

    def _not_verified(
        self, delivery_id: str, destination: FhirDestination, error: EmrError | None, *, now: datetime
    ) -> dict[str, Any]:
        """Stored; `error` None: it is not there. Asked for again, as long as it makes sense."""
        reason = str(error) if error else "not found when it was read back"
        with self._database.session() as session:
            delivery = session.get_one(Delivery, delivery_id, with_for_update=True)
            kept = (delivery.objects or [{}])[0]
            unavailable = isinstance(error, TryLater) and not isinstance(error, Misconfigured)
            looks = kept.get("looks", 0) + (0 if unavailable else 1)
            overdue = overdue_attempts(
                kept.get("overdue", 0), delivery.queued_at, now, give_up_after_s=destination.give_up_after_s
            )
            failures = kept.get("unread", 0) + 1
            delivery.objects = [
                {**kept, "attempts": delivery.attempts, "looks": looks, "overdue": overdue, "unread": failures}
            ]
            delivery.state_reason = f"accepted, but not verified: {reason}"
            delivery.updated_at = utc_now()
            if isinstance(error, Misconfigured):
                subject = f"destination:{destination.name}"
                raise_alarm(session, kind=QUERY_REFUSES, subject=subject, message=f"{destination.name}: {error}")
            if looks < _LOOKS and not patience_ended(overdue):
                wait_s = _wait_s(destination, failures, delivery_id)
                delivery.next_attempt_at = delivery.updated_at + timedelta(seconds=wait_s)
                outcome = _recorded(session, delivery) if failures == 1 else {"state": delivery.state}
                return {**outcome, "retry_in_s": wait_s}
            delivery.next_attempt_at = None
            if error is None:
                words = f"{destination.name} accepted {kept.get('report_id')} and does not show it: look for it there"
                raise_alarm(session, kind="report-not-found", subject=f"delivery:{delivery_id}", message=words)
            return _recorded(session, delivery)

    def _later(
        self, delivery_id: str, destination: FhirDestination, error: TryLater | PatientNotResolved, *, now: datetime
    ) -> dict[str, Any]:
        """Not accepted yet. Only an EMR that lets nobody's report through keeps the others waiting behind this one."""
        away = isinstance(error, TryLater)
        refuses = isinstance(error, Misconfigured)
        with self._database.session() as session:
            delivery = session.get_one(Delivery, delivery_id, with_for_update=True)
            result = session.get_one(Result, delivery.result_id, with_for_update=True)
            kept = delivery.objects[0] if delivery.objects else {}
            # An attempt without an answer is not counted as known: it may have brought the report all the same.
            known = kept.get("attempts", 0) if away and not refuses else delivery.attempts
            overdue = overdue_attempts(
                kept.get("overdue", 0), delivery.queued_at, now, give_up_after_s=destination.give_up_after_s
            )
            # `seggate retry` queues it anew: the waits begin with the shortest again.
            since = delivery.queued_at.isoformat()
            failures = 1 + (kept.get("failures", 0) if kept.get("since") == since else 0)
            delivery.objects = [{"attempts": known, "overdue": overdue, "failures": failures, "since": since}]
            row = destination_row(session, destination)
            note_contact(session, row, away=away, reason=str(error))
            if isinstance(error, Misconfigured):
                subject = _door(destination) if error.whole else _writing(destination)
                words = f"{destination.name}: {error}. Reports wait and go out by themselves once it is settled."
                raise_alarm(session, kind=DESTINATION_REFUSES, subject=subject, message=words)
            if delivery.state != DeliveryState.QUEUED or result.state == ResultState.SUPERSEDED:
                return self._withheld(session, delivery, result)
            if patience_ended(overdue):
                raise Permanent(f"{destination.name}: given up after {destination.give_up_after_s / 3600:g} h: {error}")
            wait_s = _wait_s(destination, failures, delivery_id)
            changed = delivery.state_reason != str(error)
            delivery.state_reason = str(error)
            delivery.updated_at = utc_now()
            delivery.next_attempt_at = delivery.updated_at + timedelta(seconds=wait_s)
            if isinstance(error, PatientNotResolved):
                raise_alarm(session, kind="report-held", subject=f"delivery:{delivery_id}", message=str(error))
            if changed:
                record_delivery(session, result, delivery, {})
                session.flush()
                study_state.refresh(session, result.study_instance_uid)
            return {"state": delivery.state, "retry_in_s": wait_s, "away": isinstance(error, TryLater) and error.whole}

    @staticmethod
    def _withheld(session: Session, delivery: Delivery, result: Result) -> dict[str, Any]:
        """Never tried again: withheld, parked or superseded before it arrived."""
        if delivery.state == DeliveryState.QUEUED:
            quarantine.withhold_delivery(session, result, delivery, result.state_reason or str(result.state))
        clear_alarms(session, kind="report-held", subject=f"delivery:{delivery.delivery_id}", by="gateway")
        if delivery.state == DeliveryState.WITHHELD:
            delivery.state_reason = withheld_words(delivery.state_reason or "", unknown_end=cut_short(delivery))
        delivery.next_attempt_at = None
        session.flush()
        study_state.refresh(session, result.study_instance_uid)
        return {"state": delivery.state, "retry_in_s": None}

    def _content(
        self, session: Session, result: Result, destination: FhirDestination, objects: Sequence[OutgoingObject]
    ) -> ReportContent:
        study = session.get_one(Study, result.study_instance_uid)
        series = session.get(Series, (result.study_instance_uid, result.series_instance_uid))
        bundle = self._bundle_of(result.model_name, result.model_version)
        specs = {s.name: s for s in bundle.labels}
        runtime = result.runtime or {}
        segments = tuple(
            ReportSegment(
                number=number,
                name=m["name"],
                code=Code(
                    scheme=specs[m["name"]].type.scheme,
                    value=specs[m["name"]].type.value,
                    meaning=specs[m["name"]].type.meaning,
                ),
                laterality=specs[m["name"]].laterality,
                volume_ml=m["volume_ml"],
                voxels=m["voxels"],
                confidence=m["confidence"],
                mean_intensity=m["mean_intensity"][0] if m["mean_intensity"] else None,
                intensity_unit=runtime.get("unit", "1"),
            )
            for number, m in enumerate(result.measurements or [], start=1)
        )
        return ReportContent(
            result_id=result.result_id,
            study_instance_uid=result.study_instance_uid,
            series=ReportSeries(
                series_instance_uid=result.series_instance_uid,
                number=runtime.get("series_number"),
                description=(series.series_description if series else None) or "",
                part=result.part,
            ),
            patient_id=study.patient_id or "",
            issuer_of_patient_id=study.issuer_of_patient_id,
            patient_name=study.patient_name,
            accession_number=study.accession_number,
            study_date=_date(study.study_date),
            model=ReportModel(
                name=result.model_name, version=result.model_version, weights_digest=result.weights_digest
            ),
            segments=segments,
            verdict=_verdict(result),
            checks=tuple(
                ReportCheck(
                    name=c["name"],
                    value=_check_value(c),
                    limit=c["limit"],
                    verdict=Verdict(c["verdict"]),
                )
                for c in result.checks or []
            ),
            objects=tuple(
                ReportObject(
                    role=o.role,
                    sop_class_uid=o.sop_class_uid,
                    sop_instance_uid=o.sop_instance_uid,
                    series_instance_uid=o.series_instance_uid,
                )
                for o in objects
                if o.role != "notice"
            ),
            issued=result.created_at,
            software_version=self._software_version,
            mean_confidence=runtime.get("mean_confidence"),
            supersedes_result_id=result.supersedes,
            institution=self._institution,
            wado_root=destination.wado_root or None,
        )


def _require_release(result: Result, destination: FhirDestination) -> None:
    """Only a released result may leave the house; whoever queued another one is mistaken."""
    if result.state != ResultState.RELEASED:
        raise Permanent(
            f"{destination.name}: result {result.result_id} is {result.state}; only released results are reported, "
            "so nothing was sent"
        )


def _report_id(delivery: Delivery) -> str | None:
    """What the EMR accepted already."""
    kept = delivery.objects[0] if delivery.objects else {}
    return str(kept["report_id"]) if "report_id" in kept else None


def _recorded(session: Session, delivery: Delivery) -> dict[str, Any]:
    """The ledger event of an accepted report, and the study's state after it."""
    result = session.get_one(Result, delivery.result_id)
    kept = (delivery.objects or [{}])[0]
    record_delivery(session, result, delivery, {key: kept.get(key) for key in ("report_id", "how")})
    session.flush()
    study_state.refresh(session, result.study_instance_uid)
    return {"state": delivery.state, "retry_in_s": None}


def _wait_s(destination: FhirDestination, failures: int, delivery_id: str) -> float:
    return backoff_s(
        failures, first_retry_s=destination.first_retry_s, max_retry_s=destination.max_retry_s, key=delivery_id
    )


def _door(destination: FhirDestination) -> str:
    """Alarm subject: nobody's report gets through. Cleared by any answer to a Patient search (`note_contact`)."""
    return f"destination:{destination.name}"


def _writing(destination: FhirDestination) -> str:
    """Alarm subject: patients may be searched, but a report was not taken. Cleared by the next one that is."""
    return f"destination:{destination.name}:report"


def _verdict(result: Result) -> Verdict:
    if result.verdict is None:
        raise Permanent(f"result {result.result_id} was released without a QA verdict; it is not reported")
    return Verdict(result.verdict)


def _check_value(check: Mapping[str, Any]) -> float | str:
    """A number only where it says all: neither of one segment, nor an estimate with its bound."""
    value: float | str = check["value"]
    if check.get("bound") is not None:
        value = f"{value}, 90 % bound {check['bound']}"
    return f"{check['segment']}: {value}" if check["segment"] else value


def _date(value: str | None) -> date | None:
    try:
        return datetime.strptime(value, "%Y%m%d").date() if value else None
    except ValueError:
        return None
