"""EmrClient against a FHIR server on a socket: one report, however often and however badly it goes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from emr.authorization import Basic, StaticToken
from emr.client import EmrClient, EmrEndpoint
from emr.errors import CredentialsInvalid, Misconfigured, PatientNotResolved, Refused, TryLater, Unavailable
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


@pytest.mark.requirement("EMR-48")
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
    client = client_of(emr, http)
    said: list[str] = []
    for status, paths, error in (
        (400, ("/fhir", "/fhir/DocumentReference"), Refused),
        (403, ("/fhir",), Misconfigured),
        (400, ("/fhir/Patient/_search",), Misconfigured),
    ):
        for path in paths:
            emr.fail(status, path=path, body=quoted)
        with pytest.raises(error) as caught:
            client.send(CONTENT)
        said.append(str(caught.value))
        assert 'invalid at Bundle.entry[3] "subject …' in said[-1]
    assert 'HTTP 400: invalid at Bundle.entry[3] "subject … born … is not known here"' in said[0]
    for value in private:
        assert value not in "".join(said)
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


def outcome(code: str) -> dict[str, Any]:
    return {"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": code}]}


@pytest.mark.requirement("EMR-47")
@pytest.mark.parametrize("status", [400, 422])
def test_report_whose_content_is_refused_goes_as_one_document_that_says_why(
    emr: EmrDouble, http: httpx.Client, status: int
) -> None:
    emr.fail(status, path="/fhir", body=outcome("business-rule"))
    receipt = client_of(emr, http).send(CONTENT)
    assert receipt.how == "document-reference"
    assert f"transaction: HTTP {status}: business-rule" in receipt.refusal
    assert counts(emr) == {"Device": 0, "Observation": 0, "DiagnosticReport": 0, "DocumentReference": 1}


@pytest.mark.parametrize("status", [400, 422])
def test_content_that_is_refused_as_a_document_too_is_final_and_both_reasons_are_named(
    emr: EmrDouble, http: httpx.Client, status: int
) -> None:
    emr.fail(status, path="/fhir", body=outcome("business-rule"))
    emr.fail(status, path="/fhir/DocumentReference", body=outcome("invariant"))
    words = f"transaction: HTTP {status}: business-rule; DocumentReference: HTTP {status}: invariant"
    with pytest.raises(Refused, match=words):
        client_of(emr, http).send(CONTENT)
    assert sum(counts(emr).values()) == 0


@pytest.mark.parametrize(
    ("status", "body"),
    [(status, None) for status in (400, 401, 403, 404, 405, 406, 410, 412, 413, 415, 422, 302, 308)]
    + [(status, outcome(code)) for status in (400, 422) for code in ("security", "login", "expired", "forbidden")]
    + [(403, outcome("forbidden")), (404, outcome("not-found"))],
)
def test_transaction_that_is_not_let_in_waits_for_an_administrator_and_goes_out_then(
    emr: EmrDouble, http: httpx.Client, status: int, body: dict[str, Any] | None
) -> None:
    client = client_of(emr, http)
    emr.fail(status, path="/fhir", body=body, headers={"location": "http://127.0.0.1:9/"} if status < 400 else None)
    with pytest.raises(Misconfigured, match=f"transaction: .*HTTP {status}") as caught:
        client.send(CONTENT)
    assert not caught.value.whole
    assert sum(counts(emr).values()) == 0
    assert client.send(CONTENT).how == "transaction"


@pytest.mark.parametrize(
    ("path", "statuses", "whole"),
    [
        ("/fhir/metadata", (401, 403, 301, 307), True),
        ("/fhir/Patient/_search", (401, 403, 404, 405, 410, 501, 302), True),
        ("/fhir/Patient/_search", (400, 422), False),
    ],
)
def test_server_that_does_not_let_us_in_waits_for_an_administrator(
    emr: EmrDouble, http: httpx.Client, path: str, statuses: tuple[int, ...], whole: bool
) -> None:
    client = client_of(emr, http)
    for status in statuses:
        emr.fail(status, path=path, headers={"location": "http://127.0.0.1:9/"} if status < 400 else None)
        with pytest.raises(Misconfigured, match=f"HTTP {status}") as caught:
            client.send(CONTENT)
        assert caught.value.whole == whole
    assert client.send(CONTENT).created


def test_trouble_after_the_patient_was_found_may_be_of_this_report_alone(emr: EmrDouble, http: httpx.Client) -> None:
    client = client_of(emr, http)
    for path, whole in (("/fhir/Patient/_search", True), ("/fhir", False)):
        emr.fail(500, path=path)
        with pytest.raises(TryLater) as caught:
            client.send(CONTENT)
        assert caught.value.whole == whole


@pytest.mark.parametrize("status", [202, 204])
def test_transaction_accepted_for_later_is_asked_for_again(emr: EmrDouble, http: httpx.Client, status: int) -> None:
    client = client_of(emr, http)
    emr.fail(status, path="/fhir", body=b"")
    with pytest.raises(Unavailable, match=str(status)):
        client.send(CONTENT)
    assert client.send(CONTENT).created


@pytest.mark.requirement("EMR-47")
@pytest.mark.parametrize("status", [404, 405, 501, 422])
def test_server_that_refuses_transactions_gets_one_document(emr: EmrDouble, http: httpx.Client, status: int) -> None:
    emr.fail(status, path="/fhir", body=outcome("not-supported"), forever=True)
    client = client_of(emr, http)
    first, second = client.send(CONTENT), client.send(CONTENT)
    assert first.how == "document-reference"
    assert (first.created, second.created) == (True, False)
    assert first.report_id == second.report_id
    assert counts(emr) == {"Device": 0, "Observation": 0, "DiagnosticReport": 0, "DocumentReference": 1}
    assert client.verify(first.report_id, CONTENT.result_id)


@pytest.mark.requirement("EMR-47")
@pytest.mark.parametrize("status", [404, 405])
@pytest.mark.parametrize("statement", ["silent", "absent"])
def test_unknown_address_means_no_transactions_unless_the_server_states_them(
    http: httpx.Client, status: int, statement: str
) -> None:
    silent = {"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1", "rest": [{"mode": "server"}]}
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=silent) as emr:
        if statement == "absent":
            emr.fail(404, path="/fhir/metadata", forever=True)
        emr.fail(status, path="/fhir", forever=True)
        assert client_of(emr, http).send(CONTENT).how == "document-reference"
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=capability()) as emr:
        emr.fail(status, path="/fhir", forever=True)
        with pytest.raises(Misconfigured, match="check the base URL"):
            client_of(emr, http).send(CONTENT)
        assert emr.count("DocumentReference") == 0


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
        pytest.raises(Misconfigured, match="neither the transaction nor a DocumentReference"),
    ):
        client_of(emr, http).send(CONTENT)


def test_types_that_the_server_cannot_create_are_left_out(http: httpx.Client) -> None:
    resource = [{"type": t, "interaction": [{"code": "create"}]} for t in ("Observation", "DiagnosticReport")]
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=capability(resource=resource)) as emr:
        client_of(emr, http).send(CONTENT)
        assert counts(emr) == {"Device": 0, "Observation": 3, "DiagnosticReport": 1, "DocumentReference": 0}


def test_server_of_another_fhir_version_waits_for_the_right_base_url(http: httpx.Client) -> None:
    stated = {**capability(), "fhirVersion": "5.0.0"}
    with EmrDouble(capability=stated) as emr, pytest.raises(Misconfigured, match=r"FHIR 5\.0\.0"):
        client_of(emr, http).send(CONTENT)


@pytest.mark.parametrize("status", [401, 403, 404, 500, 307])
def test_capability_that_could_not_be_read_is_read_again_and_one_that_was_is_kept(
    emr: EmrDouble, http: httpx.Client, status: int
) -> None:
    emr.fail(status, path="/fhir/metadata", headers={"location": "http://127.0.0.1:9/"})
    client = client_of(emr, http)
    with contextlib.suppress(TryLater):
        assert client.capability().transaction is None
    assert client.capability().transaction is True
    assert client.send(CONTENT).created
    assert not client.send(CONTENT).created
    assert len(emr.requests("GET", "/fhir/metadata")) == 2


def test_server_without_a_capability_statement_gets_the_report(emr: EmrDouble, http: httpx.Client) -> None:
    emr.fail(404, path="/fhir/metadata", forever=True)
    client = client_of(emr, http)
    assert client.send(CONTENT).created
    assert not client.send(CONTENT).created


def test_capability_is_read_again_after_the_server_did_not_let_us_in(http: httpx.Client) -> None:
    """What an administrator mends may be stated there: another FHIR version, or transactions after all."""
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)]) as emr:
        client = client_of(emr, http)
        emr.fail(200, path="/fhir/metadata", body={**capability(), "fhirVersion": "5.0.0"})
        with pytest.raises(Misconfigured):
            client.send(CONTENT)
        assert client.send(CONTENT).how == "transaction"


def test_type_that_is_listed_without_interactions_is_tried(http: httpx.Client) -> None:
    resource = [{"type": t} for t in ("Observation", "DiagnosticReport")]
    resource.append({"type": "Patient", "interaction": [{"code": "read"}]})  # type: ignore[dict-item]
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=capability(resource=resource)) as emr:
        assert client_of(emr, http).send(CONTENT).how == "transaction"
        assert counts(emr) == {"Device": 0, "Observation": 3, "DiagnosticReport": 1, "DocumentReference": 0}


@pytest.mark.parametrize("path", ["/fhir/Patient/_search", "/fhir/DiagnosticReport"])
def test_search_answer_that_is_no_bundle_counts_as_nothing_found_by_nobody(http: httpx.Client, path: str) -> None:
    """Else a wrong base URL would read as an unknown patient, or as a report that is not there yet."""
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=capability()) as emr:
        emr.fail(200, path=path, body={"status": "up"})
        with pytest.raises(Misconfigured, match="not a Bundle"):
            client_of(emr, http).send(CONTENT)


@pytest.mark.parametrize("how", ["transaction", "document-reference"])
def test_report_that_was_accepted_and_is_not_found_yet_is_looked_for_again(http: httpx.Client, how: str) -> None:
    """A server may show what it took only after a while."""
    stated = capability(interaction=[{"code": "batch"}]) if how == "document-reference" else None
    kind = "DocumentReference" if stated else "DiagnosticReport"
    entry = {"response": {"status": "201"}}
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)], capability=stated) as emr:
        client = client_of(emr, http)
        path = f"/fhir/{kind}" if stated else "/fhir"
        emr.fail(201, path=path, body={"resourceType": "Bundle", "entry": [entry] * 7}, after=1 if stated else 0)
        with pytest.raises(Unavailable, match="accepted, but"):
            client.send(CONTENT)
        assert client.send(CONTENT).how == how


def test_redirect_is_not_followed(emr: EmrDouble, http: httpx.Client) -> None:
    emr.fail(307, path="/fhir/Patient/_search", headers={"location": "http://127.0.0.1:9/elsewhere"})
    with pytest.raises(Misconfigured, match="redirects"):
        client_of(emr, http).send(CONTENT)


def test_endless_answer_is_cut_off(emr: EmrDouble, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emr.exchange.MAX_RESPONSE_BYTES", 1000)
    emr.fail(200, path="/fhir/metadata", body=b" " * 100_000)
    with pytest.raises(Misconfigured, match="larger than"):
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
    emr.fail(422, path="/fhir/DocumentReference", body=outcome("business-rule"))
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
    [
        (StaticToken(lambda: "t0ken"), "Bearer t0ken"),
        (Basic("gateway", lambda: "pässword"), "Basic Z2F0ZXdheTpww6Rzc3dvcmQ="),
    ],
)
def test_credentials_go_with_every_request(
    emr: EmrDouble, http: httpx.Client, authorization: StaticToken | Basic, field: str
) -> None:
    client_of(emr, http, authorization=authorization).send(CONTENT)
    assert {s.headers.get("authorization") for s in emr.seen} == {field}


def test_rejected_static_token_waits_until_its_file_holds_another(emr: EmrDouble, http: httpx.Client) -> None:
    tokens = ["expired"]
    client = client_of(emr, http, authorization=StaticToken(lambda: tokens[-1]))
    emr.fail(401, path="/fhir/metadata")
    with pytest.raises(Misconfigured, match="credentials"):
        client.send(CONTENT)
    assert len(emr.seen) == 1
    tokens.append("renewed")
    emr.fail(401, path="/fhir/metadata")
    assert client.send(CONTENT).created
    assert emr.seen[-1].headers["authorization"] == "Bearer renewed"


@pytest.mark.parametrize(
    "url",
    [
        "https://emr:port/fhir",
        "https://[emr/fhir",
        "ftp://emr/fhir",
        "http:///fhir",
        "https://u:p@emr/fhir",
        "https://emr/fhir?x=1",
        "emr/fhir",
    ],
)
def test_base_url_is_checked(url: str) -> None:
    with pytest.raises(CredentialsInvalid):
        EmrEndpoint(base_url=url, patient_identifier_system=PATIENT_SYSTEM)


def test_credentials_never_travel_unencrypted() -> None:
    with pytest.raises(CredentialsInvalid, match="https"):
        EmrEndpoint(
            base_url="http://emr.example/fhir", patient_identifier_system="s", authorization=StaticToken(lambda: "t")
        )


def test_unreadable_ca_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(CredentialsInvalid, match="ca_file"):
        open_http(timeout_s=1, ca_file=tmp_path / "absent.pem")
