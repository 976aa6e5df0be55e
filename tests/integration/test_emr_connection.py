"""An EMR whose secrets cannot be read keeps its own reports waiting, with an alarm, and nobody else's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy import select

from emr.errors import CredentialsInvalid, Misconfigured
from gateway.app import emr_clients, emr_connections
from gateway.destination_settings import DestinationSettings
from gateway.settings import Settings, SettingsInvalid, load_settings
from gateway.state import prepare_state
from storage.database import Database
from storage.records import Executor
from tests.support.config_folder import write_config
from tests.support.emr_double import EmrDouble
from tests.support.report_content import PATIENT_ID, PATIENT_SYSTEM, report_content
from tests.support.waiting import wait_until

_SMART = {"client_id": "gateway", "key_id": "1", "token_url": "http://127.0.0.1:1/token"}


@pytest.fixture
def emr() -> Iterator[EmrDouble]:
    with EmrDouble(patients=[(PATIENT_SYSTEM, PATIENT_ID)]) as emr:
        yield emr


def settings(emr: EmrDouble, **more: Any) -> Settings:
    fhir = {"name": "emr", "url": emr.base_url, "patient_identifier_system": PATIENT_SYSTEM, **more}
    return Settings.model_construct(destinations=DestinationSettings.model_validate({"fhir": [fhir]}))


@pytest.mark.requirement("EMR-47")
@pytest.mark.parametrize("auth", ["token", "basic"])
def test_an_absent_secret_is_told_by_the_contact_and_used_once_it_is_there(
    emr: EmrDouble, tmp_path: Path, auth: str
) -> None:
    secret = tmp_path / "secret"
    files = {"token_file": secret} if auth == "token" else {"username": "gateway", "password_file": secret}
    connection = emr_connections(settings(emr, auth=auth, **files))["emr"]
    for _ in range(2):
        with pytest.raises(Misconfigured, match=r"cannot read .*secret"):
            connection.send(report_content(2))
    assert emr.seen == []
    secret.write_text("there\n")
    receipt = connection.send(report_content(2))
    assert receipt.created
    assert connection.verify(receipt.report_id, report_content(2).result_id)
    connection.close()


@pytest.mark.parametrize("content", [None, "not a key"])
def test_a_key_that_cannot_be_used_is_told_by_the_contact(emr: EmrDouble, tmp_path: Path, content: str | None) -> None:
    key_file = tmp_path / "key.pem"
    if content is not None:
        key_file.write_text(content)
    configured = settings(emr, auth="smart", smart={**_SMART, "key_file": key_file})
    connection = emr_connections(configured)["emr"]
    with pytest.raises(CredentialsInvalid, match="key_file"):
        connection.send(report_content(2))
    with pytest.raises(SettingsInvalid, match="key_file"):  # as `seggate check` says it
        emr_clients(configured)
    key = ec.generate_private_key(ec.SECP384R1())
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    emr_clients(configured)["emr"].close()
    connection.close()


def test_the_delivery_process_starts_without_the_secret_of_an_emr(tmp_path: Path) -> None:
    fhir = f'[[fhir]]\nname = "emr"\nurl = "http://127.0.0.1:1"\npatient_identifier_system = "{PATIENT_SYSTEM}"\n'
    config = write_config(tmp_path, destinations=f'{fhir}auth = "token"\ntoken_file = "{tmp_path / "absent"}"\n')
    database = prepare_state(load_settings(config))
    command = [sys.executable, "-m", "gateway.role", "services", "--config", str(config), "--roles", "delivery"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: process.poll() is not None or delivers(database), "the delivery role beats")
        assert process.poll() is None
    finally:
        process.terminate()
        _, said = process.communicate(timeout=60)
        database.close()
    assert (process.returncode, said) == (0, "")


def delivers(database: Database) -> bool:
    with database.reading() as session:
        return session.scalars(select(Executor).where(Executor.role == "delivery")).first() is not None


def test_an_absent_ca_file_is_told_by_the_contact(emr: EmrDouble, tmp_path: Path) -> None:
    connection = emr_connections(settings(emr, ca_file=tmp_path / "ca.pem"))["emr"]
    with pytest.raises(Misconfigured, match="ca_file"):
        connection.send(report_content(2))
    connection.close()
