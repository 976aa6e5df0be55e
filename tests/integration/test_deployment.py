"""The gateway as it is deployed: a user without rights, a tree that cannot be written, state in one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from pynetdicom import AE
from pynetdicom.sop_class import Verification
from sqlalchemy import text

from gateway.probe import CALLING_AE_TITLE
from storage.database import Database
from storage.records import Result, ResultState, Study, StudyState, StudyVersion, utc_now
from tests.support.peers import ROOT

_NOBODY = 65534
_START_S = 90.0
_STOP_S = 45.0


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """How to start a program without rights: the words before the command; `mounts`: the tree is mounted read-only."""

    prefix: tuple[str, ...]
    uid: int
    mounts: bool

    def command(self, *words: str) -> list[str]:
        return [*self.prefix, *words]


def sandbox(writable: Path, config: Path) -> Sandbox:
    """The strictest that this machine allows; skips where root cannot become nobody and still reach Python.

    As root with mount namespaces: everything is mounted read-only but `writable` and a fresh /tmp, as in compose.yaml.
    As root without them: file permissions alone keep nobody from writing. Not root: the current user.
    """
    if os.geteuid() != 0:
        return Sandbox(prefix=(), uid=os.geteuid(), mounts=False)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv (util-linux) is not on the PATH")
    os.chown(writable, _NOBODY, _NOBODY)
    drop = (
        *(setpriv, f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--no-new-privs"),
        *("--bounding-set=-all", "--inh-caps=-all"),
    )
    needed = [Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT, config]
    unshare = shutil.which("unshare")
    if unshare is not None and subprocess.run([unshare, "--mount", "true"], capture_output=True).returncode == 0:
        script = _mounts(needed, writable)
        prefix = (unshare, "--mount", "--propagation", "private", "sh", "-euc", f'{script}\nexec "$@"', "sh", *drop)
        tried = subprocess.run([*prefix, sys.executable, "-c", ""], capture_output=True, text=True, timeout=60)
        if tried.returncode == 0:
            return Sandbox(prefix=prefix, uid=_NOBODY, mounts=True)
    tried = subprocess.run([*drop, sys.executable, "-c", ""], capture_output=True, text=True, timeout=60)
    if tried.returncode != 0:
        pytest.skip(
            f"an unprivileged user cannot run {sys.executable}, and mounts are not allowed: {tried.stderr[:200]}"
        )
    return Sandbox(prefix=drop, uid=_NOBODY, mounts=False)


def _mounts(needed: list[Path], writable: Path) -> str:
    """Shell lines, run as root in a mount namespace of its own.

    Folders that only root may enter (Python may live in one) are replaced by an empty one that holds what is needed.
    """
    lines = ["stage=$(mktemp -d)"]
    closed = {parent for path in (*needed, writable) for parent in path.parents if not parent.stat().st_mode & 0o001}
    kept = {path for path in (*needed, writable) if closed & set(path.parents)} | {writable}
    for number, path in enumerate(sorted(kept)):
        lines += [f'mkdir "$stage/{number}"', f'mount --rbind "{path}" "$stage/{number}"']
    for parent in sorted(closed, key=lambda p: len(p.parts)):
        if not closed & set(parent.parents):
            lines.append(f'mount -t tmpfs -o mode=755 none "{parent}"')
    for number, path in enumerate(sorted(kept)):
        lines += [f'mkdir -p "{path}"', f'mount --rbind "$stage/{number}" "{path}"']
        if path != writable:
            lines.append(f'mount -o remount,bind,ro "{path}"')
    lines.append("mount -o remount,bind,ro /")
    return "\n".join(lines)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class Running:
    process: subprocess.Popen[bytes]
    sandbox: Sandbox
    config: Path
    state: Path
    log: Path
    dicom_port: int
    web_port: int

    def family(self) -> list[psutil.Process]:
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def wait_for(self, what: str, ready: object) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if callable(ready) and ready():
                return
            time.sleep(0.1)
        pytest.fail(f"{what} (exit code {self.process.poll()}):\n{self.log.read_text()[-4000:]}")


def echo(port: int, calling: str = "SCANNER") -> int | None:
    """Status of a C-ECHO, None without an association."""
    with socket.socket() as listening:
        if listening.connect_ex(("127.0.0.1", port)) != 0:
            return None
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 5
    entity.add_requested_context(Verification)
    association = entity.associate("127.0.0.1", port, ae_title="SEGGATE")
    if not association.is_established:
        return None
    try:
        return int(association.send_c_echo().Status)
    finally:
        association.release()


def live(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live", timeout=2) as answer:
            return bool(answer.status == 200 and json.load(answer) == {"status": "live"})
    except OSError:
        return False


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that any user may enter (pytest's own are closed to all but their owner)."""
    with tempfile.TemporaryDirectory(prefix="seggate-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def gateway(folder: Path) -> Iterator[Running]:
    """`seggate serve` with all roles in a sandbox; ended at the end, whatever happened."""
    config, state, log = folder / "config", folder / "state", folder / "serve.log"
    dicom_port, web_port = free_port(), free_port()
    state.mkdir()
    config.mkdir()
    (config / "gateway.toml").write_text(
        f'''
state_dir = "{state}"
[receiver]
host = "127.0.0.1"
port = {dicom_port}
reserve_mb = 0
drain_timeout_s = 5
[[senders]]
ae_title = "SCANNER"
[[senders]]
ae_title = "{CALLING_AE_TITLE}"
addresses = ["127.0.0.1"]
[worker]
threads = 1
[web]
port = {web_port}
'''
    )
    shutil.copy(ROOT / "config" / "routes.toml", config)
    box = sandbox(state, config)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(state),
        "TMPDIR": str(state),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            box.command(sys.executable, "-m", "gateway.cli", "serve", "--config", str(config)),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        running = Running(
            process=process,
            sandbox=box,
            config=config,
            state=state,
            log=log,
            dicom_port=dicom_port,
            web_port=web_port,
        )
        try:
            yield running
        finally:
            if process.poll() is None:
                left = running.family()
                process.kill()
                for member in left[1:]:
                    if member.is_running():
                        member.kill()
                process.wait(timeout=10)


def probe(running: Running, *parts: str) -> subprocess.CompletedProcess[str]:
    """The containers' health check, as the same user on the same host."""
    return subprocess.run(
        running.sandbox.command(sys.executable, "-m", "gateway.probe", *parts, "--config", str(running.config)),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.requirement("OPS-65")
@pytest.mark.requirement("ART-17", open="the images are not built here; autoscaling is not measured on a cluster")
def test_the_gateway_runs_without_rights_on_a_tree_it_cannot_write(folder: Path) -> None:
    with gateway(folder) as running:
        running.wait_for("the receiver did not answer", lambda: echo(running.dicom_port) == 0)
        running.wait_for("the web server did not answer", lambda: live(running.web_port))
        running.wait_for(
            "the health check was not satisfied",
            lambda: probe(running, "receiver", "worker", "delivery", "web").returncode == 0,
        )
        for member in running.family():
            status = Path(f"/proc/{member.pid}/status").read_text()
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert {int(uid) for uid in fields["Uid"].split()} == {running.sandbox.uid}, member.cmdline()
            assert running.sandbox.uid != 0
            if running.sandbox.prefix:
                assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
                assert fields["NoNewPrivs"].strip() == "1"
        assert len(running.family()) >= 5, "a supervisor, and receiver, indexer, worker, services"
        if running.sandbox.prefix:
            write = "import pathlib, sys; pathlib.Path(sys.argv[1], 'written').touch()"
            for place, refused in (
                (ROOT, True),
                (ROOT / "gateway", True),
                (Path("/usr"), True),
                (running.state, False),
            ):
                tried = subprocess.run(
                    running.sandbox.command(sys.executable, "-c", write, str(place)), capture_output=True, text=True
                )
                assert (tried.returncode != 0) == refused, f"{place}: {tried.stderr}"
                if refused:
                    assert ("Read-only file system" if running.sandbox.mounts else "ermission denied") in tried.stderr
        family = running.family()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=_STOP_S) == 0, running.log.read_text()[-4000:]
        assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
        assert "Traceback" not in running.log.read_text()
        assert (running.state / "spool" / "incoming").is_dir()


@pytest.mark.parametrize("unit", ["seggate.service"])
def test_systemd_accepts_the_unit(unit: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not on the PATH")
    original = (ROOT / "docker" / unit).read_text(encoding="utf-8")
    program = Path(sys.executable).with_name("seggate")
    # The program is where the tests run, and so is the documentation.
    changed = original.replace("/opt/seggate/.venv/bin/seggate", str(program)).replace(
        "/opt/seggate/docs", f"{ROOT}/docs"
    )
    assert changed != original
    (tmp_path / unit).write_text(changed, encoding="utf-8")
    verified = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert verified.returncode == 0, verified.stderr
    assert unit not in verified.stderr, "not even a warning"
    exposure = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=20", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert exposure.returncode == 0, exposure.stdout[-2000:]


def test_the_autoscaler_counts_what_waits_for_a_worker(tmp_path: Path) -> None:
    manifest = ROOT / "docker" / "kubernetes" / "autoscaling.yaml"
    documents = list(yaml.safe_load_all(manifest.read_text(encoding="utf-8")))
    (scaled,) = [d for d in documents if d["kind"] == "ScaledObject"]
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["type"] == "postgresql"
    assert scaled["spec"]["minReplicaCount"] >= 1, "assembly and routing run in the worker"
    database = Database(f"sqlite:///{tmp_path / 'state.sqlite'}")
    database.create_all()
    try:
        with database.session() as session:
            now = utc_now()
            session.add(
                Study(
                    study_instance_uid="2.25.1",
                    study_key="0" * 32,
                    state=StudyState.WHOLE,
                    first_received_at=now,
                    last_received_at=now,
                    calling_ae="SCANNER",
                )
            )
            session.flush()
            session.add(
                StudyVersion(
                    version_id="v1",
                    study_instance_uid="2.25.1",
                    number=1,
                    content_digest="0" * 64,
                    declared_at=now,
                    rule="released",
                    evidence={},
                    object_ids=[],
                    workflow_id="v1",
                )
            )
            session.flush()
            states = [
                ResultState.PENDING,
                ResultState.PENDING,
                ResultState.RELEASED,
                ResultState.HELD,
                ResultState.FAILED,
            ]
            session.add_all(_result(number, state) for number, state in enumerate(states))
        with database.reading() as session:
            assert session.scalar(text(trigger["metadata"]["query"])) == 2
    finally:
        database.close()


def _result(number: int, state: ResultState) -> Result:
    return Result(
        result_id=f"r{number}",
        version_id="v1",
        study_instance_uid="2.25.1",
        series_instance_uid="2.25.2",
        rule="rule",
        model_name="model",
        model_version="1.0.0",
        weights_digest="0" * 64,
        configuration_digest="0" * 64,
        state=state,
        workflow_id=f"w{number}",
        created_at=utc_now(),
    )
