"""EmrClient against a FHIR server on a socket: one report, however often and however badly it goes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from emr.authorization import Basic, StaticToken
from emr.client import EmrClient, EmrEndpoint
from emr.errors import CredentialsInvalid, PatientNotResolved, Refused, Unavailable
from emr.exchange import open_http
from tests.support.emr_double import EmrDouble
from tests.support.report_content import ACCESSION, PATIENT_ID, PATIENT_SYSTEM, report_content

TYPES = ("Device", "Observation", "DiagnosticReport", "DocumentReference")
CONTENT = report_content(2)


@pytest.fixture
def emr() -> Iterator[EmrDouble]:
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)]) as double:
        yield double


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with open_http(timeout_s=5) as client:
        yield client


def client_of(emr: EmrDouble, http: httpx.Client, **endpoint: Any) -> EmrClient:
    return EmrClient(EmrEndpoint(base_url=emr.base_url, patient_identifier_system=PATIENT_SYSTEM, **endpoint), http)


def counts(emr: EmrDouble) -> dict[str, int]:
    return {kind: emr.count(kind) for kind in TYPES}


def capability(**rest: Any) -> dict[str, Any]:
    return {
        "resourceType": "CapabilityStatement",
        "fhirVersion": "4.0.1",
        "rest": [{"mode": "server", "interaction": [{"code": "transaction"}], **rest}],
    }


@pytest.mark.requirement("EMR-47", "CARD-04")
def test_report_arrives_once_however_often_it_is_sent(emr: EmrDouble, http: httpx.Client) -> None:
    first = client_of(emr, http).send(CONTENT)
    second = client_of(emr, http).send(CONTENT)
    assert (first.created, second.created) == (True, False)
    assert first.report_id == second.report_id
    assert first.how == "transaction"
    assert all(entry.created for entry in first.entries)
    assert not any(entry.created for entry in second.entries)
    assert counts(emr) == {"Device": 1, "Observation": 3, "DiagnosticReport": 1, "DocumentReference": 2}


@pytest.mark.requirement("EMR-47")
def test_patient_is_searched_first_and_referenced_literally(emr: EmrDouble, http: httpx.Client) -> None:
    client_of(emr, http).send(CONTENT)
    patient = emr.store.all("Patient")[0]
    expected = f"Patient/{patient['id']}"
    for kind in ("Observation", "DiagnosticReport", "DocumentReference"):
        assert {r["subject"]["reference"] for r in emr.store.all(kind)} == {expected}
    assert emr.count("Patient") == 1
    assert emr.count("ImagingStudy") == 0
    order = [s.path for s in emr.seen]
    assert order == ["/fhir/metadata", "/fhir/Patient/_search", "/fhir"]


@pytest.mark.requirement("EMR-48", open="the outbox row in the transaction of the state change")
def test_retry_after_lost_answer_makes_nothing_twice(emr: EmrDouble) -> None:
    with open_http(timeout_s=1) as http:
        client = client_of(emr, http)
        emr.swallow_answer("/fhir")
        with pytest.raises(Unavailable, match="no answer in time"):
            client.send(CONTENT)
        assert emr.swallowed.wait(timeout=10)
        before = counts(emr)
        receipt = client.send(CONTENT)
    assert before["DiagnosticReport"] == 1
    assert not receipt.created
    assert counts(emr) == before
    assert receipt.report_id == f"DiagnosticReport/{emr.store.all('DiagnosticReport')[0]['id']}"


@pytest.mark.requirement("EMR-47")
def test_server_without_conditional_create_is_asked_first(http: httpx.Client) -> None:
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=capability()) as emr:
        client = client_of(emr, http)
        first = client.send(CONTENT)
        second = client.send(CONTENT)
        assert (first.created, second.created) == (True, False)
        assert first.report_id == second.report_id
        assert len(emr.requests("POST", "/fhir")) == 1
        client.send(report_content(2, result_id="c" * 32))
        assert emr.count("Device") == 1
        sent = json.loads(emr.requests("POST", "/fhir")[-1].body)
        assert "Device" not in {e["resource"]["resourceType"] for e in sent["entry"]}
        assert emr.count("Observation") == 6


@pytest.mark.requirement("EMR-47")
def test_unknown_patient_holds_the_report(http: httpx.Client) -> None:
    with EmrDouble(patients=[("urn:other", PATIENT_ID)]) as emr:
        with pytest.raises(PatientNotResolved, match="no Patient") as caught:
            client_of(emr, http).send(CONTENT)
        assert sum(counts(emr).values()) == 0
        assert not emr.requests("POST", "/fhir")
    assert PATIENT_ID not in str(caught.value)


@pytest.mark.requirement("EMR-47")
def test_two_patients_with_the_identifier_hold_the_report(http: httpx.Client) -> None:
    with EmrDouble() as emr:
        for _ in range(2):
            emr.store.create(
                {"resourceType": "Patient", "identifier": [{"system": PATIENT_SYSTEM, "value": PATIENT_ID}]}
            )
        with pytest.raises(PatientNotResolved, match="more than one"):
            client_of(emr, http).send(CONTENT)
        assert sum(counts(emr).values()) == 0


@pytest.mark.parametrize(
    "state", [{"active": False}, {"link": [{"type": "replaced-by", "other": {"reference": "Patient/2"}}]}]
)
def test_inactive_or_replaced_patient_holds_the_report(http: httpx.Client, state: dict[str, Any]) -> None:
    with EmrDouble() as emr:
        identifier = [{"system": PATIENT_SYSTEM, "value": PATIENT_ID}]
        emr.store.create({"resourceType": "Patient", "identifier": identifier, **state})
        with pytest.raises(PatientNotResolved, match="inactive or replaced"):
            client_of(emr, http).send(CONTENT)


def test_server_that_ignores_the_search_parameter_does_not_get_the_report(emr: EmrDouble, http: httpx.Client) -> None:
    somebody = {"resourceType": "Patient", "id": "9", "identifier": [{"system": PATIENT_SYSTEM, "value": "other"}]}
    answer = {"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": somebody}]}
    emr.fail(200, path="/fhir/Patient/_search", body=answer)
    with pytest.raises(PatientNotResolved, match="does not have the identifier"):
        client_of(emr, http).send(CONTENT)


def test_a_further_page_of_patients_counts_as_more_than_one(emr: EmrDouble, http: httpx.Client) -> None:
    patient = emr.store.all("Patient")[0]
    link = [{"relation": "next", "url": "http://127.0.0.1/x"}]
    emr.fail(
        200,
        path="/fhir/Patient/_search",
        body={"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": patient}], "link": link},
    )
    with pytest.raises(PatientNotResolved, match="more than one"):
        client_of(emr, http).send(CONTENT)


def test_foreign_issuer_of_patient_id_holds_the_report(emr: EmrDouble, http: httpx.Client) -> None:
    accepted = frozenset({"HOSPITAL"})
    assert client_of(emr, http, accepted_issuers=accepted).send(CONTENT).created
    other = report_content(1, result_id="d" * 32, issuer_of_patient_id="CLINIC")
    with pytest.raises(PatientNotResolved, match="Issuer of Patient ID"):
        client_of(emr, http, accepted_issuers=accepted).send(other)


def test_no_patient_data_in_urls_or_messages(emr: EmrDouble, http: httpx.Client) -> None:
    private = [PATIENT_ID, ACCESSION, "Yamada", "太郎", CONTENT.study_instance_uid]
    quoted = {
        "resourceType": "OperationOutcome",
        "issue": [
            {
                "severity": "error",
                "code": "invalid",
                "expression": ["Bundle.entry[3]"],
                "diagnostics": f"subject {PATIENT_ID} Yamada Tarou born 1970-01-01 {ACCESSION} is not known here",
            }
        ],
    }
    emr.fail(400, path="/fhir", body=quoted)
    with pytest.raises(Refused) as caught:
        client_of(emr, http).send(CONTENT)
    assert 'HTTP 400: invalid at Bundle.entry[3] "subject … born … is not known here"' in str(caught.value)
    for value in private:
        assert value not in str(caught.value)
        assert all(value not in s.path and value not in s.query for s in emr.seen)
    form = emr.requests("POST", "/fhir/Patient/_search")[0]
    assert form.query == ""
    assert form.headers["content-type"] == "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/fhir/metadata", 503), ("/fhir/Patient/_search", 500)]
    + [("/fhir", status) for status in (408, 409, 423, 429, 500, 503)],
)
def test_server_in_trouble_is_tried_again_later(emr: EmrDouble, http: httpx.Client, status: int, path: str) -> None:
    client = client_of(emr, http)
    emr.fail(status, path=path)
    with pytest.raises(Unavailable, match=str(status)):
        client.send(CONTENT)
    assert client.send(CONTENT).created


def test_server_that_is_away_is_unavailable(http: httpx.Client) -> None:
    with EmrDouble() as emr:
        client = client_of(emr, http)
    with pytest.raises(Unavailable, match="no connection"):
        client.send(CONTENT)


@pytest.mark.parametrize("status", [400, 403, 410, 412, 413, 422])
def test_refusal_is_final_and_names_the_codes(emr: EmrDouble, http: httpx.Client, status: int) -> None:
    outcome = {"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": "business-rule"}]}
    emr.fail(status, path="/fhir", body=outcome)
    with pytest.raises(Refused, match=f"transaction: HTTP {status}: business-rule"):
        client_of(emr, http).send(CONTENT)
    assert sum(counts(emr).values()) == 0


@pytest.mark.requirement("EMR-47")
@pytest.mark.parametrize("status", [404, 405, 501, 422])
def test_server_that_refuses_transactions_gets_one_document(emr: EmrDouble, http: httpx.Client, status: int) -> None:
    outcome = {"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": "not-supported"}]}
    emr.fail(status, path="/fhir", body=outcome, forever=True)
    client = client_of(emr, http)
    first, second = client.send(CONTENT), client.send(CONTENT)
    assert first.how == "document-reference"
    assert (first.created, second.created) == (True, False)
    assert first.report_id == second.report_id
    assert counts(emr) == {"Device": 0, "Observation": 0, "DiagnosticReport": 0, "DocumentReference": 1}
    assert client.verify(first.report_id, CONTENT.result_id)


def refuse_large(emr: EmrDouble) -> None:
    text = {"severity": "error", "code": "invalid", "details": {"text": "Transaction has too many entries"}}
    emr.fail(400, path="/fhir", body={"resourceType": "OperationOutcome", "issue": [text]})


@pytest.mark.requirement("EMR-47")
@pytest.mark.parametrize("stated", [True, False])
def test_report_too_large_for_one_transaction_goes_in_parts_once(http: httpx.Client, stated: bool) -> None:
    content = report_content(20)
    everything = {"Device": 1, "Observation": 21, "DiagnosticReport": 1, "DocumentReference": 2}
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=None if stated else capability()) as emr:
        client = client_of(emr, http)
        refuse_large(emr)
        emr.fail(503, path="/fhir", after=2)
        with pytest.raises(Unavailable):
            client.send(content)
        assert emr.count("Observation") == 15
        assert emr.count("DiagnosticReport") == 0
        refuse_large(emr)
        receipt = client.send(content)
        assert (receipt.how, receipt.created) == ("parted-transaction", True)
        assert counts(emr) == everything
        assert not client.send(content).created
        assert counts(emr) == everything
        report = emr.store.all("DiagnosticReport")[0]
        observations = {f"Observation/{o['id']}" for o in emr.store.all("Observation")}
        assert {r["reference"] for r in report["result"]} == observations
        device = f"Device/{emr.store.all('Device')[0]['id']}"
        assert {o["device"]["reference"] for o in emr.store.all("Observation")} == {device}


def test_stated_lack_of_transactions_is_believed_without_trying(http: httpx.Client) -> None:
    resource = [{"type": "DocumentReference", "interaction": [{"code": "create"}]}]
    stated = capability(interaction=[{"code": "search-system"}], resource=resource)
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=stated) as emr:
        client = client_of(emr, http)
        assert client.send(CONTENT).how == "document-reference"
        assert not client.send(CONTENT).created
        assert not emr.requests("POST", "/fhir")
        assert emr.count("DocumentReference") == 1


def test_server_that_takes_neither_is_named_so(http: httpx.Client) -> None:
    resource = [{"type": "Patient", "interaction": [{"code": "search-type"}]}]
    with (
        EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=capability(resource=resource)) as emr,
        pytest.raises(Refused, match="neither the transaction nor a DocumentReference"),
    ):
        client_of(emr, http).send(CONTENT)


def test_types_that_the_server_cannot_create_are_left_out(http: httpx.Client) -> None:
    resource = [{"type": t, "interaction": [{"code": "create"}]} for t in ("Observation", "DiagnosticReport")]
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=capability(resource=resource)) as emr:
        client_of(emr, http).send(CONTENT)
        assert counts(emr) == {"Device": 0, "Observation": 3, "DiagnosticReport": 1, "DocumentReference": 0}


def test_server_of_another_fhir_version_is_refused(http: httpx.Client) -> None:
    stated = {**capability(), "fhirVersion": "5.0.0"}
    with EmrDouble(capability=stated) as emr, pytest.raises(Refused, match=r"FHIR 5\.0\.0"):
        client_of(emr, http).send(CONTENT)


def test_capability_is_read_once_and_may_be_missing(emr: EmrDouble, http: httpx.Client) -> None:
    emr.fail(404, path="/fhir/metadata")
    client = client_of(emr, http)
    assert client.capability().transaction is None
    assert client.send(CONTENT).created
    assert not client.send(CONTENT).created
    assert len(emr.requests("GET", "/fhir/metadata")) == 1


def test_redirect_is_refused_and_not_followed(emr: EmrDouble, http: httpx.Client) -> None:
    emr.fail(307, path="/fhir/Patient/_search", headers={"location": "http://127.0.0.1:9/elsewhere"})
    with pytest.raises(Refused, match="redirects"):
        client_of(emr, http).send(CONTENT)


def test_endless_answer_is_cut_off(emr: EmrDouble, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emr.exchange.MAX_RESPONSE_BYTES", 1000)
    emr.fail(200, path="/fhir/metadata", body=b" " * 100_000)
    with pytest.raises(Refused, match="larger than"):
        client_of(emr, http).capability()


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"", b"[" * 100_000])
def test_answer_that_is_not_fhir_is_tried_again(emr: EmrDouble, http: httpx.Client, body: bytes) -> None:
    emr.fail(200, path="/fhir", body=body)
    client = client_of(emr, http)
    with pytest.raises(Unavailable):
        client.send(CONTENT)
    assert client.send(CONTENT).created


@pytest.mark.parametrize(("status", "error"), [("500 x", Unavailable), ("422 x", Refused), (None, Unavailable)])
def test_status_of_each_entry_counts(
    emr: EmrDouble, http: httpx.Client, status: str | None, error: type[Exception]
) -> None:
    entry = {"response": {"status": status, "location": "Device/1"}} if status else {}
    emr.fail(200, path="/fhir", body={"resourceType": "Bundle", "entry": [entry] * 7})
    with pytest.raises(error):
        client_of(emr, http).send(CONTENT)


def test_location_that_is_missing_is_looked_up(emr: EmrDouble, http: httpx.Client) -> None:
    sent = client_of(emr, http).send(CONTENT)
    emr.fail(200, path="/fhir", body={"resourceType": "Bundle", "entry": [{"response": {"status": "200"}}] * 7})
    again = client_of(emr, http).send(CONTENT)
    assert again.report_id == sent.report_id
    assert not again.created


def test_report_is_read_back(emr: EmrDouble, http: httpx.Client) -> None:
    client = client_of(emr, http)
    receipt = client.send(CONTENT)
    assert client.verify(receipt.report_id, CONTENT.result_id)
    assert not client.verify(receipt.report_id, "e" * 32)
    assert not client.verify("DiagnosticReport/none", CONTENT.result_id)
    with pytest.raises(Refused):
        client.verify("../Patient/1", CONTENT.result_id)


@pytest.mark.parametrize(
    ("authorization", "field"),
    [(StaticToken("t0ken"), "Bearer t0ken"), (Basic("gateway", "pässword"), "Basic Z2F0ZXdheTpww6Rzc3dvcmQ=")],
)
def test_credentials_go_with_every_request(
    emr: EmrDouble, http: httpx.Client, authorization: StaticToken | Basic, field: str
) -> None:
    client_of(emr, http, authorization=authorization).send(CONTENT)
    assert {s.headers.get("authorization") for s in emr.seen} == {field}


def test_rejected_static_token_is_a_refusal(emr: EmrDouble, http: httpx.Client) -> None:
    emr.fail(401, path="/fhir/metadata", forever=True)
    with pytest.raises(Refused, match="credentials"):
        client_of(emr, http, authorization=StaticToken("t")).send(CONTENT)
    assert len(emr.seen) == 1


@pytest.mark.parametrize(
    "url", ["ftp://emr/fhir", "http:///fhir", "https://u:p@emr/fhir", "https://emr/fhir?x=1", "emr/fhir"]
)
def test_base_url_is_checked(url: str) -> None:
    with pytest.raises(CredentialsInvalid):
        EmrEndpoint(base_url=url, patient_identifier_system=PATIENT_SYSTEM)


def test_credentials_never_travel_unencrypted() -> None:
    with pytest.raises(CredentialsInvalid, match="https"):
        EmrEndpoint(base_url="http://emr.example/fhir", patient_identifier_system="s", authorization=StaticToken("t"))


def test_unreadable_ca_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(CredentialsInvalid, match="ca_file"):
        open_http(timeout_s=1, ca_file=tmp_path / "absent.pem")
