"""The entry of a role process: one of a kind per host and state, and it stops when told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gateway.demo.stage import free_ports
from tests.support.waiting import wait_until


def _start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gateway.role", "receiver", "--config", str(config)]
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
        assert second.returncode == 1
        assert "a receiver already runs here" in said
        assert first.poll() is None
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert first.returncode == 0


def test_a_broken_configuration_is_named_and_ends_with_2(config: Path) -> None:
    (config / "gateway.toml").write_text("[receiver]\nprot = 1\n")
    process = _start(config)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "gateway.toml: receiver.prot" in said
