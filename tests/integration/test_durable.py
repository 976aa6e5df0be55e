"""The durable engine as we use it, on SQLite and on PostgreSQL: enqueued with the change that made it due, as JSON,
recovered by the same executor or by another one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from gateway import durable
from storage.database import Database
from storage.records import Study, StudyState
from tests.support.databases import KINDS, new_database_url
from tests.support.durable_life import QUEUE, WORKFLOW
from tests.support.peers import ROOT
from tests.support.story_rows import STUDY_UID, add_study
from tests.support.waiting import PATIENCE_S


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated database with the engine's tables."""
    database = Database(new_database_url(request, tmp_path))
    database.migrate()
    durable.prepare(database)
    yield database
    database.close()


@pytest.fixture
def enqueuer(database: Database) -> Iterator[durable.Enqueuer]:
    enqueuer = durable.Enqueuer(database)
    yield enqueuer
    enqueuer.close()


def workflows(database: Database) -> list[tuple[str, str, str | None, str | None]]:
    """(id, status, executor, application version) of every workflow."""
    table = "workflow_status" if database.is_sqlite else "dbos.workflow_status"
    query = f"SELECT workflow_uuid, status, executor_id, application_version FROM {table} ORDER BY workflow_uuid"
    with database.reading() as session:
        return [(row[0], row[1], row[2], row[3]) for row in session.execute(text(query))]


_SERIALIZED = (
    ("workflow_status", "inputs"),
    ("workflow_status", "output"),
    ("workflow_status", "error"),
    ("workflow_input", "inputs"),
    ("workflow_output", "output"),
    ("workflow_output", "error"),
    ("operation_outputs", "output"),
    ("operation_outputs", "error"),
)


def serialized(database: Database) -> dict[str, list[str]]:
    """Everything that the engine has serialized, by table and column."""
    prefix = "" if database.is_sqlite else "dbos."
    with database.reading() as session:
        return {
            f"{table}.{column}": [
                str(value) for (value,) in session.execute(text(f"SELECT {column} FROM {prefix}{table}")) if value
            ]
            for table, column in _SERIALIZED
        }


def enqueue(enqueuer: durable.Enqueuer, database: Database, *, delay_s: float = 0.0) -> None:
    with database.session() as session:
        enqueuer.enqueue(session, queue=QUEUE, workflow=WORKFLOW, workflow_id="w1", argument="x", delay_s=delay_s)


def live(database: Database, executor: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    url = database.url.render_as_string(hide_password=False)
    return subprocess.run(
        [sys.executable, "-m", "tests.support.durable_life", url, executor, str(folder), "w1", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def lines(folder: Path) -> list[str]:
    return (folder / "lines").read_text().splitlines()


@pytest.mark.requirement("EMR-48")
def test_a_change_and_the_work_it_makes_due_are_committed_together(
    database: Database, enqueuer: durable.Enqueuer
) -> None:
    with database.session() as session:
        add_study(session, StudyState.WHOLE)
        enqueuer.enqueue(session, queue=QUEUE, workflow=WORKFLOW, workflow_id="w1", argument="x")
    assert [(w[0], w[1], w[3]) for w in workflows(database)] == [("w1", "ENQUEUED", durable.APPLICATION_VERSION)]
    with database.reading() as session:
        assert session.get(Study, STUDY_UID) is not None


@pytest.mark.requirement("EMR-48")
def test_a_change_that_is_rolled_back_leaves_no_work(database: Database, enqueuer: durable.Enqueuer) -> None:
    def change() -> None:
        with database.session() as session:
            add_study(session, StudyState.WHOLE)
            enqueuer.enqueue(session, queue=QUEUE, workflow=WORKFLOW, workflow_id="w1", argument="x")
            raise RuntimeError("after the work was enqueued")

    with pytest.raises(RuntimeError):
        change()
    assert workflows(database) == []
    with database.reading() as session:
        assert session.get(Study, STUDY_UID) is None


def test_the_same_work_enqueued_twice_is_once(database: Database, enqueuer: durable.Enqueuer) -> None:
    enqueue(enqueuer, database)
    enqueue(enqueuer, database)
    assert [w[0] for w in workflows(database)] == ["w1"]


def test_work_for_later_is_not_on_the_queue_yet(database: Database, enqueuer: durable.Enqueuer) -> None:
    enqueue(enqueuer, database, delay_s=3600.0)
    assert [(w[0], w[1]) for w in workflows(database)] == [("w1", "DELAYED")]
    assert enqueuer.ended(["w1", "unknown"]) == {}


@pytest.mark.requirement("QUE-27")
def test_an_executor_that_comes_back_goes_on_after_the_last_finished_step(
    database: Database, enqueuer: durable.Enqueuer, tmp_path: Path
) -> None:
    enqueue(enqueuer, database)
    died = live(database, "a", tmp_path, "--die")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [(w[1], w[2]) for w in workflows(database)] == [("PENDING", "a")]
    back = live(database, "a", tmp_path)
    assert (back.returncode, back.stdout.split()) == (0, ["SUCCESS"]), back.stderr
    assert lines(tmp_path) == ["first x a", "second x a"]
    assert [(w[1], w[3]) for w in workflows(database)] == [("SUCCESS", durable.APPLICATION_VERSION)]

    # Nothing but JSON is kept; a pickle would be base64.
    kept = serialized(database)
    assert json.loads(kept["workflow_input.inputs"][0])["positionalArgs"] == ["x"]
    assert [json.loads(value) for value in kept["operation_outputs.output"]] == ["first x", "second x"]
    assert [json.loads(v) for v in kept["workflow_output.output"]] == [
        {"steps": ["first x", "second x"], "retry_in_s": None}
    ]
    for values in kept.values():
        for value in values:
            json.loads(value)


@pytest.mark.requirement("QUE-28", open="hung driver calls on a real GPU")
def test_another_executor_takes_a_dead_ones_work_once(
    database: Database, enqueuer: durable.Enqueuer, tmp_path: Path
) -> None:
    enqueue(enqueuer, database)
    died = live(database, "a", tmp_path, "--die")
    assert died.returncode == -signal.SIGKILL, died.stderr
    taken = live(database, "b", tmp_path, "--recover", "a")
    # One workflow was recovered, and asking again finds none.
    assert (taken.returncode, taken.stdout.split()) == (0, ["1", "0", "SUCCESS"]), taken.stderr
    assert lines(tmp_path) == ["first x a", "second x b"]
