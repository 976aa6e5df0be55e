"""The report at a FHIR server that others wrote: @medplum/fhir-router, over HTTP on a loopback port."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from emr.client import EmrClient, EmrEndpoint
from emr.errors import PatientNotResolved
from emr.exchange import open_http
from emr.report import build_bundle
from tests.support.peers import program, require_peer
from tests.support.report_content import PATIENT_SYSTEM, report_content

NODE = Path(__file__).resolve().parents[1] / "support" / "node"
PATIENT_ID = "PID-0815"


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    require_peer("node")
    with subprocess.Popen(
        [program("node"), "server.mjs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=NODE
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            yield f"http://127.0.0.1:{port}"
        finally:
            server.stdin.close()
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with open_http(timeout_s=30) as client:
        yield client


def client_of(base_url: str, http: httpx.Client, system: str = PATIENT_SYSTEM) -> EmrClient:
    return EmrClient(EmrEndpoint(base_url=base_url, patient_identifier_system=system), http)


def create_patient(base_url: str, http: httpx.Client, system: str) -> str:
    patient = {"resourceType": "Patient", "identifier": [{"system": system, "value": PATIENT_ID}]}
    answer = http.post(f"{base_url}/Patient", json=patient)
    assert answer.status_code == 201, answer.text
    return f"Patient/{answer.json()['id']}"


def found(base_url: str, http: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = http.get(f"{base_url}/{query}&_count=1000")
    assert answer.status_code == 200, answer.text
    return [entry["resource"] for entry in answer.json().get("entry", [])]


@pytest.mark.requirement("EMR-47", "CARD-04")
@pytest.mark.parametrize(("organs", "how"), [(1, "transaction"), (104, "parted-transaction")])
def test_transaction_is_accepted_and_a_retry_makes_nothing_twice(
    base_url: str, http: httpx.Client, organs: int, how: str
) -> None:
    """104 organs are more than this server takes in one transaction with conditional creates (8 entries)."""
    system = f"{PATIENT_SYSTEM}.{organs}"
    patient = create_patient(base_url, http, system)
    content = report_content(organs, result_id=f"{organs:032x}", patient_id=PATIENT_ID)
    client = client_of(base_url, http, system)
    first, second = client.send(content), client_of(base_url, http, system).send(content)
    assert (first.how, first.created, second.created) == (how, True, False)
    assert first.report_id == second.report_id
    assert client.verify(first.report_id, content.result_id)
    for kind, number in (("Observation", organs + 1), ("DiagnosticReport", 1), ("DocumentReference", 2)):
        stored = found(base_url, http, f"{kind}?subject={patient}")
        assert len(stored) == number
    report = found(base_url, http, f"DiagnosticReport?subject={patient}")[0]
    observations = {f"Observation/{o['id']}" for o in found(base_url, http, f"Observation?subject={patient}")}
    assert {r["reference"] for r in report["result"]} == observations


@pytest.mark.requirement("EMR-47")
def test_conditional_create_alone_makes_nothing_twice(base_url: str, http: httpx.Client) -> None:
    """Without the client's own look-up: the second transaction answers 200 for every entry."""
    patient = create_patient(base_url, http, "urn:oid:1.2.3.4")
    body = build_bundle(report_content(2, result_id="9" * 32), patient).model_dump_json()
    headers = {"content-type": "application/fhir+json"}
    answers = [http.post(base_url, content=body, headers=headers).json()["entry"] for _ in range(2)]
    # The Device is the same as in other reports, so it may be there already.
    assert {e["response"]["status"][:3] for e in answers[0][1:]} == {"201"}
    assert {e["response"]["status"][:3] for e in answers[1]} == {"200"}


@pytest.mark.requirement("EMR-47")
def test_none_or_two_patients_hold_the_report(base_url: str, http: httpx.Client) -> None:
    content = report_content(1, result_id="8" * 32, patient_id=PATIENT_ID)
    client = client_of(base_url, http, "urn:oid:1.2.3.5")
    with pytest.raises(PatientNotResolved, match="no Patient"):
        client.send(content)
    for _ in range(2):
        create_patient(base_url, http, "urn:oid:1.2.3.5")
    with pytest.raises(PatientNotResolved, match="more than one"):
        client.send(content)
