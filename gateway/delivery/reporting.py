"""One attempt to bring one result's report to one EMR (CARD-04, EMR-47)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from emr.client import EmrClient
from emr.content import (
    Code,
    ReportCheck,
    ReportContent,
    ReportModel,
    ReportObject,
    ReportSegment,
    Verdict,
)
from emr.errors import EmrError, PatientNotResolved, Unavailable
from emr.receipt import ReportReceipt
from emr.report import build_bundle
from engine.bundle import Bundle
from gateway import quarantine, study_state
from gateway.delivery.bookkeeping import cut_short, record_delivery, withheld_words
from gateway.delivery.contact import destination_row, note_contact
from gateway.delivery.retry import backoff_s, overdue_attempts, patience_ended
from gateway.errors import Permanent
from gateway.settings import FhirDestination
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.records import Delivery, DeliveryState, Result, ResultObject, ResultState, Study, utc_now

BundleOf = Callable[[str, str], Bundle]
"""(model name, version) → its bundle."""


class Reporting:
    """Sends reports; `clients` by destination name."""

    def __init__(
        self,
        *,
        database: Database,
        clients: Mapping[str, EmrClient],
        bundle_of: BundleOf,
        institution: str,
        software_version: str,
    ) -> None:
        self._database = database
        self._clients = clients
        self._bundle_of = bundle_of
        self._institution = institution
        self._software_version = software_version

    def attempt(self, delivery_id: str, destination: FhirDestination, *, now: datetime) -> dict[str, Any]:
        """{"state", "retry_in_s"}, and "away" where the EMR as a whole is.

        A patient that is not resolved holds the report: asked again, and alarmed.
        """
        with self._database.reading() as session:
            delivery = session.get_one(Delivery, delivery_id)
            content = self._content(session, session.get_one(Result, delivery.result_id), destination)
            queued_at, attempts = delivery.queued_at, delivery.attempts
        client = self._clients[destination.name]
        try:
            receipt = client.send(content)
            found = client.verify(receipt.report_id, content.result_id)
        except (Unavailable, PatientNotResolved) as error:
            return self._later(delivery_id, destination, error, queued_at=queued_at, attempts=attempts, now=now)
        except EmrError as error:
            raise Permanent(f"{destination.name}: {error}") from error
        return self._sent(delivery_id, destination, receipt, found=found)

    @staticmethod
    def rehearse() -> None:
        """Build one invented report and throw it away: the FHIR models are made at first use, which takes seconds."""
        content = ReportContent(
            result_id="rehearsal",
            study_instance_uid="2.25.1",
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

    def _sent(
        self, delivery_id: str, destination: FhirDestination, receipt: ReportReceipt, *, found: bool
    ) -> dict[str, Any]:
        with self._database.session() as session:
            delivery = session.get_one(Delivery, delivery_id)
            result = session.get_one(Result, delivery.result_id)
            delivery.state = DeliveryState.VERIFIED if found else DeliveryState.STORED
            delivery.state_reason = None if found else "the report was accepted but could not be read back"
            delivery.next_attempt_at, delivery.updated_at = None, utc_now()
            entries = [
                {"type": e.resource_type, "reference": e.reference, "created": e.created} for e in receipt.entries
            ]
            delivery.objects = [
                {"attempts": delivery.attempts, "report_id": receipt.report_id, "how": receipt.how, "entries": entries}
            ]
            result.report_id = receipt.report_id
            note_contact(session, destination_row(session, destination), away=False, reason="")
            clear_alarms(session, kind="report-held", subject=f"delivery:{delivery_id}", by="gateway")
            record_delivery(session, result, delivery, {"report_id": receipt.report_id, "how": receipt.how})
            session.flush()
            study_state.refresh(session, result.study_instance_uid)
            return {"state": delivery.state, "retry_in_s": None}

    def _later(
        self,
        delivery_id: str,
        destination: FhirDestination,
        error: Unavailable | PatientNotResolved,
        *,
        queued_at: datetime,
        attempts: int,
        now: datetime,
    ) -> dict[str, Any]:
        away = isinstance(error, Unavailable)
        wait_s = backoff_s(
            attempts, first_retry_s=destination.first_retry_s, max_retry_s=destination.max_retry_s, key=delivery_id
        )
        with self._database.session() as session:
            delivery = session.get_one(Delivery, delivery_id, with_for_update=True)
            result = session.get_one(Result, delivery.result_id, with_for_update=True)
            kept = delivery.objects[0] if delivery.objects else {}
            # An attempt without an answer is not counted as known: it may have brought the report all the same.
            known = kept.get("attempts", 0) if away else delivery.attempts
            overdue = overdue_attempts(
                kept.get("overdue", 0), queued_at, now, give_up_after_s=destination.give_up_after_s
            )
            delivery.objects = [{"attempts": known, "overdue": overdue}]
            note_contact(session, destination_row(session, destination), away=away, reason=str(error))
            if delivery.state != DeliveryState.QUEUED or result.state == ResultState.SUPERSEDED:
                return self._withheld(session, delivery, result)
            if patience_ended(overdue):
                raise Permanent(f"{destination.name}: given up after {destination.give_up_after_s / 3600:g} h: {error}")
            changed = delivery.state_reason != str(error)
            delivery.state_reason = str(error)
            delivery.updated_at = utc_now()
            delivery.next_attempt_at = delivery.updated_at + timedelta(seconds=wait_s)
            if not away:
                raise_alarm(session, kind="report-held", subject=f"delivery:{delivery_id}", message=str(error))
            if changed:
                record_delivery(session, result, delivery, {})
            return {"state": delivery.state, "retry_in_s": wait_s, "away": away}

    @staticmethod
    def _withheld(session: Session, delivery: Delivery, result: Result) -> dict[str, Any]:
        """Never tried again: withheld, parked or superseded before it arrived."""
        if delivery.state == DeliveryState.QUEUED:
            quarantine.withhold_delivery(session, result, delivery, result.state_reason or str(result.state))
        if delivery.state == DeliveryState.WITHHELD:
            delivery.state_reason = withheld_words(delivery.state_reason or "", unknown_end=cut_short(delivery))
        delivery.next_attempt_at = None
        session.flush()
        study_state.refresh(session, result.study_instance_uid)
        return {"state": delivery.state, "retry_in_s": None}

    def _content(self, session: Session, result: Result, destination: FhirDestination) -> ReportContent:
        study = session.get_one(Study, result.study_instance_uid)
        bundle = self._bundle_of(result.model_name, result.model_version)
        specs = {s.name: s for s in bundle.labels}
        runtime = result.runtime or {}
        objects = session.scalars(
            select(ResultObject).where(ResultObject.result_id == result.result_id).order_by(ResultObject.role)
        ).all()
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
            patient_id=study.patient_id or "",
            issuer_of_patient_id=study.issuer_of_patient_id,
            patient_name=study.patient_name,
            accession_number=study.accession_number,
            study_date=_date(study.study_date),
            model=ReportModel(
                name=result.model_name, version=result.model_version, weights_digest=result.weights_digest
            ),
            segments=segments,
            verdict=Verdict(result.verdict or "review"),
            checks=tuple(
                ReportCheck(
                    name=c["name"],
                    value=f"{c['segment']}: {c['value']}" if c["segment"] else c["value"],
                    limit=c["limit"],
                    verdict=Verdict(c["verdict"]),
                )
                for c in result.checks or []
            ),
            objects=tuple(
                ReportObject(
                    role="SEG" if o.role == "SEG" else "SR",
                    sop_class_uid=o.sop_class_uid,
                    sop_instance_uid=o.sop_instance_uid,
                    series_instance_uid=o.series_instance_uid,
                )
                for o in _one_per_role(objects)
            ),
            issued=result.created_at,
            software_version=self._software_version,
            mean_confidence=runtime.get("mean_confidence"),
            supersedes_result_id=result.supersedes,
            institution=self._institution,
            wado_root=destination.wado_root or None,
        )


def _one_per_role(objects: Any) -> list[ResultObject]:
    """The first encoding of the SEG and the SR: a fallback made for one PACS is not what the EMR refers to."""
    chosen: dict[str, ResultObject] = {}
    for item in objects:
        if item.role in ("SEG", "SR"):
            chosen.setdefault(item.role, item)
    return list(chosen.values())


def _date(value: str | None) -> date | None:
    try:
        return datetime.strptime(value, "%Y%m%d").date() if value else None
    except ValueError:
        return None
