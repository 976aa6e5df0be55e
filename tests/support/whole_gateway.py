"""A whole gateway on free loopback ports, with a PACS and an EMR of the test's choice around it.

Receiver and indexer are the real processes. Worker and delivery are those of tests/support/dying_role.py, so that a
test can kill or block them at a point. What arrived is asked from the other side: C-FIND at the PACS, FHIR search at
the EMR.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as StudyRootFind
from sqlalchemy import select

from emr.codes import IDENTIFIER_SYSTEM
from engine.bundle import load_bundle
from gateway.demo.story import model_folder
from gateway.demo.synthetic_study import PATIENT_ID, write_synthetic_study
from gateway.learning.registration import register
from gateway.sending import send_files
from gateway.setting_types import PeerAddress
from gateway.settings import Settings, load_settings
from gateway.state import open_spool, prepare_state
from storage import ledger
from storage.database import Database
from storage.records import Alarm, Delivery, Executor, LedgerEvent, Result, ResultObject, Study, StudyVersion
from tests.support.pacs import ScriptedPacs, free_port, scripted
from tests.support.peers import ROOT
from tests.support.waiting import PATIENCE_S, wait_until

PATIENT_SYSTEM = "urn:oid:2.25.77"
SENDER = "SCANNER"
_ENDED = {"verified", "failed", "held", "unmatched", "quarantined"}


@dataclass(frozen=True)
class SentStudy:
    """A synthetic study as it was written: only the series that the routes file wants, in the order of its slices."""

    uid: str
    files: tuple[Path, ...]


@dataclass
class WholeGateway:
    """Folders, processes and eyes of one gateway. Use `whole_gateway`, which ends what was started."""

    folder: Path
    port: int
    pacs_address: tuple[str, int]  # AE title, port
    emr_url: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _database: Database = field(init=False)

    @property
    def config(self) -> Path:
        return self.folder / "config"

    @property
    def control(self) -> Path:
        return self.folder / "control"

    @property
    def settings(self) -> Settings:
        return load_settings(self.config)

    @property
    def database(self) -> Database:
        return self._database

    def prepare(self, *, worker: str, more: str, destinations: str) -> None:
        for folder in (self.config, self.control, self.folder / "logs"):
            folder.mkdir(parents=True)
        (self.config / "gateway.toml").write_text(
            f"""state_dir = "state"
institution = "Test"
[receiver]
ae_title = "SEGGATE"
host = "127.0.0.1"
port = {self.port}
reserve_mb = 16
[[senders]]
ae_title = "{SENDER}"
addresses = ["127.0.0.1"]
[completeness]
quiet_s = 0.3
quiet_open_s = 5.0
[worker]
device = "cpu"
threads = 2
poll_s = 0.1
{worker}
{more}
"""
        )
        ae_title, port = self.pacs_address
        (self.config / "destinations.toml").write_text(
            destinations
            or f"""[[dimse]]
name = "pacs"
ae_title = "{ae_title}"
host = "127.0.0.1"
port = {port}
first_retry_s = 0.3
max_retry_s = 1.0
timeout_s = 20
[[fhir]]
name = "emr"
url = "{self.emr_url}"
patient_identifier_system = "{PATIENT_SYSTEM}"
first_retry_s = 0.3
max_retry_s = 3.0
timeout_s = 20
"""
        )
        shutil.copy(ROOT / "config" / "routes.toml", self.config / "routes.toml")
        (self.config / "logging.toml").write_text('level = "info"\nformat = "console"\n')
        self._database = prepare_state(self.settings)
        register(self.settings, load_bundle(model_folder()), candidate=False, actor="test")

    # -- processes ---------------------------------------------------------------------------------------------

    def start_receiver(self) -> None:
        for group in ("receiver", "indexer"):
            self._start(group, ["-m", "gateway.role", group, "--config", str(self.config)])
        wait_until(lambda: _listens(self.port), "the receiver listens")

    def start(self, group: str, *, name: str = "", executor: str = "", lives: bool = False) -> None:
        """Start `worker` or `services` (delivery only); returns at once."""
        command = ["-m", "tests.support.dying_role", group, "--config", str(self.config)]
        self._start(name or group, [*command, *(["--lives"] if lives else [])], SEGGATE_EXECUTOR=executor)

    def start_supervised(self, roles: str) -> None:
        command = ["-m", "tests.support.dying_role", "supervise", "--config", str(self.config), "--roles", roles]
        self._start("supervisor", command)

    def _start(self, name: str, arguments: Sequence[str], **environment: str) -> None:
        environment = {
            **os.environ,
            "TCP_NODELAY": "1",
            "DYING_ROLE_CONTROL": str(self.control),
            **{k: v for k, v in environment.items() if v},
        }
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments], stdout=log, stderr=log, cwd=ROOT, env=environment
            )

    def end(self, *names: str) -> None:
        """End processes, each by its id, and wait for them."""
        ending = [self.processes.pop(name) for name in names]
        for process in ending:
            if process.poll() is None:
                process.terminate()
        for process in ending:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def end_all(self) -> None:
        self.end(*self.processes)
        self._database.close()

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    # -- the point where it dies -------------------------------------------------------------------------------

    def kill_at(self, point: str) -> None:
        (self.control / f"kill-{point}").touch()

    def wait_for_death_at(self, *points: str) -> None:
        for point in points:
            mark = self.control / f"died-{point}"
            wait_until(mark.exists, f"a process died at {point}")

    def block_at(self, point: str) -> None:
        (self.control / f"block-{point}").touch()

    def blocked_pid(self, point: str) -> int | None:
        """The process that is, or was last, blocked there."""
        try:
            return int((self.control / f"reached-{point}").read_text() or 0) or None
        except FileNotFoundError:
            return None

    def unblock(self, point: str) -> None:
        (self.control / f"block-{point}").unlink()

    # -- a study -----------------------------------------------------------------------------------------------

    def write_study(self, instance: str, *, patient_id: str = PATIENT_ID) -> SentStudy:
        """The series HippoCrop of the synthetic study, as another study for each `instance`."""
        folder = self.folder / "studies" / instance
        files = []
        for path in write_synthetic_study(folder, instance=instance):
            if not path.name.startswith("series4-"):
                path.unlink()
                continue
            files.append(path)
            if patient_id != PATIENT_ID:
                dataset = dcmread(path)
                dataset.PatientID = patient_id
                dataset.save_as(path, enforce_file_format=True)
        return SentStudy(uid=str(dcmread(files[0], stop_before_pixels=True).StudyInstanceUID), files=tuple(files))

    def send(self, files: Sequence[Path]) -> None:
        """C-STORE of these files in one association; fails unless all of them are stored."""
        peer = PeerAddress(ae_title="SEGGATE", host="127.0.0.1", port=self.port)
        report = send_files(files, peer, calling_ae=SENDER)
        assert report.is_complete, report.failed

    def wait_for_state(self, study_uid: str, *states: str, timeout_s: float = PATIENCE_S) -> str:
        """Wait until the study is in one of `states`; any other end fails at once."""

        def reached() -> str | None:
            with self._database.reading() as session:
                study = session.get(Study, study_uid)
                state = study.state if study else None
            if state in states:
                return state
            self.check_alive()
            if state in _ENDED - set(states):
                raise AssertionError(f"study ended as {state}: {study.state_reason if study else ''}")
            return None

        try:
            return str(wait_until(reached, f"study {study_uid} is {' or '.join(states)}", timeout_s=timeout_s))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story(study_uid)}") from error

    def check_alive(self) -> None:
        for name, process in self.processes.items():
            if process.poll() not in (None, -9):
                words = self.log(name).read_text(errors="replace")[-3000:]
                raise AssertionError(f"{name} ended with {process.returncode}:\n{words}")

    # -- what is there -----------------------------------------------------------------------------------------

    def in_pacs(self, study_uid: str) -> dict[str, list[str]]:
        """SOP Instance UIDs in the PACS by modality, by C-FIND at SERIES and IMAGE level."""
        ae_title, port = self.pacs_address
        entity = AE(ae_title=SENDER)
        entity.add_requested_context(StudyRootFind)
        association = entity.associate("127.0.0.1", port, ae_title=ae_title)
        assert association.is_established, "the PACS does not answer"
        try:
            found: dict[str, list[str]] = {}
            keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": "", "Modality": ""}
            for series in _find(association, "SERIES", keys):
                keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": str(series.SeriesInstanceUID)}
                for image in _find(association, "IMAGE", {**keys, "SOPInstanceUID": ""}):
                    found.setdefault(str(series.Modality), []).append(str(image.SOPInstanceUID))
            return found
        finally:
            association.release()

    def reports(self, study_uid: str) -> list[dict[str, Any]]:
        """DiagnosticReports in the EMR for the results of a study, by FHIR search."""
        found = []
        with httpx.Client(timeout=20) as http:
            for result in self.results(study_uid):
                token = f"{IDENTIFIER_SYSTEM}|{result.result_id}"
                answer = http.get(f"{self.emr_url}/DiagnosticReport", params={"identifier": token})
                answer.raise_for_status()
                found += [entry["resource"] for entry in answer.json().get("entry", [])]
        return found

    def add_patient(self, patient_id: str) -> None:
        patient = {"resourceType": "Patient", "active": True}
        patient["identifier"] = [{"system": PATIENT_SYSTEM, "value": patient_id}]
        httpx.post(f"{self.emr_url}/Patient", json=patient, timeout=20).raise_for_status()

    def study(self, study_uid: str) -> Study:
        with self._database.reading() as session:
            return session.get_one(Study, study_uid)

    def versions(self, study_uid: str) -> Sequence[StudyVersion]:
        with self._database.reading() as session:
            return session.scalars(
                select(StudyVersion).where(StudyVersion.study_instance_uid == study_uid).order_by(StudyVersion.number)
            ).all()

    def results(self, study_uid: str) -> Sequence[Result]:
        """Results of a study, oldest first."""
        with self._database.reading() as session:
            return session.scalars(
                select(Result).where(Result.study_instance_uid == study_uid).order_by(Result.created_at)
            ).all()

    def objects(self, result_id: str) -> dict[str, ResultObject]:
        """A result's objects by role."""
        with self._database.reading() as session:
            rows = session.scalars(select(ResultObject).where(ResultObject.result_id == result_id)).all()
        return {row.role: row for row in rows}

    def spool_file(self, spool_path: str) -> Path:
        return open_spool(self.settings).resolve(spool_path)

    def deliveries(self, study_uid: str, destination: str) -> Sequence[Delivery]:
        with self._database.reading() as session:
            return session.scalars(
                select(Delivery)
                .join(Result, Result.result_id == Delivery.result_id)
                .where(Result.study_instance_uid == study_uid, Delivery.destination == destination)
                .order_by(Delivery.queued_at)
            ).all()

    def events(self, study_uid: str) -> list[LedgerEvent]:
        with self._database.reading() as session:
            return list(ledger.events(session, ledger.study_subject(study_uid)))

    def kinds(self, study_uid: str) -> Counter[str]:
        return Counter(event.kind for event in self.events(study_uid))

    def alarms(self, kind: str) -> Sequence[Alarm]:
        """Open alarms of a kind."""
        with self._database.reading() as session:
            return session.scalars(select(Alarm).where(Alarm.kind == kind, Alarm.cleared_at.is_(None))).all()

    def executor(self, name_ends_with: str) -> Executor | None:
        with self._database.reading() as session:
            return session.scalars(
                select(Executor).where(Executor.executor_id.endswith(name_ends_with, autoescape=True))
            ).first()

    def wait_for_executor(self, name_ends_with: str) -> None:
        """Wait until an executor of this name has beaten after its start, and did not say goodbye."""

        def beating() -> bool:
            self.check_alive()
            row = self.executor(name_ends_with)
            return row is not None and row.stopped_at is None and row.beat_at > row.started_at

        wait_until(beating, f"executor {name_ends_with} is there")

    def verify_ledger(self) -> int:
        with self._database.reading() as session:
            return ledger.verify(session)

    def command(self, *arguments: str) -> str:
        """Run `seggate` with these arguments; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "gateway.cli", *arguments, "--config", str(self.config)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def gateway_events(self) -> list[LedgerEvent]:
        with self._database.reading() as session:
            return list(ledger.events(session, "gateway"))

    def story(self, study_uid: str) -> str:
        """Everything that helps to see why a test failed."""
        lines = [f"{e.at:%H:%M:%S.%f} {e.kind} {e.detail}" for e in self.events(study_uid)]
        for log in sorted((self.folder / "logs").glob("*.log")):
            lines += [f"-- {log.name}", log.read_text(errors="replace")[-4000:]]
        return "\n".join(lines)


@contextmanager
def whole_gateway(
    folder: Path,
    *,
    pacs_address: tuple[str, int],
    emr_url: str,
    worker: str = "",
    more: str = "",
    destinations: str = "",
) -> Iterator[WholeGateway]:
    """Configuration, database and model; nothing runs yet. `worker` are lines of [worker], `more` further tables."""
    gateway = WholeGateway(folder=folder, port=free_port(), pacs_address=pacs_address, emr_url=emr_url)
    gateway.prepare(worker=worker, more=more, destinations=destinations)
    with ExitStack() as stack:
        stack.callback(gateway.end_all)
        yield gateway


@contextmanager
def running_emr(folder: Path, port: int, *, patients: Sequence[str] = (PATIENT_ID,)) -> Iterator[str]:
    """The demonstration's FHIR server as a process of its own, its resources in `folder`; yields its base URL."""
    command = [sys.executable, "-m", "gateway.demo.emr_server", "--port", str(port), "--folder", str(folder / "emr")]
    for patient_id in patients:
        command += ["--patient", PATIENT_SYSTEM, patient_id]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "emr.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    try:
        wait_until(lambda: process.poll() is not None or _listens(port), "the EMR listens")
        assert process.poll() is None, (folder / "emr.log").read_text()
        yield f"http://127.0.0.1:{port}/fhir"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _find(association: Any, level: str, keys: dict[str, str]) -> list[Dataset]:
    query = Dataset()
    query.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(query, keyword, value)
    answers = association.send_c_find(query, StudyRootFind)
    return [data for status, data in answers if status.get("Status") in (0xFF00, 0xFF01) and data is not None]


@contextmanager
def gateway_to_an_archive(folder: Path) -> Iterator[WholeGateway]:
    """A gateway at work, with our archive as its PACS and without an EMR."""
    with scripted(ScriptedPacs(folder / "pacs")) as archive:
        destinations = (
            f'[[dimse]]\nname = "pacs"\nae_title = "{archive.ae_title}"\nhost = "127.0.0.1"\nport = {archive.port}\n'
        )
        with whole_gateway(
            folder / "gateway",
            pacs_address=(archive.ae_title, archive.port),
            emr_url="",
            destinations=destinations,
        ) as gateway:
            gateway.start_receiver()
            gateway.start("worker")
            gateway.start("services")
            yield gateway
