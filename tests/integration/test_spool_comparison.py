"""A database that is older than the spool, or a spool older than the database, at the indexer's start."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.intake import spool_comparison
from gateway.intake.index_mark import IndexMark
from gateway.intake.indexer import Indexer
from gateway.intake.spool_comparison import SpoolComparison
from storage.database import Database
from storage.errors import DatabaseAway, SpoolUnsafe
from storage.records import Instance, InstanceState
from tests.integration.test_indexer import Bench
from tests.support.received_objects import data_set

JANE: dict[str, Any] = {"id": "P1", "name": "Doe^Jane", "birth_date": "19700101"}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.database.close()


def back_up(bench: Bench, folder: Path) -> None:
    bench.database.close()
    shutil.copy(str(bench.database.url.database), folder / "backup.sqlite")


def restore(bench: Bench, folder: Path) -> None:
    """The database as it was; the spool as it is."""
    bench.database.close()
    live = str(bench.database.url.database)
    for beside in ("-wal", "-shm"):
        Path(live + beside).unlink(missing_ok=True)
    shutil.copy(folder / "backup.sqlite", live)
    start_again(bench)


def start_again(bench: Bench) -> None:
    bench.database = Database(bench.settings.database_url)
    bench.indexer = Indexer(bench.spool, bench.database, bench.settings)


def until_done(bench: Bench) -> int:
    """Rounds of an indexer that has just started; returns how many entries it indexed."""
    indexed = 0
    for _ in range(50):
        indexed += bench.indexer.run_once()
        if bench.indexer.compared:
            return indexed
    raise AssertionError("the comparison does not end")


def described(bench: Bench) -> dict[str, tuple[object, ...]]:
    return {
        row.object_id: (row.state, row.state_reason, row.digest, row.spool_path, row.received_at, row.association_id)
        for row in bench.rows(Instance)
    }


@pytest.mark.requirement("REC-01")
def test_objects_that_a_restored_database_does_not_know_are_indexed_again(bench: Bench, tmp_path: Path) -> None:
    bench.slice("1.2.3.0", **JANE)
    bench.indexer.run_once()
    back_up(bench, tmp_path)
    bench.slice("1.2.3.1", **JANE)
    bench.slice("1.2.3.1", **JANE)
    bench.slice("1.2.3.2", **JANE, pixels=b"\3\4" * 16)
    bench.slice("1.2.3.2", **JANE)
    bench.slice("1.2.3.3", study="1.2.9", id="P2")
    bench.receive(b"no object")
    bench.indexer.run_once()
    before, files = described(bench), sorted(bench.spool.root.rglob("*.dcm"))
    restore(bench, tmp_path)
    assert len(described(bench)) == 1
    assert until_done(bench) == 6
    assert described(bench) == before
    assert sorted(bench.spool.root.rglob("*.dcm")) == files
    assert bench.spool.incoming() == []
    found = {kind: message for kind, message in bench.alarms() if kind.startswith("objects-without")}
    assert list(found) == ["objects-without-row"]
    assert found["objects-without-row"].startswith("6 objects of the spool had no row")
    start_again(bench)
    assert until_done(bench) == 0
    assert described(bench) == before


@pytest.mark.requirement("REC-01")
def test_an_empty_database_is_filled_from_the_spool_in_steps(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_comparison, "_STEP", 3)
    back_up(bench, tmp_path)
    for study in range(4):
        for number in range(5):
            sop = f"1.2.3.{study}.{number}"
            bench.receive(data_set(sop, study=f"1.2.{study}", series=f"1.2.{study}.1", **JANE), sop=sop)
    bench.receive(b"no object")
    bench.indexer.run_once()
    before = described(bench)
    restore(bench, tmp_path)
    rounds = []
    while not bench.indexer.compared:
        rounds.append(bench.indexer.run_once())
    assert [indexed for indexed in rounds if indexed] == [5, 5, 5, 5, 1]
    assert described(bench) == before


def test_a_study_is_taken_back_whole_however_many_objects_it_has(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_comparison, "_STEP", 5)
    back_up(bench, tmp_path)
    for number in range(12):
        bench.slice(f"1.2.3.{number}", **JANE)
    bench.indexer.run_once()
    restore(bench, tmp_path)
    comparison = SpoolComparison(bench.spool, bench.database)
    assert not comparison.files_done
    comparison.step()
    assert comparison.files_done
    assert len(bench.spool.incoming()) == 12


@pytest.mark.requirement("CMP-15")
def test_index_does_not_count_as_complete_while_the_spool_may_hold_objects_without_a_row(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_comparison, "_STEP", 1)
    back_up(bench, tmp_path)
    for study in range(3):
        bench.slice(f"1.2.3.{study}", study=f"1.2.{study}", **JANE)
    bench.indexer.run_once()
    restore(bench, tmp_path)
    mark = IndexMark(bench.spool.root)
    known = []
    while not bench.indexer.compared:
        bench.indexer.run_once()
        known.append((len(bench.rows(Instance)), mark.read() is not None))
    assert known[:3] == [(1, False), (2, False), (3, True)]


def test_rows_whose_file_is_gone_are_counted_and_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_comparison, "_STEP", 2)
    for number in range(5):
        bench.slice(f"1.2.3.{number}", **JANE)
    bench.indexer.run_once()
    paths = [bench.spool.resolve(row.spool_path) for row in bench.rows(Instance)]
    hidden = [path.rename(path.with_suffix(".hidden")) for path in (paths[0], paths[4])]
    start_again(bench)
    until_done(bench)
    assert bench.states() == [InstanceState.CURRENT] * 5
    ((kind, message),) = bench.alarms()
    assert kind == "objects-without-file"
    assert message.startswith("2 objects that the database names are not in the spool")
    for path in hidden:
        path.rename(path.with_suffix(".dcm"))
    start_again(bench)
    until_done(bench)
    assert bench.alarms() == []


def test_objects_on_their_way_are_not_alarmed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.slice("1.2.3.1", **JANE)
    monkeypatch.setattr("storage.spool.Spool.settle", lambda self, moves: None)
    until_done(bench)
    start_again(bench)
    until_done(bench)
    assert bench.states() == [InstanceState.CURRENT]
    assert bench.alarms() == []


def test_database_and_spool_may_fail_meanwhile(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back_up(bench, tmp_path)
    bench.slice("1.2.3.1", **JANE)
    bench.slice("1.2.3.2", study="1.2.9", **JANE)
    bench.indexer.run_once()
    restore(bench, tmp_path)

    def away(self: Database) -> None:
        raise DatabaseAway("the database did not answer")

    def unsafe(self: object, paths: object) -> None:
        raise SpoolUnsafe("input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(Database, "reading", away)
        with pytest.raises(DatabaseAway):
            bench.indexer.run_once()
    with monkeypatch.context() as broken:
        broken.setattr("storage.spool.Spool.take_back", unsafe)
        with pytest.raises(SpoolUnsafe):
            bench.indexer.run_once()
    assert until_done(bench) == 2
    assert bench.states() == [InstanceState.CURRENT] * 2


def test_running_indexer_takes_up_what_is_new_and_what_is_old(bench: Bench, tmp_path: Path) -> None:
    back_up(bench, tmp_path)
    bench.slice("1.2.3.1", **JANE)
    bench.indexer.run_once()
    restore(bench, tmp_path)
    bench.slice("1.2.3.2", **JANE)
    stop = threading.Event()
    running = threading.Thread(target=bench.indexer.run, args=(stop,))
    running.start()
    for _ in range(500):
        if bench.indexer.compared and not bench.spool.incoming():
            break
        stop.wait(0.02)
    stop.set()
    running.join(10)
    assert bench.states() == [InstanceState.CURRENT] * 2
