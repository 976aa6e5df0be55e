"""Fixtures for all tests: environment cleaned, peers resolved, no variable of the developer's leaks in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import peers

_KEPT = {"SEGGATE_REQUIRE_PEERS", "SEGGATE_SHARED", "SEGGATE_TEST_DATABASE_URL"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of ours in the environment must not change what a test sees; peers get TCP_NODELAY."""
    for name in list(os.environ):
        if name.startswith("SEGGATE_") and name not in _KEPT:
            monkeypatch.delenv(name)
    monkeypatch.setenv("TCP_NODELAY", "1")


@pytest.fixture(autouse=True)
def _required_peers(request: pytest.FixtureRequest) -> None:
    """Honour `@pytest.mark.peer("orthanc", ...)`."""
    for marker in request.node.iter_markers("peer"):
        names = [n for n in marker.args if n != "shared-data"]
        peers.require_peer(*names)
        if "shared-data" in marker.args:
            peers.shared_data()


@pytest.fixture
def shared_data() -> Path:
    return peers.shared_data()


@pytest.fixture
def shared_root() -> Path:
    return peers.shared_root()
