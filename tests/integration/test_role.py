"""The entry of a role process: one of a kind per host and state, and it stops when told."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.demo.stage import free_ports
from gateway.intake.routes_file import ALARM_BROKEN
from gateway.role import CANNOT_START
from gateway.settings import load_settings
from gateway.state import prepare_state
from storage.alarms import open_alarms
from storage.records import LedgerEvent
from tests.support.waiting import wait_until


def _start(config: Path, group: str = "receiver", roles: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gateway.role", group, "--config", str(config), "--roles", roles]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    port = free_ports(1)[0]
    (folder / "gateway.toml").write_text(f'[receiver]\nhost = "127.0.0.1"\nport = {port}\nreserve_mb = 1\n')
    return folder


def test_a_second_process_of_a_group_is_refused_and_the_first_goes_on(config: Path, tmp_path: Path) -> None:
    first = _start(config)
    try:
        wait_until(lambda: any((tmp_path / "state" / "spool" / "incoming").glob("*")), what="the receiver's start")
        second = _start(config)
        _, said = second.communicate(timeout=60)
        assert second.returncode == CANNOT_START
        assert "the receiver already runs here" in said
        assert first.poll() is None
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert first.returncode == 0


def test_a_port_in_use_is_named_in_one_line(config: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (config / "gateway.toml").write_text(f'[receiver]\nhost = "127.0.0.1"\nport = {port}\nreserve_mb = 1\n')
        process = _start(config)
        _, said = process.communicate(timeout=60)
    assert process.returncode == CANNOT_START
    (line,) = said.splitlines()
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line


def test_delivery_scheduler_and_web_may_run_apart_and_each_only_once(config: Path, tmp_path: Path) -> None:
    (config / "gateway.toml").write_text("[web]\nport = 0\n")
    prepare_state(load_settings(config)).close()
    locks = tmp_path / "state" / "locks"
    apart = [_start(config, "services", roles) for roles in ("scheduler", "web")]
    try:
        wait_until(lambda: len(list(locks.glob("*.lock"))) == 2, what="both have started")
        again = _start(config, "services", "delivery,web")
        _, said = again.communicate(timeout=60)
        assert again.returncode == CANNOT_START
        assert "the web already runs here" in said
        assert [p.poll() for p in apart] == [None, None]
    finally:
        for process in apart:
            process.terminate()
        for process in apart:
            process.communicate(timeout=60)
    assert [p.returncode for p in apart] == [0, 0]


@pytest.mark.requirement("RTE-25", open="rollback with one command")
def test_a_worker_tells_of_a_broken_routes_file_and_of_its_repair_before_a_study_needs_it(config: Path) -> None:
    routes = config / "routes.toml"
    routes.write_text("rules = []\n")
    database = prepare_state(load_settings(config))

    def alarms() -> list[str]:
        with database.reading() as session:
            return [a.kind for a in open_alarms(session)]

    def loaded() -> int:
        with database.reading() as session:
            return session.query(LedgerEvent).filter_by(kind="routes-loaded").count()

    worker = _start(config, "worker")
    try:
        wait_until(lambda: loaded() == 1, what="the rules are read at the start")
        routes.write_text("broken")
        wait_until(lambda: alarms() == [ALARM_BROKEN], what="the fault is alarmed")
        routes.write_text("rules = []\ntime_zone = 'UTC'\n")
        wait_until(lambda: alarms() == [] and loaded() == 2, what="the repair is seen")
    finally:
        worker.terminate()
        worker.communicate(timeout=60)
        database.close()


def test_a_state_that_cannot_be_written_is_named_in_one_line(config: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, where a folder is needed")
    process = _start(config)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = said.splitlines()
    assert f"state_dir: {tmp_path / 'state' / 'locks'} cannot be written: Not a directory" in line


def test_a_broken_configuration_is_named_and_ends_with_2(config: Path) -> None:
    (config / "gateway.toml").write_text("[receiver]\nprot = 1\n")
    process = _start(config)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "gateway.toml: receiver.prot" in said
