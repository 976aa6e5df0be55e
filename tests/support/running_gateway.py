"""A whole gateway for a test module: all roles as processes, a PACS and an EMR, on free loopback ports.

with running_gateway(folder, routes=ROUTES, bundles=[...], patients=["PH-0001"]) as gateway:
    gateway.send(files)
    document = gateway.wait_until_ended(study_uid)

What the other side has is asked from the other side: `result_files` fetches from the PACS, `reports` from the EMR.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from engine.bundle import Bundle
from gateway.commands.studies import study_document
from gateway.demo.stage import GATEWAY_AE, PATIENT_SYSTEM, SCANNER_AE, Pacs, Stage
from gateway.demo.story import ask_pacs
from gateway.learning.registration import register
from gateway.sending import SendReport, send_files
from gateway.setting_types import PeerAddress
from gateway.settings import Settings, load_settings
from storage.database import Database
from storage.records import Executor, Instance, InstanceState, Study, StudyState

Json = dict[str, Any]
ENDED = frozenset(
    {
        StudyState.UNMATCHED,
        StudyState.VERIFIED,
        StudyState.HELD,
        StudyState.QUARANTINED,
        StudyState.FAILED,
    }
)
_RESULT_MODALITIES = ("SEG", "SR", "OT")
_KEPT = {"SEGGATE_REQUIRE_PEERS", "SEGGATE_SHARED"}


@dataclass(frozen=True)
class RunningGateway:
    """One gateway and its peers; `database` is the gateway's own."""

    stage: Stage
    settings: Settings
    database: Database

    @property
    def config(self) -> Path:
        return self.stage.config

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(ae_title=GATEWAY_AE, host="127.0.0.1", port=self.stage.ports["gateway"])

    @property
    def web_url(self) -> str:
        return f"http://127.0.0.1:{self.stage.ports['web']}"

    def send(self, sources: Path | Sequence[Path], *, calling_ae: str = SCANNER_AE) -> SendReport:
        """Send by C-STORE; what could not be sent is in the report."""
        return send_files(sources, self.address, calling_ae=calling_ae)

    def add_patient(self, patient_id: str) -> None:
        """Make the EMR know a patient."""
        patient = {"resourceType": "Patient", "identifier": [{"system": PATIENT_SYSTEM, "value": patient_id}]}
        httpx.post(f"{self.stage.emr_url}/Patient", json=patient, timeout=10).raise_for_status()

    def wait_for(self, what: str, condition: Callable[[Session], bool], *, timeout_s: float = 90) -> None:
        """Wait until the gateway's database fulfils a condition; fails with `what` and the end of the log."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.stage.check_alive()
            with self.database.reading() as session:
                if condition(session):
                    return
            time.sleep(0.1)
        log = self.stage.log("gateway").read_text(encoding="utf-8", errors="replace")
        pytest.fail(f"{what}: not within {timeout_s:g} s; end of the gateway's log:\n{log[-3000:]}")

    def wait_until_ended(self, study_uid: str, *, timeout_s: float = 90) -> Json:
        """The study's document once it is in a final state."""

        def ended(session: Session) -> bool:
            study = session.get(Study, study_uid)
            return study is not None and study.state in ENDED

        self.wait_for(f"the end of study {study_uid}", ended, timeout_s=timeout_s)
        return self.document(study_uid)

    def wait_until_indexed(self, count: int, *, timeout_s: float = 60) -> None:
        """Until the index holds `count` objects, whatever became of them."""
        self.wait_for(f"{count} objects in the index", lambda session: _objects(session) >= count, timeout_s=timeout_s)

    def document(self, study_uid: str) -> Json:
        """What `seggate show --json` prints."""
        with self.database.reading() as session:
            return study_document(session, session.get_one(Study, study_uid))

    def instances(self) -> list[Instance]:
        """Every row of the index of objects."""
        with self.database.reading() as session:
            rows = list(session.scalars(select(Instance)).all())
            session.expunge_all()
            return rows

    def states(self) -> dict[str, int]:
        """InstanceState → number of objects."""
        found = [str(row.state) for row in self.instances()]
        return {state: found.count(state) for state in sorted(set(found) | set(InstanceState)) if state in found}

    def in_pacs(self, study_uid: str) -> list[dict[str, str]]:
        """The results that the PACS has for a study, by C-FIND."""
        return [o for o in ask_pacs(self.stage, study_uid) if o["modality"] in _RESULT_MODALITIES]

    def result_files(self, study_uid: str, folder: Path) -> dict[str, Path]:
        """Modality → file fetched from the PACS; fails when there is more than one of a modality."""
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Path] = {}
        for item in self.in_pacs(study_uid):
            assert item["modality"] not in files, f"two objects of modality {item['modality']}"
            path = folder / f"{item['modality']}.dcm"
            path.write_bytes(self._from_pacs(item["sop_instance_uid"]))
            files[item["modality"]] = path
        return files

    def reports(self, document: Json) -> list[Json]:
        """DiagnosticReports that the EMR has for the results of a study."""
        found: list[Json] = []
        for result in document["results"]:
            # The identifier's system is left out on purpose: a report under any system is found.
            answer = httpx.get(
                f"{self.stage.emr_url}/DiagnosticReport", params={"identifier": result["result_id"]}, timeout=10
            )
            found += [entry["resource"] for entry in answer.raise_for_status().json().get("entry", [])]
        return found

    def observations(self, report: Json) -> list[Json]:
        """The Observations that a report refers to, read one by one."""
        return [self.resource(r["reference"]) for r in report["result"]]

    def resource(self, reference: str) -> Json:
        answer = httpx.get(f"{self.stage.emr_url}/{reference}", timeout=10)
        found: Json = answer.raise_for_status().json()
        return found

    def _from_pacs(self, sop_instance_uid: str) -> bytes:
        if self.stage.pacs == "embedded":
            name = hashlib.sha256(sop_instance_uid.encode()).hexdigest()[:32]
            return (self.stage.folder / "pacs" / f"{name}.dcm").read_bytes()
        base = f"http://127.0.0.1:{self.stage.ports['pacs_http']}"
        found = httpx.post(f"{base}/tools/lookup", content=sop_instance_uid, timeout=10).raise_for_status().json()
        (instance,) = [entry["ID"] for entry in found if entry["Type"] == "Instance"]
        return httpx.get(f"{base}/instances/{instance}/file", timeout=30).raise_for_status().content


@contextmanager
def running_gateway(
    folder: Path,
    *,
    routes: str,
    bundles: Iterable[Bundle],
    patients: Sequence[str] = (),
    gateway_toml: str = "",
    destinations_toml: str = "",
    logging_toml: str | None = None,
    pacs: Pacs | None = None,
) -> Iterator[RunningGateway]:
    """Start everything below `folder`, end it at the end, each process by its id.

    `gateway_toml` and `destinations_toml` are appended to the stage's files (tables that those do not have yet);
    `logging_toml` replaces the stage's.
    """
    stage = Stage(folder / "stage", pacs)
    with pytest.MonkeyPatch.context() as environment:
        for name in [n for n in os.environ if n.startswith("SEGGATE_") and n not in _KEPT]:
            environment.delenv(name)
        stage.prepare()
        try:
            stage.start_pacs()
            stage.start_emr(patients)
            routes_file = folder / "routes.toml"
            routes_file.write_text(routes, encoding="utf-8")
            stage.write_config(routes_file)
            _append(stage.config / "gateway.toml", gateway_toml)
            _append(stage.config / "destinations.toml", destinations_toml)
            if logging_toml is not None:
                (stage.config / "logging.toml").write_text(logging_toml, encoding="utf-8")
            settings = load_settings(stage.config)
            for bundle in bundles:
                register(settings, bundle, candidate=False, actor="test")
            stage.start_gateway()
            database = Database(settings.database_url)
            gateway = RunningGateway(stage, settings, database)
            try:
                # A delivery process that has reported in has loaded everything it needs.
                gateway.wait_for("worker and delivery", lambda s: _roles(s) >= {"worker", "delivery"})
                yield gateway
            finally:
                database.close()
        finally:
            stage.stop()


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")


def _roles(session: Session) -> set[str]:
    return set(session.scalars(select(Executor.role).where(Executor.stopped_at.is_(None))))


def _objects(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Instance)) or 0
