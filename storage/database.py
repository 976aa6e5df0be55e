"""The database: SQLite (WAL, synchronous=FULL) by default, PostgreSQL by URL.

One `session()` is one transaction. On SQLite a writing transaction begins IMMEDIATE, so that two processes queue up
at its start instead of failing at its end (a deferred transaction that turns into a writer cannot wait).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from storage import canary_records, deletion_records, learning_records  # noqa: F401 - their tables are among Record.metadata
from storage.errors import DatabaseAway
from storage.records import Record

_BUSY_TIMEOUT_MS = 30_000


class Database:
    """Connections to one database; safe to share between threads, not between processes (make one in each)."""

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        """`pool_size`: PostgreSQL's connections that stay open; 0 closes each with its transaction, for a command that
        nobody closes."""
        self.url = make_url(_with_driver(url))
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine: Engine = _engine(self.url.render_as_string(hide_password=False), pool_size=pool_size)
        if self.is_sqlite:
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One writing transaction: committed at the end, rolled back on any error.

        Raises DatabaseAway when the database does not answer or stays locked.
        """
        with self._transaction(self._sessions()) as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One reading transaction: sees one state of the database and blocks nobody."""
        session = self._sessions(bind=self.engine.execution_options(seggate_read_only=True))
        with self._transaction(session) as reading:
            yield reading

    @contextmanager
    def _transaction(self, session: Session) -> Iterator[Session]:
        try:
            with session, session.begin():
                yield session
        except OperationalError as error:
            raise DatabaseAway(f"the database did not answer: {_short(error)}") from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise DatabaseAway(f"the connection to the database broke: {_short(error)}") from error
            raise

    def migrate(self) -> None:
        """Bring the schema to the newest revision (safe to call by several processes at once)."""
        if self.is_sqlite and self.url.database:
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.engine.connect() as connection:
                if not self.is_sqlite:
                    # One migrator at a time; the lock ends with the connection.
                    connection.execute(text("SELECT pg_advisory_lock(7304001)"))
                    connection.commit()
                config = migration_config()
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()
                if not self.is_sqlite:
                    connection.execute(text("SELECT pg_advisory_unlock(7304001)"))
                    connection.commit()
        except OperationalError as error:
            raise DatabaseAway(f"the database did not answer: {_short(error)}") from error

    def revision(self) -> tuple[str | None, str | None]:
        """(revision of this database, newest revision known to this program)."""
        try:
            with self.engine.connect() as connection:
                context = MigrationContext.configure(connection, opts={"version_table": "seggate_revision"})
                current = context.get_current_revision()
        except SQLAlchemyError as error:
            raise DatabaseAway(f"the database did not answer: {_short(error)}") from error
        return current, ScriptDirectory.from_config(migration_config()).get_current_head()

    def create_all(self) -> None:
        """Make all tables directly from the models (tests that are not about migrations)."""
        if self.is_sqlite and self.url.database:
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        Record.metadata.create_all(self.engine)

    def close(self) -> None:
        self.engine.dispose()


def migration_config() -> Config:
    """Alembic's configuration, without an ini file."""
    import migrations

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config


def _with_driver(url: str) -> str:
    """`postgresql://` means psycopg 3 here."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1) if url.startswith("postgresql://") else url


def _engine(url: str, *, pool_size: int) -> Engine:
    if url.startswith("sqlite"):
        return create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_MS / 1000}, hide_parameters=True)
    if pool_size == 0:
        return create_engine(url, poolclass=NullPool, hide_parameters=True)
    return create_engine(url, pool_size=pool_size, max_overflow=10, pool_pre_ping=True, hide_parameters=True)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not begin transactions by itself: _begin_sqlite does.
    connection.isolation_level = None
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
    finally:
        cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("seggate_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _short(error: SQLAlchemyError) -> str:
    """The driver's own first line; never the statement with its parameters, which hold patient data."""
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
