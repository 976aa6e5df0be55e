"""Databases for tests: SQLite in the test's folder, PostgreSQL where SEGGATE_TEST_DATABASE_URL names one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.database import Database
from storage.records import Record

KINDS = ("sqlite", "postgresql")


@contextmanager
def empty_database(kind: str, folder: Path) -> Iterator[Database]:
    """An empty database with all tables; skips for PostgreSQL where no server is named."""
    url = f"sqlite:///{folder / 'test.sqlite'}"
    if kind == "postgresql":
        url = os.environ.get("SEGGATE_TEST_DATABASE_URL", "")
        if not url.startswith("postgresql"):
            pytest.skip("SEGGATE_TEST_DATABASE_URL names no PostgreSQL database")
    database = Database(url)
    try:
        if kind == "postgresql":
            Record.metadata.drop_all(database.engine)
        database.create_all()
        yield database
    finally:
        if kind == "postgresql":
            Record.metadata.drop_all(database.engine)
        database.close()
