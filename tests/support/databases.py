"""Databases for tests on both kinds: SQLite in the test's folder, PostgreSQL on a server that the run shares."""

from __future__ import annotations

import uuid
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

KINDS = ("sqlite", pytest.param("postgresql", marks=pytest.mark.peer("postgresql")))


def new_database_url(request: pytest.FixtureRequest, folder: Path) -> str:
    """The URL of a new, empty database of the kind in `request.param`; it goes with the folder or the server."""
    if request.param == "sqlite":
        return f"sqlite:///{folder / 'test.sqlite'}"
    server: str = request.getfixturevalue("postgresql_server")
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return f"{server.rpartition('/')[0]}/{name}"
