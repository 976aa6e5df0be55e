"""Nothing that names a patient is in logs, metrics, alarms, URLs or file names (EMR-50).

Studies with seeded names, ids and accession numbers go through a gateway that logs at its most talkative level: one
the whole way, the others into every failure that can be arranged from outside. Then everything is searched.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from pydicom.uid import generate_uid
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from gateway.demo.stage import PATIENT_SYSTEM
from gateway.sending import PeerRefused
from storage.part10 import read_meta_elements
from storage.records import Alarm, Delivery, DeliveryState, Instance, InstanceState, Study, StudyState
from tests.support.emr_double import EmrDouble
from tests.support.intensity_model import write_intensity_bundle
from tests.support.phantoms import PhantomPatient, PhantomSeries, write_series
from tests.support.running_gateway import RunningGateway, running_gateway
from tests.support.scripted_peer import ScriptedPeer

SEED = "zqxv"  # in every value that must not get out
KNOWN = PhantomPatient(name="ZQXVname^Qwerta", patient_id="ZQXV-plmok", birth_date="19010203")
UNKNOWN = PhantomPatient(name="ZQXVother^Asdfa", patient_id="ZQXV-ijnuh", birth_date="19010203")
# Letters beyond f: neither a random id in hex digits nor a timestamp can hold them by chance.
SECRETS = (SEED, "qwerta", "asdfa", "plmok", "ijnuh", "19010203")
ROUTES = f"""
time_zone = "UTC"
[[rules]]
name = "all"
model = "sides"
[rules.when]
all = [
    {{ attribute = "Modality", op = "equals", value = "CT" }},
    {{ attribute = "PatientID", op = "matches-glob", value = "{SEED}*", case = "ignore" }},
]
"""


@dataclass(frozen=True)
class Aftermath:
    """Everything has happened; what is left to search."""

    gateway: RunningGateway
    emr: EmrDouble
    whole: PhantomSeries


def series(folder: Path, seed: int, patient: PhantomPatient) -> PhantomSeries:
    made = write_series(folder / str(seed), spacing_mm=(2.0, 2.0, 2.0), shape=(12, 14, 16), seed=seed, patient=patient)
    for file in made.files:
        dataset = pydicom.dcmread(file)
        dataset.AccessionNumber = "ZQXVacc"
        dataset.PatientAddress = "ZQXV street"
        dataset.OtherPatientIDs = "ZQXVold"
        dataset.ReferringPhysicianName = "ZQXVdoctor"
        dataset.InstitutionName = "ZQXV hospital"
        dataset.save_as(file)
    return made


def changed(made: PhantomSeries, folder: Path, **values: str) -> list[Path]:
    """Copies of the files with other values."""
    folder.mkdir()
    files = []
    for file in made.files:
        dataset = pydicom.dcmread(file)
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        files.append(folder / file.name)
        dataset.save_as(files[-1])
    return files


def truncated(made: PhantomSeries, folder: Path) -> Path:
    """A file whose pixel data end early and whose UID is its own."""
    (first, *_) = changed(made, folder)
    first.write_bytes(first.read_bytes()[:-10])
    return first


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    folder = tmp_path_factory.mktemp("privacy")
    bundle = write_intensity_bundle(folder / "model", name="sides")
    with socket.socket() as nobody, EmrDouble(patients=[(PATIENT_SYSTEM, KNOWN.patient_id)]) as emr:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: refuses connections for as long as the test runs
        root = emr.base_url.removesuffix("/fhir")
        destinations = f"""
[[dimse]]
name = "dead"
ae_title = "DEAD"
host = "127.0.0.1"
port = {nobody.getsockname()[1]}
first_retry_s = 0.5

[[dicomweb]]
name = "refuses"
url = "{root}/dicom-web"

[[fhir]]
name = "seen"
url = "{emr.base_url}"
patient_identifier_system = "{PATIENT_SYSTEM}"
first_retry_s = 0.5
"""
        with running_gateway(
            folder,
            routes=ROUTES,
            bundles=[bundle],
            patients=[KNOWN.patient_id],
            destinations_toml=destinations,
            logging_toml='level = "debug"\nformat = "json"\n',
        ) as gateway:
            whole = series(folder, 600, KNOWN)
            held = series(folder, 601, UNKNOWN)
            mixed = series(folder, 602, KNOWN)
            other = changed(mixed, folder / "mixed", PatientName=UNKNOWN.name, PatientID=UNKNOWN.patient_id)
            for file in other[::2]:
                other_slice = pydicom.dcmread(file)
                other_slice.SOPInstanceUID = generate_uid(entropy_srcs=[other_slice.SOPInstanceUID, "other"])
                other_slice.file_meta.MediaStorageSOPInstanceUID = other_slice.SOPInstanceUID
                other_slice.save_as(file)
            short = series(folder, 603, KNOWN)
            gateway.send([*whole.files, *held.files, *mixed.files, *other])
            gateway.send(changed(held, folder / "again", SeriesDescription="sent again with other content")[:1])
            send_raw(gateway, truncated(short, folder / "short"))
            with pytest.raises(PeerRefused):
                gateway.send(whole.files, calling_ae="STRANGER")

            def over(session: Session) -> bool:
                return (
                    _count(session, select(Study).where(Study.state == StudyState.QUARANTINED)) >= 1
                    and _count(session, select(Instance).where(Instance.state == InstanceState.QUARANTINED)) >= 1
                    and _deliveries(session, "emr") == {DeliveryState.VERIFIED, DeliveryState.QUEUED}
                    and _deliveries(session, "seen") == {DeliveryState.VERIFIED, DeliveryState.QUEUED}
                    and _attempts(session, "refuses") >= 1
                    and _attempts(session, "dead") >= 2
                )

            gateway.wait_for("every failure", over, timeout_s=150)
            yield Aftermath(gateway, emr, whole)


def found(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text.casefold()]


@pytest.mark.requirement("EMR-50", open="crash dumps, notifications")
def test_logs_name_no_patient(aftermath: Aftermath) -> None:
    log = aftermath.gateway.stage.log("gateway").read_text(encoding="utf-8")
    assert len(log.splitlines()) > 20
    assert '"level": "debug"' in log or '"level": "info"' in log
    lines = [line[:400] for line in log.splitlines() if found(line)]
    assert lines == []


@pytest.mark.requirement("EMR-50", open="crash dumps, notifications")
def test_metrics_and_health_name_no_patient(aftermath: Aftermath) -> None:
    for path in ("/metrics", "/health/ready", "/health/live"):
        answer = httpx.get(f"{aftermath.gateway.web_url}{path}", timeout=10)
        assert answer.text
        assert found(answer.text + str(answer.headers)) == []


@pytest.mark.requirement("EMR-50", open="crash dumps, notifications")
def test_alarms_and_reasons_name_no_patient(aftermath: Aftermath) -> None:
    """They are what a notification would carry."""
    with aftermath.gateway.database.reading() as session:
        alarms = [f"{a.kind} {a.subject} {a.message}" for a in session.scalars(select(Alarm))]
        reasons = [str(d.state_reason) for d in session.scalars(select(Delivery))]
        reasons += [str(s.state_reason) for s in session.scalars(select(Study))]
        reasons += [str(i.state_reason) for i in session.scalars(select(Instance))]
    assert {alarm.split()[0] for alarm in alarms} >= {
        "report-held",
        "identity-conflict",
        "conflicting-retransmit",
        "object-quarantined",
        "destination-away",
        "destination-refuses",
    }
    assert [text for text in alarms + reasons if found(text)] == []


@pytest.mark.requirement("EMR-50", open="crash dumps, notifications")
def test_file_names_name_no_patient(aftermath: Aftermath) -> None:
    state = aftermath.gateway.settings.state_dir
    names = [str(path.relative_to(state)) for path in state.rglob("*")]
    assert len([name for name in names if name.endswith(".dcm")]) > 30
    assert [name for name in names if found(name)] == []


@pytest.mark.requirement("EMR-50", open="crash dumps, notifications")
def test_the_models_folder_with_mlflow_holds_nothing_of_a_patient(aftermath: Aftermath) -> None:
    files = [path for path in aftermath.gateway.settings.models_dir.rglob("*") if path.is_file()]
    assert files
    assert [f.name for f in files if found(f.read_bytes().decode("latin-1"))] == []


@pytest.mark.requirement("EMR-50", open="crash dumps, notifications")
def test_urls_name_no_patient(aftermath: Aftermath) -> None:
    """Of the requests to EMR and DICOMweb server: path, query, and the headers that proxies log."""
    seen = aftermath.emr.seen
    assert {request.path.split("/")[1] for request in seen} == {"fhir", "dicom-web"}
    logged = [
        f"{r.method} {r.path}?{r.query} {r.headers.get('referer', '')} {r.headers.get('user-agent')}" for r in seen
    ]
    assert [line for line in logged if found(line)] == []
    assert any(found(r.body.decode("latin-1")) for r in seen), "the bodies do carry the patient"


def test_the_database_does_know_the_patient(aftermath: Aftermath) -> None:
    """Guards this test: the seeded values went in."""
    document = aftermath.gateway.document(aftermath.whole.study_instance_uid)
    assert (document["patient_name"], document["patient_id"]) == (KNOWN.name, KNOWN.patient_id)
    assert document["accession_number"] == "ZQXVacc"


def send_raw(gateway: RunningGateway, file: Path) -> None:
    """One object as it is, by a peer that does not look at it."""
    header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    with file.open("rb") as opened:
        _, offset = read_meta_elements(opened)
    with ScriptedPeer(gateway.address.port) as peer:
        peer.associate(calling_ae="DEMO-SCANNER")
        uid = str(header.SOPInstanceUID).encode()
        assert peer.store(file.read_bytes()[offset:], sop_instance=uid).status == 0
        peer.release()


def _count(session: Session, query: Select[Any]) -> int:
    return session.scalar(select(func.count()).select_from(query.subquery())) or 0


def _deliveries(session: Session, destination: str) -> set[str]:
    return set(session.scalars(select(Delivery.state).where(Delivery.destination == destination)))


def _attempts(session: Session, destination: str) -> int:
    return session.scalar(select(func.max(Delivery.attempts)).where(Delivery.destination == destination)) or 0
