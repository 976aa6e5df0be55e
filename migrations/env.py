"""Alembic's entry: runs the revisions on the connection that storage.database hands over."""

from __future__ import annotations

from alembic import context

from storage.records import Record


def run() -> None:
    connection = context.config.attributes["connection"]
    context.configure(
        connection=connection,
        target_metadata=Record.metadata,
        compare_type=True,
        render_as_batch=connection.dialect.name == "sqlite",
        version_table="seggate_revision",
    )
    with context.begin_transaction():
        context.run_migrations()


run()
