"""Two patients under one study: nothing leaves until a person releases it, then the first patient's result (CMP-18)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from typer.testing import CliRunner

from gateway.cli import app
from storage.records import ResultState
from tests.support.pacs import ScriptedPacs, scripted
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway, whole_gateway

_WHY = "the sender says that the first patient is right"


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[WholeGateway]:
    with scripted(ScriptedPacs(tmp_path / "pacs")) as archive:
        address = (archive.ae_title, archive.port)
        destinations = f'[[dimse]]\nname = "pacs"\nae_title = "{address[0]}"\nhost = "127.0.0.1"\nport = {address[1]}\n'
        with whole_gateway(tmp_path / "gateway", pacs_address=address, emr_url="", destinations=destinations) as made:
            made.start_receiver()
            made.start("worker")
            made.start("services")
            yield made


def _seggate(gateway: WholeGateway, *arguments: str) -> Any:
    ran = CliRunner().invoke(app, [*arguments, "--config", str(gateway.config)])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


@pytest.mark.requirement("CMP-18")
def test_a_quarantined_study_waits_for_a_person_and_goes_on_where_it_stood(gateway: WholeGateway) -> None:
    study = gateway.write_study("mixed")
    of_another_patient = dcmread(study.files[-1])
    of_another_patient.PatientID = "OTHER-1"
    of_another_patient.save_as(study.files[-1], enforce_file_format=True)
    gateway.block_at("judge:begin")
    gateway.send(study.files[:-1])
    wait_until(lambda: gateway.blocked_pid("judge:begin"), "the model has been at work")
    gateway.send(study.files[-1:])
    gateway.wait_for_state(study.uid, "quarantined")
    gateway.unblock("judge:begin")
    wait_until(lambda: gateway.results(study.uid)[0].state == ResultState.HELD, "the result is held")
    assert gateway.in_pacs(study.uid) == {}
    listed = json.loads(_seggate(gateway, "studies", "--state", "quarantined", "--json").stdout)
    assert [row["study_uid"] for row in listed] == [study.uid]

    refused = _seggate(gateway, "retry", study.uid)
    assert (refused.exit_code, "it is quarantined; seggate release" in refused.stderr) == (1, True)

    # Released while no worker runs: the next one finds it.
    gateway.end("worker")
    ran = _seggate(gateway, "release", study.uid, "--reason", _WHY, "--json")
    assert ran.exit_code == 0
    said = json.loads(ran.stdout)
    assert (said["state"], said["results"], said["objects_aside"]) == ("processing", 1, 1)
    gateway.start("worker")
    gateway.wait_for_state(study.uid, "verified")

    assert {modality: len(uids) for modality, uids in gateway.in_pacs(study.uid).items()} == {"SEG": 1, "SR": 1}
    shown = json.loads(_seggate(gateway, "show", study.uid, "--json").stdout)
    (aside,) = shown["objects_aside"]
    assert aside["state"] == "quarantined"
    assert "another patient than the study's first" in aside["state_reason"]
    assert gateway.spool_file(aside["spool_path"]).is_file()
    (event,) = [e for e in shown["events"] if e["kind"] == "quarantine-released"]
    assert (event["detail"]["reason"], event["actor"][:5]) == (_WHY, "user:")
    assert gateway.alarms("identity-conflict") == []
    assert gateway.alarms("result-held") == []
    again = _seggate(gateway, "release", study.uid, "--reason", _WHY)
    assert again.exit_code == 1
    assert "not quarantined; its state is verified (user:" in again.stderr
    unknown = _seggate(gateway, "release", "2.25.9.9", "--reason", _WHY)
    assert (unknown.exit_code, unknown.stderr) == (1, "seggate: no study begins with 2.25.9.9\n")
    assert gateway.kinds(study.uid)["released"] == 1
    assert gateway.verify_ledger() > 0
