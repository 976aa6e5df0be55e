"""The demo's story: a study goes in by C-STORE, and what became of it is looked up at the PACS and the EMR.

What is reported as found was asked from the other side: objects by C-FIND at the PACS, the report by a FHIR search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pynetdicom import AE
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind

from emr.codes import IDENTIFIER_SYSTEM
from engine.bundle import load_bundle
from gateway.commands.studies import study_document
from gateway.demo.stage import GATEWAY_AE, PACS_AE, SCANNER_AE, Stage, StageFailed
from gateway.demo.synthetic_study import write_synthetic_study
from gateway.learning.registration import register
from gateway.model_shelf import ModelShelf
from gateway.results.encoding import Encoding
from gateway.sending import PeerRefused, send_files
from gateway.service_user import keep_answers
from gateway.setting_types import PeerAddress
from gateway.settings import load_settings
from gateway.state import open_registry, open_spool, software_version
from storage.database import Database
from storage.records import Study, StudyState

_ENDED = {
    StudyState.UNMATCHED,
    StudyState.VERIFIED,
    StudyState.HELD,
    StudyState.QUARANTINED,
    StudyState.FAILED,
}
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What happened to one study. `in_pacs` and `reports` are what the other side says."""

    study_uid: str
    state: str
    seconds: float
    document: dict[str, Any]
    in_pacs: list[dict[str, str]]
    reports: list[str]
    overlay: Path | None

    @property
    def verified(self) -> bool:
        """Everything that was released is found at the PACS and the EMR by asking them."""
        released = [r for r in self.document["results"] if r["state"] == "released"]
        wanted = {o["sop_instance_uid"] for r in released for d in r["deliveries"] for o in _sent(d)}
        found = {o["sop_instance_uid"] for o in self.in_pacs}
        return bool(released) and self.state == StudyState.VERIFIED and wanted <= found and bool(self.reports)

    def summary(self, pacs: str) -> dict[str, Any]:
        """The JSON object that `--json` prints."""
        result = next((r for r in self.document["results"] if r["state"] == "released"), None)
        by_modality = {o["modality"]: o["sop_instance_uid"] for o in self.in_pacs}
        measurements = (result or {}).get("measurements") or []
        return {
            "study_uid": self.study_uid,
            "state": self.state,
            "reason": self.document["reason"],
            "seconds": round(self.seconds, 3),
            "seg": {
                "sop_instance_uid": by_modality.get("SEG"),
                "segments": [
                    {"label": m["name"], "volume_ml": round(m["volume_ml"], 4), "voxels": m["voxels"]}
                    for m in measurements
                ],
            }
            if result
            else None,
            "sr": by_modality.get("SR"),
            "report_id": self.reports[0] if self.reports else None,
            "counts": {
                "SEG": sum(o["modality"] == "SEG" for o in self.in_pacs),
                "SR": sum(o["modality"] == "SR" for o in self.in_pacs),
                "report": len(self.reports),
            },
            "verdict": (result or {}).get("verdict"),
            "pacs": pacs,
            "overlay": str(self.overlay) if self.overlay else None,
            "verified": self.verified,
        }


def set_the_stage(stage: Stage, study: Path | None, routes: Path, tell: Tell) -> tuple[Path, Sequence[str]]:
    """Prepare and start everything; returns the folder to send and the studies in it."""
    stage.prepare()
    if study is None:
        source = stage.folder / "study"
        write_synthetic_study(source)
        tell("study: synthetic, made on the spot, in the shape of a real hippocampus crop series (T1, 1 mm)")
        tell("       inside a study with other series; no patient's image")
    else:
        source = study
        tell(f"study: {study}")
    studies, patients = _identities(source)
    if not studies:
        raise StageFailed(f"{source} holds no DICOM files")
    stage.start_pacs()
    kind = "Orthanc" if stage.pacs == "orthanc" else "embedded archive"
    tell(f"PACS:  {kind}, {PACS_AE} on port {stage.ports['pacs']}")
    stage.start_emr(patients)
    tell(f"EMR:   {stage.emr_url}")
    stage.write_config(routes)
    settings = load_settings(stage.config)
    for folder in (settings.state_dir, settings.spool_dir, settings.models_dir):
        if not folder.resolve().is_relative_to(stage.folder):
            raise StageFailed(f"{folder} is outside {stage.folder}; the demo touches no other state")
    model = register(settings, load_bundle(model_folder()), candidate=False, actor="demo")
    tell(f"model: {model.name} {model.semver}")
    stage.start_gateway()
    _wait_until_ready(stage)
    tell(f"gateway: {GATEWAY_AE} on port {stage.ports['gateway']}, health and metrics on port {stage.ports['web']}")
    return source, studies


def model_folder() -> Path:
    """The demo model's bundle, part of the package."""
    return Path(__file__).parent / "model"


def send(stage: Stage, source: Path, progress: Callable[[int, int], None]) -> tuple[int, list[tuple[str, str]]]:
    """Send every DICOM file below `source`; returns (sent, files that could not be sent with the reason).

    `progress(done, total)` is told after each response. Raises StageFailed when the gateway refuses the association.
    """
    peer = PeerAddress(ae_title=GATEWAY_AE, host="127.0.0.1", port=stage.ports["gateway"])
    try:
        report = send_files(source, peer, calling_ae=SCANNER_AE, progress=lambda at: progress(at.done, at.total))
    except PeerRefused as error:
        raise StageFailed(f"the gateway refuses the sender: {error}; its log: {stage.log('gateway')}") from error
    return len(report.sent) + len(report.warnings), [(str(f.path), f.reason) for f in report.failed]


def follow(stage: Stage, study_uid: str, *, timeout_s: float, tell: Tell) -> Outcome:
    """Wait until the study's story has ended, telling each new event; then ask PACS and EMR what they have."""
    database = Database(load_settings(stage.config).database_url)
    began = time.monotonic()
    told = 0
    state = None
    while time.monotonic() - began < timeout_s:
        stage.check_alive()
        with database.reading() as session:
            study = session.get(Study, study_uid)
            if study is not None:
                document = study_document(session, study)
                for event in document["events"][told:]:
                    tell(f"  {event['kind']}")
                told = len(document["events"])
                state = StudyState(study.state)
                if state in _ENDED:
                    break
        time.sleep(0.1)
    else:
        where = f"its state is {state}" if state else "it is not known to the gateway"
        raise StageFailed(f"study {study_uid} did not end within {timeout_s:g} s; {where}; log: {stage.log('gateway')}")
    overlay = _overlay(stage, database, document)
    database.close()
    return Outcome(
        study_uid=study_uid,
        state=str(state),
        seconds=_seconds(document),
        document=document,
        in_pacs=[o for o in ask_pacs(stage, study_uid) if o["modality"] in ("SEG", "SR", "OT")],
        reports=ask_emr(stage, document),
        overlay=overlay,
    )


def ask_pacs(stage: Stage, study_uid: str) -> list[dict[str, str]]:
    """Every object of the study that the PACS has, by C-FIND at IMAGE level, series by series."""
    found: list[dict[str, str]] = []
    for series in _find(stage, "SERIES", StudyInstanceUID=study_uid, SeriesInstanceUID="", Modality=""):
        uid = str(series.SeriesInstanceUID)
        for image in _find(
            stage, "IMAGE", StudyInstanceUID=study_uid, SeriesInstanceUID=uid, SOPInstanceUID="", SOPClassUID=""
        ):
            found.append(
                {
                    "modality": str(series.get("Modality", "")),
                    "series_instance_uid": uid,
                    "sop_instance_uid": str(image.SOPInstanceUID),
                }
            )
    return found


def ask_emr(stage: Stage, document: dict[str, Any]) -> list[str]:
    """The reports that the EMR has for the study's results, by a FHIR search."""
    reports: list[str] = []
    with httpx.Client(timeout=10) as http:
        for result in document["results"]:
            answer = http.get(
                f"{stage.emr_url}/DiagnosticReport",
                params={"identifier": f"{IDENTIFIER_SYSTEM}|{result['result_id']}"},
            )
            answer.raise_for_status()
            reports += [f"DiagnosticReport/{e['resource']['id']}" for e in answer.json().get("entry", [])]
    return reports


def _find(stage: Stage, level: str, **keys: str) -> list[Dataset]:
    query = Dataset()
    query.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(query, keyword, value)
    entity = AE(ae_title=SCANNER_AE)
    entity.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
    association = entity.associate("127.0.0.1", stage.ports["pacs"], ae_title=PACS_AE)
    if not association.is_established:
        raise StageFailed(f"the PACS does not answer C-FIND; its log: {stage.log('pacs')}")
    keep_answers(association)
    try:
        answers = association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind)
        return [data for status, data in answers if status.get("Status") in (0xFF00, 0xFF01) and data is not None]
    finally:
        association.release()


def _identities(source: Path) -> tuple[list[str], list[str]]:
    """Study Instance UIDs and Patient IDs in a folder; unreadable files are left to the sending, which names them."""
    studies: dict[str, None] = {}
    patients: dict[str, None] = {}
    for path in sorted(p for p in (source.rglob("*") if source.is_dir() else [source]) if p.is_file()):
        try:
            header = dcmread(path, stop_before_pixels=True, specific_tags=["StudyInstanceUID", "PatientID"])
        except (InvalidDicomError, OSError, ValueError, AttributeError, NotImplementedError):
            continue
        if header.get("StudyInstanceUID"):
            studies.setdefault(str(header.StudyInstanceUID))
        if header.get("PatientID"):
            patients.setdefault(str(header.PatientID))
    return list(studies), list(patients)


def _wait_until_ready(stage: Stage, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    with httpx.Client(timeout=5) as http:
        while time.monotonic() < deadline:
            stage.check_alive()
            try:
                if http.get(f"http://127.0.0.1:{stage.ports['web']}/health/ready").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
    raise StageFailed(f"the gateway was not ready within {timeout_s:g} s; its log: {stage.log('gateway')}")


def _seconds(document: dict[str, Any]) -> float:
    """From the last object to the end of the last delivery."""
    ends = [d["updated_at"] for r in document["results"] for d in r["deliveries"]]
    last = max(ends, default=document["events"][-1]["at"] if document["events"] else document["last_received_at"])
    return float((last - document["last_received_at"]).total_seconds())


def _sent(delivery: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects that a PACS delivery stored or verified."""
    ladder = (delivery["objects"] or [{}])[0]
    return [o for o in ladder.get("objects", []) if o.get("rung") in ("stored", "verified")]


def _overlay(stage: Stage, database: Database, document: dict[str, Any]) -> Path | None:
    """A picture of the first released result on its own source series."""
    released = next((r for r in document["results"] if r["state"] == "released"), None)
    if released is None:
        return None
    path = stage.folder / "overlay.png"
    settings = load_settings(stage.config)
    encoding = Encoding(
        database=database,
        spool=open_spool(settings),
        shelf=ModelShelf(open_registry(settings)),
        settings=settings,
        software_version=software_version(),
    )
    encoding.overlay(released["result_id"], path)
    return path
