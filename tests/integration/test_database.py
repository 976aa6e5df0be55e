"""The database on SQLite: transactions, migrations (on PostgreSQL: tests/acceptance/test_postgresql.py)."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, inspect, select, text

from storage import alarms
from storage.database import Database, migration_config
from storage.errors import DatabaseAway
from storage.records import Alarm, Record
from tests.support.waiting import wait_until


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path / 'state' / 'seggate.sqlite'}")
    database.migrate()
    return database


def test_sqlite_runs_in_wal_with_full_synchronous(database: Database) -> None:
    with database.session() as session:
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert session.execute(text("PRAGMA synchronous")).scalar() == 2
        assert session.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    def fail() -> None:
        with database.session() as session:
            alarms.raise_alarm(session, kind="k", subject="s", message="m")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Alarm)) == 0


def test_repeated_alarms_are_counted_until_cleared(database: Database) -> None:
    with database.session() as session:
        alarms.raise_alarm(session, kind="k", subject="s", message="first")
        alarms.raise_alarm(session, kind="k", subject="s", message="second")
        assert [(a.message, a.count) for a in alarms.open_alarms(session)] == [("second", 2)]
        assert alarms.clear_alarms(session, kind="k", subject="s", by="operator") == 1
        assert list(alarms.open_alarms(session)) == []


def test_two_writers_queue_up_instead_of_failing(database: Database) -> None:
    errors: list[BaseException] = []

    def write(n: int) -> None:
        try:
            for _ in range(20):
                with database.session() as session:
                    alarms.raise_alarm(session, kind="k", subject="same", message=str(n))
        except BaseException as error:  # noqa: BLE001 - reported to the test's thread
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with database.reading() as session:
        assert session.scalar(select(Alarm.count)) == 80


def test_a_database_that_cannot_be_opened_is_away(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    database = Database(f"sqlite:///{tmp_path / 'folder'}")
    with pytest.raises(DatabaseAway, match="did not answer"), database.session() as session:
        session.execute(text("SELECT 1"))


def test_migrations_make_exactly_the_tables_of_the_models(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": "seggate_revision", "compare_type": True}
        )
        assert compare_metadata(context, Record.metadata) == []
    assert database.revision()[0] == database.revision()[1]


def test_every_revision_can_be_taken_back(database: Database) -> None:
    with database.engine.connect() as connection:
        config = migration_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        connection.commit()
    assert set(inspect(database.engine).get_table_names()) <= {"seggate_revision"}
    database.migrate()
    assert "studies" in inspect(database.engine).get_table_names()


@pytest.mark.peer("postgresql")
def test_a_command_leaves_no_connection_behind(postgresql_server: str) -> None:
    """It is not told when its caller is done, and an open one would keep PostgreSQL from ending."""
    database = Database(postgresql_server, pool_size=0)
    with database.reading() as session:
        own = session.execute(text("SELECT pg_backend_pid()")).scalar_one()

    def is_closed() -> bool:
        # A transaction sees one state of this view, so each look is one of its own.
        with database.reading() as session:
            query = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :own")
            return bool(session.execute(query, {"own": own}).scalar_one() == 0)

    wait_until(is_closed, "the connection is closed")
