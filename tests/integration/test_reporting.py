"""A report on its way to an EMR, with its rows: what is waited for, what is alarmed, and what is never sent twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from sqlalchemy import select

from emr.client import EmrClient, EmrEndpoint
from emr.content import ReportContent, ReportSeries
from emr.errors import Misconfigured
from emr.exchange import open_http
from engine.bundle import Bundle
from gateway.app import emr_clients
from gateway.delivery.destination import OutgoingObject, Role
from gateway.delivery.dispatch import Dispatch
from gateway.delivery.reported import ReportedObjects
from gateway.delivery.reporting import Reporting
from gateway.destination_settings import DestinationSettings
from gateway.errors import Permanent
from gateway.results.quality import Check, Verdict
from gateway.settings import Settings
from storage.alarms import open_alarms
from storage.database import Database
from storage.records import (
    Delivery,
    DeliveryState,
    DestinationState,
    LedgerEvent,
    Result,
    ResultState,
    Series,
    Study,
    StudyState,
    utc_now,
)
from tests.support.emr_double import EmrDouble
from tests.support.report_content import LIVER, PATIENT_ID, PATIENT_SYSTEM, report_content
from tests.support.story_rows import SERIES_UID, STUDY_UID, NotedQueue, add_delivery, add_result, add_study, add_version

_HELD_AT_THE_DOOR = ("destination-refuses", "destination:emr")
_HELD_AT_WRITING = ("destination-refuses", "destination:emr:report")


_NO_OBJECTS = cast(ReportedObjects, SimpleNamespace(objects=lambda *_, **__: [], wait_s=lambda *_, **__: 0.0))


class PlainReporting(Reporting):
    """Reporting with an invented content: what a report says is another test's matter."""

    def _content(self, session: Any, result: Result, destination: Any, objects: Any) -> ReportContent:
        return report_content(2, result_id=result.result_id)


class House:
    """A database with one released result whose report is due at an EMR that fails on command."""

    def __init__(self, folder: Path, emr: EmrDouble, http: httpx.Client) -> None:
        self.database = Database(f"sqlite:///{folder / 'test.sqlite'}")
        self.database.create_all()
        self.emr = emr
        self.queue = NotedQueue()
        self.settings = DestinationSettings.model_validate(
            {"fhir": [{"name": "emr", "url": emr.base_url, "patient_identifier_system": PATIENT_SYSTEM}]}
        )
        endpoint = EmrEndpoint(base_url=emr.base_url, patient_identifier_system=PATIENT_SYSTEM)
        self.reporting = PlainReporting(
            database=self.database,
            clients={"emr": EmrClient(endpoint, http)},
            reported=_NO_OBJECTS,
            bundle_of=lambda name, version: pytest.fail(f"{name} {version} is not needed"),
            institution="",
            software_version="0",
        )
        self.dispatch = Dispatch(
            database=self.database,
            settings=self.settings,
            pacs={},
            reporting=self.reporting,
            objects_of=lambda _result, _encoding: [],
            enqueuer=self.queue,
        )
        with self.database.session() as session:
            add_study(session, StudyState.DELIVERING)
            add_version(session)
        self.delivery_id = self.add()

    def add(self, result_id: str = "r1", state: ResultState = ResultState.RELEASED) -> str:
        with self.database.session() as session:
            add_result(session, state, result_id=result_id, verdict="pass")
            delivery = add_delivery(
                session, DeliveryState.QUEUED, destination="emr", result_id=result_id, next_attempt_at=utc_now()
            )
            delivery.kind = "fhir"
            return delivery.delivery_id

    def attempt(self, delivery_id: str = "") -> dict[str, Any]:
        """The next attempt, its waits over: also the one of the circuit."""
        delivery_id = delivery_id or self.delivery_id
        with self.database.session() as session:
            row = session.get(DestinationState, "emr")
            if row is not None:
                row.since = utc_now() - timedelta(hours=1)
                row.failures = min(row.failures, 1)
        return self.dispatch.attempt(delivery_id, self.row(delivery_id).workflow_id)

    def row(self, delivery_id: str = "") -> Delivery:
        with self.database.reading() as session:
            return session.get_one(Delivery, delivery_id or self.delivery_id)

    def result(self) -> Result:
        with self.database.reading() as session:
            return session.get_one(Result, "r1")

    def study_state(self) -> str:
        with self.database.reading() as session:
            return session.get_one(Study, STUDY_UID).state

    def circuit(self) -> str:
        with self.database.reading() as session:
            return session.get_one(DestinationState, "emr").circuit

    def alarms(self) -> dict[tuple[str, str], str]:
        with self.database.reading() as session:
            return {(a.kind, a.subject): a.message for a in open_alarms(session)}

    def kinds(self) -> list[str]:
        with self.database.reading() as session:
            return [e.kind for e in session.scalars(select(LedgerEvent).order_by(LedgerEvent.event_id))]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)]) as emr, open_http(timeout_s=5) as http:
        house = House(tmp_path, emr, http)
        yield house
        house.database.close()


def outcome(code: str) -> dict[str, Any]:
    return {"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": code}]}


@pytest.mark.requirement("EMR-47", "CARD-04")
def test_a_report_that_arrives_is_verified_in_one_attempt(house: House) -> None:
    assert house.attempt() == {"state": DeliveryState.VERIFIED, "retry_in_s": None}
    assert house.kinds() == ["delivery-verified"]
    assert house.result().report_id == (house.row().objects or [{}])[0]["report_id"]
    assert house.alarms() == {}


@pytest.mark.parametrize(
    ("path", "status"),
    [("/fhir/metadata", s) for s in (401, 403, 302)] + [("/fhir/Patient/_search", s) for s in (401, 403, 404, 405)],
)
def test_an_emr_that_lets_nobody_in_keeps_all_waiting_and_says_what_to_do(house: House, path: str, status: int) -> None:
    house.emr.fail(status, path=path, headers={"location": "http://127.0.0.1:9/"})
    outcome = house.attempt()
    assert outcome["state"] == DeliveryState.QUEUED
    assert outcome["retry_in_s"] > 2
    assert house.queue.ids == []  # the head of the queue waits in its place
    assert house.circuit() == "open"
    message = house.alarms()[_HELD_AT_THE_DOOR]
    assert message.startswith("emr: ")
    assert f"HTTP {status}" in message
    assert any(words in message for words in ("credentials", "base URL"))
    assert house.attempt()["state"] == DeliveryState.VERIFIED
    assert house.alarms() == {}
    assert house.circuit() == "closed"


@pytest.mark.parametrize("status", [401, 403, 404, 405, 413, 302])
def test_a_transaction_that_is_not_let_in_waits_without_holding_up_the_others(house: House, status: int) -> None:
    house.emr.fail(status, path="/fhir", headers={"location": "http://127.0.0.1:9/"})
    assert house.attempt() == {"state": DeliveryState.QUEUED, "retry_in_s": None}
    assert house.queue.ids == [house.row().workflow_id]  # comes back on its own: it may be this report alone
    assert f"HTTP {status}" in house.alarms()[_HELD_AT_WRITING]
    # A patient that is not known says nothing on whether reports are taken.
    house.emr.fail(200, path="/fhir/Patient/_search", body={"resourceType": "Bundle", "type": "searchset"})
    house.attempt()
    assert _HELD_AT_WRITING in house.alarms()
    assert house.attempt(house.add("r2"))["state"] == DeliveryState.VERIFIED
    assert _HELD_AT_WRITING not in house.alarms()
    assert house.attempt()["state"] == DeliveryState.VERIFIED
    assert house.alarms() == {}
    assert house.emr.count("DiagnosticReport") == 2


@pytest.mark.parametrize("auth", ["token", "basic"])
def test_an_expired_secret_is_replaced_in_its_file_without_a_restart(house: House, tmp_path: Path, auth: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("expired\n")
    files = {"token_file": secret} if auth == "token" else {"username": "gateway", "password_file": secret}
    fhir = {"name": "emr", "url": house.emr.base_url, "patient_identifier_system": PATIENT_SYSTEM, "auth": auth}
    settings = Settings.model_construct(destinations=DestinationSettings.model_validate({"fhir": [{**fhir, **files}]}))
    client = emr_clients(settings)["emr"]
    secret.unlink()  # just being replaced
    house.emr.fail(401, path="/fhir/metadata")
    with pytest.raises(Misconfigured, match="cannot read"):
        client.send(report_content(2))
    secret.write_text("renewed\n")
    house.emr.fail(401, path="/fhir/metadata")
    assert client.send(report_content(2)).created
    client.close()


def test_an_emr_that_is_never_set_up_parks_the_report_when_the_patience_is_over(house: House) -> None:
    house.emr.fail(403, path="/fhir/Patient/_search", forever=True)
    with house.database.session() as session:
        session.get_one(Delivery, house.delivery_id).queued_at = utc_now() - timedelta(days=30)
    house.attempt()
    house.attempt()
    with pytest.raises(Permanent, match=r"emr: given up after 168 h: .*HTTP 403"):
        house.attempt()


def test_after_a_retry_the_waits_begin_with_the_shortest_again(house: House) -> None:
    house.emr.fail(403, path="/fhir/Patient/_search", forever=True)
    waits = [house.attempt()["retry_in_s"] for _ in range(6)]
    assert waits[-1] > 60
    with house.database.session() as session:  # as `seggate retry` does
        session.get_one(Delivery, house.delivery_id).queued_at = utc_now()
    assert house.attempt()["retry_in_s"] == waits[0]


@pytest.mark.requirement("EMR-47")
def test_content_that_is_refused_parks_the_report_and_closes_the_circuit(house: House) -> None:
    house.emr.fail(503, path="/fhir/metadata")
    house.attempt()
    assert house.circuit() == "open"
    house.emr.fail(422, path="/fhir", body=outcome("invariant"))
    house.emr.fail(422, path="/fhir/DocumentReference", body=outcome("invariant"))
    with pytest.raises(Permanent, match="emr: transaction: HTTP 422: invariant; DocumentReference: HTTP 422"):
        house.attempt()
    assert house.circuit() == "closed"
    assert house.alarms() == {}


@pytest.mark.requirement("EMR-47")
def test_a_document_that_stands_in_for_a_refused_report_is_alarmed_until_a_report_is_taken(house: House) -> None:
    house.emr.fail(422, path="/fhir", body=outcome("business-rule"))
    assert house.attempt()["state"] == DeliveryState.VERIFIED
    assert str(house.result().report_id).startswith("DocumentReference/")
    assert "HTTP 422: business-rule" in house.alarms()["fallback-document", "destination:emr"]
    assert house.attempt(house.add("r2"))["state"] == DeliveryState.VERIFIED
    assert house.alarms() == {}


@pytest.mark.requirement("EMR-47")
@pytest.mark.parametrize("status", [500, 503, 429, 403, 401])
def test_an_accepted_report_that_cannot_be_read_back_is_stored_and_only_looked_up_again(
    house: House, status: int
) -> None:
    report_path = _fail_reading_back(house, status)
    assert house.attempt() == {"state": DeliveryState.STORED, "retry_in_s": None}
    stored = house.row()
    report_id = house.result().report_id
    assert report_id == report_path.removeprefix("/fhir/")
    assert stored.state == DeliveryState.STORED
    assert f"HTTP {status}" in str(stored.state_reason)
    assert house.queue.ids == [stored.workflow_id]  # comes back to look
    assert house.study_state() == StudyState.DELIVERING
    assert (("query-refuses", "destination:emr") in house.alarms()) == (status in (401, 403))
    house.emr.recover()
    posted = len(house.emr.requests("POST", "/fhir"))
    assert house.attempt() == {"state": DeliveryState.VERIFIED, "retry_in_s": None}
    assert len(house.emr.requests("POST", "/fhir")) == posted
    assert house.result().report_id == report_id
    assert house.kinds() == ["delivery-stored", "delivery-verified"]
    assert house.alarms() == {}
    assert house.study_state() == StudyState.VERIFIED


@pytest.mark.requirement("EMR-47")
@pytest.mark.parametrize(("status", "alarm"), [(404, "report-not-found"), (403, "query-refuses")])
def test_an_accepted_report_that_is_never_shown_ends_as_stored_with_an_alarm(
    house: House, status: int, alarm: str
) -> None:
    _fail_reading_back(house, status)
    for _ in range(8):
        assert house.row().next_attempt_at is not None
        assert house.attempt()["state"] == DeliveryState.STORED
    row = house.row()
    assert (row.state, row.next_attempt_at) == (DeliveryState.STORED, None)
    assert str(row.state_reason).startswith("accepted, but not verified: ")
    assert {kind for kind, _ in house.alarms()} == {alarm}
    assert house.emr.count("DiagnosticReport") == 1
    assert len(house.emr.requests("POST", "/fhir")) == 2  # one of them the test's own
    assert house.study_state() == StudyState.VERIFIED


def test_a_superseded_report_that_was_accepted_is_still_looked_up(house: House) -> None:
    _fail_reading_back(house, 503)
    house.attempt()
    with house.database.session() as session:
        session.get_one(Result, "r1").state = ResultState.SUPERSEDED
    house.emr.recover()
    assert house.attempt()["state"] == DeliveryState.VERIFIED


@pytest.mark.requirement("CARD-02")
@pytest.mark.parametrize("state", [s for s in ResultState if s != ResultState.RELEASED])
def test_only_a_released_result_is_reported(house: House, state: ResultState) -> None:
    delivery_id = house.add("r2", state)
    with pytest.raises(Permanent, match=f"result r2 is {state}; only released results are reported"):
        house.reporting.attempt(delivery_id, house.settings.fhir[0], now=utc_now())
    assert house.emr.seen == []


def test_the_study_says_what_its_report_waits_for_until_it_has_arrived(house: House) -> None:
    nobody = {"resourceType": "Bundle", "type": "searchset"}
    house.emr.fail(200, path="/fhir/Patient/_search", body=nobody)
    house.attempt()
    with house.database.reading() as session:
        study = session.get_one(Study, STUDY_UID)
    assert study.state == StudyState.DELIVERING
    assert (study.state_reason or "").startswith("delivery to emr: no Patient")
    house.attempt()
    with house.database.reading() as session:
        study = session.get_one(Study, STUDY_UID)
    assert (study.state, study.state_reason) == (StudyState.VERIFIED, None)


def test_a_held_report_that_is_superseded_leaves_no_alarm(house: House) -> None:
    house.emr.fail(
        200, path="/fhir/Patient/_search", body={"resourceType": "Bundle", "type": "searchset"}, forever=True
    )
    house.attempt()
    assert [kind for kind, _ in house.alarms()] == ["report-held"]
    client = house.reporting._clients["emr"]
    send = client.send

    def superseded_meanwhile(content: ReportContent) -> Any:
        with house.database.session() as session:
            session.get_one(Result, "r1").state = ResultState.SUPERSEDED
        return send(content)

    client.send = superseded_meanwhile  # type: ignore[method-assign]
    assert house.attempt()["state"] == DeliveryState.WITHHELD
    assert house.alarms() == {}


def test_the_content_names_the_objects_the_series_and_its_part(house: House) -> None:
    content = _content(house, verdict="pass")
    assert [(o.role, o.sop_instance_uid) for o in content.objects] == [("SC", "2.25.3"), ("SR", "2.25.2")]
    assert [s.name for s in content.segments] == ["Liver"]
    assert content.series == ReportSeries(
        series_instance_uid=SERIES_UID, number=3, description="T1 ax", part="EchoTime=4.9"
    )


def test_a_result_without_a_qa_verdict_is_not_reported(house: House) -> None:
    with pytest.raises(Permanent, match="without a QA verdict"):
        _content(house, verdict=None)


@pytest.mark.requirement("ART-16")
def test_an_estimate_goes_into_the_report_with_its_bound(house: House) -> None:
    value, limit = 0.87, "lower 90 % bound at least 0.7"
    estimated = Check(
        name="estimated-dice", segment="Liver", value=value, limit=limit, verdict=Verdict.REVIEW, bound=0.66
    )
    check = _content(house, verdict="review", checks=[estimated.to_json()]).checks[0]
    assert (check.name, check.value, check.limit) == ("estimated-dice", "Liver: 0.87, 90 % bound 0.66", limit)


def _content(house: House, *, verdict: str | None, checks: Sequence[dict[str, Any]] = ()) -> ReportContent:
    """What Reporting makes of the rows of a result and of the objects that it is to name."""
    measured = {"name": "Liver", "volume_ml": 1.0, "voxels": 1, "confidence": 0.9, "mean_intensity": [1.0]}
    label = SimpleNamespace(name="Liver", type=LIVER, laterality=None)
    reporting = Reporting(
        database=house.database,
        clients={},
        reported=_NO_OBJECTS,
        bundle_of=lambda _name, _version: cast(Bundle, SimpleNamespace(labels=[label])),
        institution="",
        software_version="0",
    )
    with house.database.session() as session:
        result = add_result(
            session, ResultState.RELEASED, result_id="r2", verdict=verdict, measurements=[measured], checks=list(checks)
        )
        result.weights_digest, result.part, result.runtime = "ab" * 32, "EchoTime=4.9", {"series_number": 3}
        session.get_one(Study, STUDY_UID).patient_id = PATIENT_ID
        now = utc_now()
        session.add(
            Series(
                study_instance_uid=STUDY_UID,
                series_instance_uid=SERIES_UID,
                series_description="T1 ax",
                first_received_at=now,
                last_received_at=now,
            )
        )
        session.flush()
        objects = [outgoing("SC", "2.25.3"), outgoing("SR", "2.25.2")]
        return reporting._content(session, result, house.settings.fhir[0], objects)


def outgoing(role: Role, sop_instance_uid: str) -> OutgoingObject:
    return OutgoingObject(
        sop_instance_uid=sop_instance_uid,
        sop_class_uid="1.2",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        series_instance_uid="2.25.9",
        study_instance_uid=STUDY_UID,
        path=Path("unused"),
        digest="0" * 64,
        role=role,
    )


def _fail_reading_back(house: House, status: int) -> str:
    """Path of the report, which is made beforehand: the transaction then finds it there and answers as for a retry."""
    content = report_content(2, result_id="r1")
    client = house.reporting._clients["emr"]
    path = f"/fhir/{client.send(content).report_id}"
    house.emr.fail(status, path=path, forever=True)
    return path
