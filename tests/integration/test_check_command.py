"""`seggate check` against real and misbehaving peers, before the first start and beside a running receiver."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.delivery.destination import STORED_CLASSES
from gateway.intake.scp import Receiver
from gateway.settings import load_settings
from gateway.state import open_spool, prepare_state
from gateway.web import make_app, server
from tests.support import pacs
from tests.support.config_folder import LOOPBACK_SENDER, write_config
from tests.support.emr_double import EmrDouble

SYSTEM = "urn:oid:2.25.1"


def _dimse(peer: pacs.RunningPacs, extra: str = "") -> str:
    return (
        f'[[dimse]]\nname = "{peer.ae_title.lower()}"\nae_title = "{peer.ae_title}"\nhost = "{peer.host}"\n'
        f"port = {peer.port}\ntimeout_s = 5\n{extra}\n"
    )


def _fhir(url: str, extra: str = "") -> str:
    return f'[[fhir]]\nname = "emr"\nurl = "{url}"\npatient_identifier_system = "{SYSTEM}"\ntimeout_s = 5\n{extra}\n'


def _wait_until_listening(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on {port}")


def check(config: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and document of `seggate check --json`."""
    ran = CliRunner().invoke(app, ["check", "--config", str(config), "--json"])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran.exit_code, json.loads(ran.stdout)


def line(document: dict[str, Any], name: str) -> dict[str, str]:
    return next(c for c in document["checks"] if c["check"] == name)


def advice(document: dict[str, Any], who: str) -> str:
    return "\n".join(next(a for a in document["must_enter"] if a["who"] == who)["lines"])


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[pacs.RunningPacs]:
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs")) as peer:
        yield peer


@pytest.mark.requirement("OPS-62", open="GPU, TLS, echo from the other side, compose; see docker/")
def test_before_the_first_start_everything_is_tested_and_nothing_is_made(
    tmp_path: Path, scripted: pacs.RunningPacs
) -> None:
    with EmrDouble() as emr:
        config = write_config(
            tmp_path, gateway=LOOPBACK_SENDER, destinations=_dimse(scripted) + _fhir(emr.base_url), port=0
        )
        code, document = check(config)
    assert code == 0, document["checks"]
    assert document["ok"] is True
    assert {"configuration", "disk sync", "disk space", "database", "clock", "receiver port", "web port"} <= {
        c["check"] for c in document["checks"]
    }
    assert line(document, "PACS scripted")["status"] == "ok"
    assert "BINARY accepted" in line(document, "PACS scripted")["detail"]
    assert line(document, "EMR emr")["status"] == "ok"
    assert not (tmp_path / "state").exists()


def test_the_other_sides_administrators_are_told_what_to_enter(tmp_path: Path, scripted: pacs.RunningPacs) -> None:
    with EmrDouble() as emr:
        config = write_config(
            tmp_path, gateway=LOOPBACK_SENDER, destinations=_dimse(scripted) + _fhir(emr.base_url), port=11112
        )
        _, document = check(config)
    scanner = advice(document, "scanner")
    assert "AE title SEGGATE, host 127.0.0.1, port 11112" in scanner
    assert "CT1 may send from 127.0.0.1" in scanner
    archive = advice(document, "PACS scripted")
    assert "SEGGATE" in archive
    assert STORED_CLASSES["BINARY"][0] in archive
    assert SYSTEM in advice(document, "EMR emr")


def test_a_person_gets_a_table_and_the_reasons(tmp_path: Path) -> None:
    config = write_config(tmp_path, destinations=_fhir("http://127.0.0.1:1/fhir"))
    ran = CliRunner().invoke(app, ["check", "--config", str(config)], env={"COLUMNS": "200"})
    assert ran.exit_code == 1
    assert "nobody may send" in ran.stdout
    assert "[[senders]]" in ran.stdout
    assert "What the other side must enter" in ran.stdout
    assert "1 failed" in ran.stdout


def test_faults_of_the_configuration_are_the_report(tmp_path: Path) -> None:
    config = write_config(tmp_path, gateway="prot = 11112")
    code, document = check(config)
    assert code == 1
    assert any("receiver.prot" in c["detail"] and c["status"] == "failed" for c in document["checks"])
    assert document["must_enter"] == []


@pytest.mark.parametrize(("gateway", "words"), [(LOOPBACK_SENDER, "answers C-ECHO"), ("", "refuses SEGGATE")])
def test_a_port_on_which_our_receiver_runs_is_ok(tmp_path: Path, gateway: str, words: str) -> None:
    port = pacs.free_port()
    config = write_config(tmp_path, gateway=gateway, port=port)
    settings = load_settings(config)
    receiver = Receiver(settings, open_spool(settings))
    receiver.start()
    try:
        _, document = check(config)
    finally:
        receiver.stop()
    assert line(document, "receiver port")["status"] == "ok"
    assert words in line(document, "receiver port")["detail"]


def test_a_receiver_that_is_full_is_not_called_another_program(tmp_path: Path) -> None:
    port = pacs.free_port()
    settings = load_settings(write_config(tmp_path, gateway=LOOPBACK_SENDER, port=port))
    receiver = Receiver(settings, open_spool(settings))
    receiver.start()
    try:
        receiver.spool.reserve_bytes = 1 << 60
        _, document = check(write_config(tmp_path, gateway=LOOPBACK_SENDER, port=port, reserve_mb=1 << 40))
    finally:
        receiver.stop()
    assert "accepts nothing at the moment: too little disk space" in line(document, "receiver port")["detail"]
    assert line(document, "disk space")["status"] == "failed"


def test_a_port_on_which_our_web_role_runs_is_ok(tmp_path: Path) -> None:
    port = pacs.free_port()
    config = write_config(tmp_path, web_port=port)
    settings = load_settings(config)
    database, spool = prepare_state(settings), open_spool(settings)
    running = server(make_app(settings, database, spool), settings.gateway.web)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    try:
        _wait_until_listening(port)
        _, document = check(config)
    finally:
        running.should_exit = True
        thread.join(timeout=10)
        database.close()
    assert line(document, "web port") == {
        "check": "web port",
        "status": "ok",
        "detail": f"127.0.0.1:{port}: our web role runs",
    }
    assert line(document, "database")["detail"].startswith("sqlite: reachable, revision")


def test_a_port_on_which_another_program_listens_fails(tmp_path: Path, scripted: pacs.RunningPacs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = write_config(
            tmp_path,
            gateway='ae_title = "SCRIPTED"\n' + LOOPBACK_SENDER,
            port=scripted.port,
            web_port=other.getsockname()[1],
        )
        code, document = check(config)
    assert code == 1
    assert "another DICOM program" in line(document, "receiver port")["detail"]
    assert line(document, "web port")["status"] == "failed"


def test_a_pacs_that_is_down_fails_and_the_others_are_still_tested(tmp_path: Path, scripted: pacs.RunningPacs) -> None:
    down = pacs.RunningPacs(ae_title="DOWN", host="127.0.0.1", port=pacs.free_port(), folder=tmp_path)
    code, document = check(write_config(tmp_path, destinations=_dimse(down) + _dimse(scripted)))
    assert code == 1
    assert line(document, "PACS down")["status"] == "failed"
    assert "cannot be reached" in line(document, "PACS down")["detail"]
    assert line(document, "PACS scripted")["status"] == "ok"
    assert {d["name"]: d["reachable"] for d in document["destinations"]} == {"down": False, "scripted": True}


def test_a_pacs_that_takes_no_configured_encoding_fails(tmp_path: Path) -> None:
    refused = [*STORED_CLASSES["BINARY"], *STORED_CLASSES["LABELMAP"]]
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs", refused_classes=refused)) as peer:
        code, document = check(write_config(tmp_path, destinations=_dimse(peer, 'encodings = ["LABELMAP", "BINARY"]')))
    assert code == 1
    assert line(document, "PACS scripted")["status"] == "failed"
    assert "none of the configured encodings" in line(document, "PACS scripted")["detail"]


@pytest.mark.peer("dcmtk")
def test_a_pacs_without_query_is_a_warning(tmp_path: Path) -> None:
    with pacs.storescp(tmp_path / "storescp") as peer:
        code, document = check(write_config(tmp_path, destinations=_dimse(peer, 'verify = "c-find"')))
    assert line(document, "PACS storescp")["status"] == "warning"
    assert "'stored'" in line(document, "PACS storescp")["detail"]
    assert code == 0


@pytest.mark.peer("orthanc")
def test_orthanc_by_its_three_interfaces(tmp_path: Path) -> None:
    with pacs.orthanc(tmp_path / "orthanc") as peer:
        destinations = (
            _dimse(peer)
            + f'[[dicomweb]]\nname = "web"\nurl = "{peer.dicomweb_url}"\n'
            + f'[[orthanc]]\nname = "rest"\nurl = "{peer.http_url}"\n'
        )
        _, document = check(write_config(tmp_path, destinations=destinations))
    assert [line(document, f"PACS {n}")["status"] for n in ("orthanc", "web", "rest")] == ["ok", "ok", "ok"]


def test_an_emr_that_refuses_the_credentials_fails_though_its_capability_is_public(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("very-secret")
    with EmrDouble() as emr:
        emr.fail(401, path="/fhir/Patient/_search", forever=True)
        destinations = _fhir(emr.base_url, f'auth = "token"\ntoken_file = "{tmp_path / "token"}"')
        code, document = check(write_config(tmp_path, destinations=destinations))
    assert code == 1
    assert line(document, "EMR emr")["status"] == "failed"
    assert "HTTP 401" in line(document, "EMR emr")["detail"]
    assert "very-secret" not in json.dumps(document)


def test_an_emr_that_is_away_and_one_whose_secret_is_missing_fail(tmp_path: Path) -> None:
    away = _fhir("http://127.0.0.1:1/fhir")
    secret = _fhir("http://127.0.0.1:1/fhir", f'auth = "token"\ntoken_file = "{tmp_path / "absent"}"')
    for destinations, words in ((away, "no connection"), (secret, "cannot read")):
        code, document = check(write_config(tmp_path, destinations=destinations))
        assert code == 1
        assert line(document, "EMR emr")["status"] == "failed"
        assert words in line(document, "EMR emr")["detail"]


def test_an_emr_without_transactions_is_a_warning(tmp_path: Path) -> None:
    statement = {
        "resourceType": "CapabilityStatement",
        "fhirVersion": "4.0.1",
        "rest": [{"mode": "server", "interaction": [{"code": "batch"}]}],
    }
    with EmrDouble(capability=statement) as emr:
        _, document = check(write_config(tmp_path, destinations=_fhir(emr.base_url)))
    assert line(document, "EMR emr")["status"] == "warning"
    assert "DocumentReference alone" in line(document, "EMR emr")["detail"]


def test_whoever_is_asked_for_expected_counts_is_tested(tmp_path: Path, scripted: pacs.RunningPacs) -> None:
    down = pacs.free_port()
    senders = "".join(
        f'[[senders]]\nae_title = "{ae}"\naddresses = ["127.0.0.1"]\n'
        f'query = {{ ae_title = "SCRIPTED", host = "127.0.0.1", port = {port} }}\n'
        for ae, port in (("CT1", scripted.port), ("CT2", down))
    )
    _, document = check(write_config(tmp_path, gateway=senders))
    assert line(document, "query for CT1")["status"] == "ok"
    assert line(document, "query for CT2")["status"] == "warning"
