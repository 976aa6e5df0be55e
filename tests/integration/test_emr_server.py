"""The demonstration EMR: what it keeps, and that it says no where a real server would."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.demo.emr_server import FhirFault, FhirStore, add_patient
from tests.support.emr_double import EmrDouble

SYSTEM = "urn:oid:1.2.3"


@pytest.fixture(scope="module")
def emr() -> Iterator[EmrDouble]:
    with EmrDouble(patients=[(SYSTEM, "A|1")]) as double:
        yield double


def entry(resource: dict[str, Any], url: str = "urn:uuid:1", **request: Any) -> dict[str, Any]:
    return {
        "fullUrl": url,
        "resource": resource,
        "request": {"method": "POST", "url": resource["resourceType"], **request},
    }


def bundle(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"resourceType": "Bundle", "type": "transaction", "entry": list(entries)}


def device(value: str) -> dict[str, Any]:
    return {"resourceType": "Device", "identifier": [{"system": SYSTEM, "value": value}]}


def test_program_serves_on_a_free_port_and_keeps_its_folder(tmp_path: Path) -> None:
    for attempt in range(2):
        port_file = tmp_path / f"port{attempt}"
        command = [sys.executable, "-m", "gateway.demo.emr_server", "--port-file", str(port_file)]
        command += ["--folder", str(tmp_path / "emr"), "--patient", SYSTEM, "4711"]
        with subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2]) as server:
            try:
                deadline = time.monotonic() + 60
                while not port_file.exists() and server.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.02)
                url = f"http://127.0.0.1:{int(port_file.read_text())}/fhir"
                assert httpx.get(f"{url}/metadata").json()["fhirVersion"] == "4.0.1"
                found = httpx.get(f"{url}/Patient", params={"identifier": f"{SYSTEM}|4711"}).json()
            finally:
                server.terminate()
        assert found["total"] == 1
    assert len(list((tmp_path / "emr").glob("Patient-*.json"))) == 1


def test_search_undoes_escapes(emr: EmrDouble) -> None:
    for token, total in ((f"{SYSTEM}|A\\|1", 1), ("A\\|1", 1), (f"{SYSTEM}|A", 0), ("|A\\|1", 0)):
        answer = httpx.post(f"{emr.base_url}/Patient/_search", data={"identifier": token})
        assert answer.json()["total"] == total, token
    assert httpx.get(f"{emr.base_url}/Patient").status_code == 400


def test_create_is_conditional_and_resources_can_be_read(emr: EmrDouble) -> None:
    headers = {"If-None-Exist": f"identifier={SYSTEM}|dev-1"}
    answers = [httpx.post(f"{emr.base_url}/Device", json=device("dev-1"), headers=headers) for _ in range(2)]
    assert [a.status_code for a in answers] == [201, 200]
    location = answers[0].headers["location"].partition("/_history")[0]
    assert httpx.get(str(httpx.URL(emr.base_url).join(location))).json()["identifier"][0]["value"] == "dev-1"
    assert httpx.get(f"{emr.base_url}/Device/none").status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"no json", 400),
        (b"[]", 400),
        (b'{"resourceType": "Bundle", "type": "batch", "entry": []}', 400),
        (b'{"resourceType": "Bundle", "type": "transaction"}', 400),
    ],
)
def test_what_is_no_transaction_is_refused(emr: EmrDouble, body: bytes, status: int) -> None:
    answer = httpx.post(emr.base_url, content=body)
    assert answer.status_code == status
    assert answer.json()["resourceType"] == "OperationOutcome"


def test_transaction_is_all_or_nothing() -> None:
    store = FhirStore()
    broken = {"resourceType": "Observation", "subject": {"reference": "Patient/nobody"}}
    for bad in (
        entry(broken, "urn:uuid:2"),
        entry({"resourceType": "Account"}, "urn:uuid:2"),
        {"fullUrl": "urn:uuid:2", "resource": device("x"), "request": {"method": "PUT", "url": "Device/1"}},
    ):
        with pytest.raises(FhirFault):
            store.transaction(bundle(entry(device("d")), bad))
        assert store.all("Device") == []


def test_condition_with_two_matches_is_refused() -> None:
    store = FhirStore()
    for _ in range(2):
        store.create(device("twice"))
    with pytest.raises(FhirFault) as caught:
        store.create(device("twice"), f"identifier={SYSTEM}|twice")
    assert caught.value.status == 412


def test_references_of_the_transaction_become_literal() -> None:
    store = FhirStore()
    patient = add_patient(store, SYSTEM, "1")
    assert add_patient(store, SYSTEM, "1") is patient
    observation = {
        "resourceType": "Observation",
        "subject": {"reference": f"Patient/{patient['id']}"},
        "device": {"reference": "urn:uuid:d"},
    }
    answer = store.transaction(bundle(entry(observation, "urn:uuid:o"), entry(device("d"), "urn:uuid:d")))
    assert [e["response"]["status"] for e in answer["entry"]] == ["201 Created", "201 Created"]
    assert store.all("Observation")[0]["device"]["reference"] == f"Device/{store.all('Device')[0]['id']}"
