"""Nothing but the configured peers is ever connected to: every process of a gateway tells of each address it uses."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from gateway.demo.stage import Stage
from gateway.demo.story import follow, send, set_the_stage
from tests.support.peers import ROOT

# Python runs this at the start of every process that has the folder on its path, before anything of ours.
_WITNESS = """
import sys

def _write(event, host):
    with open({log!r}, "a") as log:
        log.write(f"{{event}}\\t{{host}}\\t{{' '.join(sys.orig_argv[1:4])}}\\n")

def _tell(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        _write(event, address[0] if isinstance(address, tuple) else address)

_write("start", "")
sys.addaudithook(_tell)
"""


@pytest.mark.requirement("OPS-65")
def test_no_process_of_the_gateway_asks_for_or_connects_to_anything_but_its_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "addresses"
    (tmp_path / "witness").mkdir()
    (tmp_path / "witness" / "sitecustomize.py").write_text(_WITNESS.format(log=str(log)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "witness"))
    stage = Stage(tmp_path / "stage", "embedded")
    try:
        source, studies = set_the_stage(stage, None, ROOT / "config" / "routes.toml", lambda _line: None)
        send(stage, source, lambda _done, _total: None)
        outcome = follow(stage, studies[0], timeout_s=240, tell=lambda _line: None)
    finally:
        stage.stop()
    assert outcome.verified, outcome.document
    seen = [line.split("\t") for line in log.read_text().splitlines()]
    watched = {command for event, _, command in seen if event == "start"}
    assert {f"-m gateway.role {role}" for role in ("receiver", "indexer", "worker", "services")} <= watched
    elsewhere = [line for line in seen if not _is_here(line[1])]
    assert elsewhere == []


def _is_here(host: str) -> bool:
    """Loopback, or a Unix socket's path."""
    if host in ("localhost", "None", "") or host.startswith(("/", "\0")):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
