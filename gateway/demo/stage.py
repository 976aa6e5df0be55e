"""The demo's stage: a PACS and an EMR on free loopback ports, and a gateway configured for them.

With Orthanc on this machine the PACS is Orthanc, else our small archive, unless one of the two is asked for. Every
process started here is ended here.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Pacs = Literal["orthanc", "embedded"]
PACS_AE, GATEWAY_AE, SCANNER_AE = "PACS", "SEGGATE", "DEMO-SCANNER"
PATIENT_SYSTEM = "urn:oid:2.25.304201137"
_MARKER = ".seggate-demo"

_LONGEST_END_S = 60.0


class StageFailed(Exception):
    """A part of the demo did not start; the message names its log."""


@dataclass
class Stage:
    """Folders, ports and processes of one demo. `pacs` None takes Orthanc where it is installed."""

    folder: Path
    pacs: Pacs | None = None
    ports: dict[str, int] = field(default_factory=dict)
    _processes: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "config"

    @property
    def emr_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['emr']}/fhir"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def prepare(self) -> None:
        """Empty the folder (only if a demo made it) and choose free ports."""
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / _MARKER).exists():
            raise StageFailed(f"{self.folder} is not empty and was not made by a demo; give another with --state")
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("logs", "config", "pacs", "emr"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / _MARKER).touch()
        self.ports = dict(zip(("gateway", "web", "pacs", "pacs_http", "emr"), free_ports(5), strict=True))

    def start_pacs(self) -> None:
        """Raises StageFailed when Orthanc was asked for and is not installed."""
        program = None if self.pacs == "embedded" else orthanc_program()
        if program is None and self.pacs == "orthanc":
            raise StageFailed("Orthanc is neither on the PATH nor in /usr/sbin; install it, or give --pacs embedded")
        self.pacs = "embedded" if program is None else "orthanc"
        if program is not None:
            settings = self.folder / "pacs" / "orthanc.json"
            settings.write_text(json.dumps(self._orthanc_settings(), indent=2))
            self._start("pacs", [program, str(settings)])
        else:
            command = [sys.executable, "-m", "gateway.demo.archive", "--port", str(self.ports["pacs"])]
            command += ["--folder", str(self.folder / "pacs"), "--ae-title", PACS_AE]
            self._start("pacs", command)
        self._wait_for_port("pacs", self.ports["pacs"])

    def start_emr(self, patient_ids: Sequence[str]) -> None:
        """The EMR knows the patients of the study that will be sent, as a real one would."""
        command = [sys.executable, "-m", "gateway.demo.emr_server", "--port", str(self.ports["emr"])]
        command += ["--folder", str(self.folder / "emr")]
        for patient_id in patient_ids:
            command += ["--patient", PATIENT_SYSTEM, patient_id]
        self._start("emr", command)
        self._wait_for_port("emr", self.ports["emr"])

    def write_config(self, routes: Path) -> None:
        """The gateway's configuration: its defaults, short waits, and the demo's peers."""
        (self.config / "gateway.toml").write_text(
            f"""state_dir = "state"
institution = "Demo"

[receiver]
ae_title = "{GATEWAY_AE}"
host = "127.0.0.1"
port = {self.ports["gateway"]}
reserve_mb = 64

[[senders]]
ae_title = "{SCANNER_AE}"
addresses = ["127.0.0.1"]
description = "the demo's sender"

[completeness]
quiet_s = 1.0
quiet_open_s = 10.0

[worker]
poll_s = 0.05

[web]
port = {self.ports["web"]}
"""
        )
        (self.config / "destinations.toml").write_text(
            f"""[[dimse]]
name = "pacs"
ae_title = "{PACS_AE}"
host = "127.0.0.1"
port = {self.ports["pacs"]}
first_retry_s = 0.5

[[fhir]]
name = "emr"
url = "{self.emr_url}"
patient_identifier_system = "{PATIENT_SYSTEM}"
first_retry_s = 0.5
"""
        )
        (self.config / "logging.toml").write_text('level = "info"\nformat = "console"\n')
        shutil.copy(routes, self.config / "routes.toml")

    def start_gateway(self) -> None:
        self._start("gateway", [sys.executable, "-m", "gateway.cli", "serve", "--config", str(self.config)])
        self._wait_for_port("gateway", self.ports["gateway"], timeout_s=90)

    def check_alive(self) -> None:
        """Raises StageFailed when a process has ended."""
        for name, process in self._processes:
            if process.poll() is not None:
                raise StageFailed(f"the {name} ended with code {process.returncode}; its log: {self.log(name)}")

    def stop(self) -> None:
        """End what was started, last first, each by its own process id."""
        for _, process in reversed(self._processes):
            if process.poll() is None:
                process.terminate()
        for _, process in reversed(self._processes):
            try:
                # Longer than the gateway gives its own processes: killed before, it would leave them to themselves.
                process.wait(timeout=_LONGEST_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def _start(self, name: str, command: Sequence[str]) -> None:
        # A setting in the environment would win over the demo's files and point at somebody's real state.
        environment: Mapping[str, str] = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SEGGATE_")},
            "TCP_NODELAY": "1",
        }
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self._processes.append((name, process))

    def _wait_for_port(self, name: str, port: int, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise StageFailed(f"the {name} did not answer on port {port} within {timeout_s:g} s; its log: {self.log(name)}")

    def _orthanc_settings(self) -> dict[str, object]:
        storage = str(self.folder / "pacs" / "storage")
        return {
            "Name": "demo PACS",
            "StorageDirectory": storage,
            "IndexDirectory": storage,
            "DicomAet": PACS_AE,
            "DicomPort": self.ports["pacs"],
            "HttpPort": self.ports["pacs_http"],
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True,
            "DicomCheckCalledAet": False,
            "Plugins": [],
        }


def orthanc_program() -> str | None:
    """Where Orthanc is installed; Debian puts it beside the daemons, off the PATH of most users."""
    return shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")


def free_ports(count: int) -> list[int]:
    """Ports that are free on the loopback interface now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()
