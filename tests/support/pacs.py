"""PACSes for tests, on free loopback ports: Orthanc, DCMTK's storescp, our archive, and one that misbehaves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pynetdicom import evt

from gateway.demo.archive import Archive
from tests.support.peers import program

Step = int | str | tuple[str, int]

_START_TIMEOUT_S = 30.0
_DICOMWEB_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def free_port() -> int:
    """A TCP port on loopback that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class RunningPacs:
    """A PACS that runs: where it listens. `http_url` is empty where there is none."""

    ae_title: str
    host: str
    port: int
    folder: Path
    http_url: str = ""
    dicomweb_url: str = ""


@contextmanager
def orthanc(
    folder: Path, *, dicom_port: int = 0, http_port: int = 0, users: dict[str, str] | None = None, **options: object
) -> Iterator[RunningPacs]:
    """A real Orthanc with the DICOMweb plugin; `options` go into its configuration file (for example
    UnknownSopClassAccepted=True). Start it again on the same folder and ports to simulate a restart."""
    dicom_port, http_port = dicom_port or free_port(), http_port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    configuration = {
        "Name": "PACS",
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "DicomAet": "ORTHANC",
        "DicomPort": dicom_port,
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowFind": True,
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": users is not None,
        "RegisteredUsers": users or {},
        "Plugins": [str(_DICOMWEB_PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        **options,
    }
    path = folder / "orthanc.json"
    path.write_text(json.dumps(configuration), encoding="utf-8")
    with _process([program("Orthanc"), str(path)], folder / "orthanc.log", dicom_port, http_port):
        yield RunningPacs(
            ae_title="ORTHANC",
            host="127.0.0.1",
            port=dicom_port,
            folder=folder,
            http_url=f"http://127.0.0.1:{http_port}/",
            dicomweb_url=f"http://127.0.0.1:{http_port}/dicom-web",
        )


@contextmanager
def storescp(folder: Path, *, port: int = 0) -> Iterator[RunningPacs]:
    """DCMTK's storescp: stores everything, answers no query."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [program("storescp"), "-aet", "STORESCP", "+xa", "-pm", "-od", str(folder), str(port)]
    with _process(arguments, folder.parent / f"storescp-{port}.log", port):
        yield RunningPacs(ae_title="STORESCP", host="127.0.0.1", port=port, folder=folder)


@contextmanager
def _process(arguments: list[str], log: Path, *ports: int) -> Iterator[None]:
    environment = {**os.environ, "TCP_NODELAY": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment)
        try:
            for port in ports:
                _wait_for_port(process, port, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=15)


def _wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended at once:\n{log.read_text(errors='replace')[-2000:]}")
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} does not listen on {port}:\n{log.read_text(errors='replace')[-2000:]}")


class ScriptedPacs(Archive):
    """Our archive with a script: each C-STORE takes the next entry of `script`, and behaves well after the last.

    An entry is a status to answer without storing, ("then", status) to store and answer with that status, "abort" to
    break off instead of answering, "abort-after-storing", or "stall" to answer only after `release` was set.
    """

    def __init__(
        self, folder: Path, script: Sequence[Step] = (), *, refused_classes: Sequence[str] = (), port: int = 0
    ) -> None:
        super().__init__(folder, ae_title="SCRIPTED", port=port)
        self.script = list(script)
        self.received: list[str] = []
        self.release = threading.Event()
        self._refused_classes = refused_classes

    def storage_classes(self) -> Sequence[str]:
        return [uid for uid in super().storage_classes() if uid not in self._refused_classes]

    def store(self, event: evt.Event) -> int:
        self.received.append(str(event.request.AffectedSOPInstanceUID))
        step: Step = self.script.pop(0) if self.script else ("then", 0x0000)
        if step in ("abort-after-storing", "stall") or isinstance(step, tuple):
            super().store(event)
        if step == "stall":
            self.release.wait(_START_TIMEOUT_S)
            return 0x0000
        if isinstance(step, str):
            event.assoc.abort()
            return 0x0000
        return step[1] if isinstance(step, tuple) else step


@contextmanager
def scripted(pacs: ScriptedPacs) -> Iterator[RunningPacs]:
    """A scripted PACS that listens until the end of the block."""
    pacs.start()
    try:
        yield RunningPacs(ae_title=pacs.ae_title, host="127.0.0.1", port=pacs.port, folder=pacs.folder)
    finally:
        pacs.release.set()
        pacs.stop()
