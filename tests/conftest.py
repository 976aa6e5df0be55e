"""Fixtures for all tests: environment cleaned, peers resolved, no variable of the developer's leaks in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.database import Database
from tests.support import peers
from tests.support.databases import KINDS, new_database_url
from tests.support.postgresql import postgresql

_KEPT = {"SEGGATE_NNUNET_PYTHON", "SEGGATE_REQUIRE_PEERS", "SEGGATE_SHARED"}


@pytest.fixture(scope="session")
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Converted models and execution plans of all tests: each is made once, and none in the developer's own cache."""
    return str(tmp_path_factory.mktemp("cache-home"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, _cache_home: str) -> None:
    """Settings of ours in the environment must not change what a test sees; peers get TCP_NODELAY."""
    monkeypatch.setenv("XDG_CACHE_HOME", _cache_home)
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


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a PostgreSQL server that all tests of this run share; each makes a database of its own on it."""
    with postgresql() as url:
        yield url


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A new database with all tables: the test runs on SQLite and on PostgreSQL."""
    found = Database(new_database_url(request, tmp_path))
    found.create_all()
    yield found
    found.close()
