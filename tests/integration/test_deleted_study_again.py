"""What comes of a deleted study afterwards: sent again it is new work, and an old copy of the spool does not bring it
back."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from sqlalchemy import select

from gateway.deletion.deletions import Deletions
from gateway.intake.assembly import Assembly
from gateway.intake.expected_count import ExpectedCounts
from gateway.intake.indexer import Indexer
from gateway.results.orders import content_key
from storage import ledger
from storage.database import Database
from storage.records import Instance, InstanceState, Study, StudyState, StudyVersion
from storage.spool import study_key
from tests.integration.test_indexer import Bench
from tests.integration.test_spool_comparison import until_done
from tests.support.finished_study import files_in
from tests.support.received_objects import STUDY
from tests.support.story_rows import NotedQueue

JANE: dict[str, Any] = {"id": "P1", "name": "Doe^Jane", "birth_date": "19700101"}
SOPS = ("1.2.3.1", "1.2.3.2")


class Died(Exception):
    pass


class OnBoth(Bench):
    """A bench on the database of the test."""

    def __init__(self, folder: Path, database: Database) -> None:
        super().__init__(folder)
        self.database.close()
        self.database = database
        self.start_again()

    def start_again(self) -> None:
        self.indexer = Indexer(self.spool, self.database, self.settings)

    def receive_study(self) -> None:
        for sop in SOPS:
            self.slice(sop, **JANE)

    def deletions(self, **how: Any) -> Deletions:
        queue = NotedQueue()
        return Deletions(database=self.database, spool=self.spool, enqueuer=queue, settings=self.settings, **how)

    def delete(self, **how: Any) -> None:
        self.deletions(**how).delete(STUDY, by="user:ann", reason="r", force=True)

    def declare(self) -> StudyVersion:
        """The version that assembly makes of the study."""
        later = datetime.now(UTC) + timedelta(seconds=3600)
        Assembly(
            self.database,
            self.settings,
            expected_count=ExpectedCounts(calling_ae="SEGGATE"),
            headers=lambda path: Dataset(),
            enqueue=lambda session, version: None,
            indexed_until=lambda: later,
            clock=lambda: later,
        ).tick()
        with self.database.reading() as session:
            (version,) = session.scalars(select(StudyVersion))
        return version


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> OnBoth:
    return OnBoth(tmp_path, database)


@pytest.mark.requirement("OPS-57")
def test_a_study_that_is_sent_again_is_new_work_with_new_results(bench: OnBoth) -> None:
    found = []
    for _ in range(3):
        bench.receive_study()
        bench.indexer.run_once()
        assert bench.states() == ["current"] * 2
        version = bench.declare()
        with bench.database.reading() as session:
            found.append((version.workflow_id, version.content_digest, content_key(session, version)))
        bench.delete()
        assert files_in(bench.spool.root / "studies") == []
    workflows, contents, keys = zip(*found, strict=True)
    assert len(set(workflows)) == 3  # or the queue would say that it was done
    assert len(set(contents)) == 1
    assert keys[0] == contents[0]
    assert len(set(keys)) == 3  # result ids and UIDs are made from it


@pytest.mark.requirement("OPS-57")
def test_what_arrives_while_a_study_is_being_deleted_waits_and_opens_it_anew(bench: OnBoth) -> None:
    bench.receive_study()
    bench.indexer.run_once()

    def dies(name: str) -> None:
        if name == "decided":
            raise Died

    with pytest.raises(Died):
        bench.delete(boundary=dies)
    bench.slice("1.2.3.1", **JANE)  # the same once more, and a late one
    bench.slice("1.2.3.9", **JANE)
    bench.slice("1.2.4.1", study="1.2.9", id="P2")
    bench.indexer.run_once()
    assert len(bench.spool.incoming()) == 2
    assert bench.study().state == StudyState.DELETING
    assert bench.study("1.2.9").state == StudyState.RECEIVING
    bench.deletions().finish_all()
    bench.start_again()
    until_done(bench)
    assert bench.spool.incoming() == []
    rows = [row for row in bench.rows(Instance) if row.study_instance_uid == STUDY]
    assert {(row.sop_instance_uid, row.state) for row in rows} == {
        ("1.2.3.1", InstanceState.CURRENT),
        ("1.2.3.9", InstanceState.CURRENT),
    }
    assert all(bench.spool.resolve(row.spool_path).is_file() for row in rows)
    assert bench.study().state == StudyState.RECEIVING


def test_an_indexer_that_runs_on_takes_up_what_waited_by_itself(bench: OnBoth) -> None:
    seconds = iter(range(0, 10_000, 10))
    bench.indexer = Indexer(bench.spool, bench.database, bench.settings, clock=lambda: float(next(seconds)))
    bench.receive_study()
    bench.indexer.run_once()

    def dies(name: str) -> None:
        if name == "decided":
            raise Died

    with pytest.raises(Died):
        bench.delete(boundary=dies)
    bench.slice("1.2.3.1", **JANE)
    assert bench.indexer.run_once() == 1
    assert [kind for kind, _ in bench.alarms()] == []
    bench.deletions().finish_all()
    bench.indexer.run_once()
    assert bench.states() == ["current"]


@pytest.mark.requirement("OPS-57", "REC-01")
def test_an_old_copy_of_the_spool_does_not_bring_it_back(bench: OnBoth, tmp_path: Path) -> None:
    bench.receive_study()
    bench.slice("1.2.4.1", study="1.2.9", id="P2")
    bench.indexer.run_once()
    bench.spool.store_result_file(study_key(STUDY), "r1", "seg.dcm", b"SEG")
    shutil.copytree(bench.spool.root / "studies", tmp_path / "copy")
    bench.delete()
    left = files_in(bench.spool.root)
    shutil.copytree(tmp_path / "copy", bench.spool.root / "studies", dirs_exist_ok=True)
    bench.start_again()
    until_done(bench)
    assert files_in(bench.spool.root) == left
    with bench.database.reading() as session:
        assert session.get(Study, STUDY) is None
        events = ledger.events(session, ledger.DELETIONS)
    assert [event.kind for event in events] == ["study-deleted", "deleted-objects-returned"]
    assert events[1].detail["objects"] == 2


@pytest.mark.requirement("OPS-57", "REC-01")
def test_of_an_old_copy_only_what_was_deleted_goes(bench: OnBoth, tmp_path: Path) -> None:
    """The study was sent again since; and an object that the index had never seen is no deleted one."""
    bench.receive_study()
    bench.indexer.run_once()
    shutil.copytree(bench.spool.root / "studies", tmp_path / "copy")
    bench.delete()
    bench.receive_study()
    bench.indexer.run_once()
    again = files_in(bench.spool.root / "studies")
    shutil.copytree(tmp_path / "copy", bench.spool.root / "studies", dirs_exist_ok=True)
    bench.slice("1.2.3.7", **JANE).rename(
        bench.spool.root / "studies" / study_key(STUDY) / "objects" / f"{bench.spool.new_id()}.dcm"
    )
    bench.start_again()
    until_done(bench)
    assert set(again) < set(files_in(bench.spool.root / "studies"))
    assert bench.states() == ["current"] * 3


def test_a_copy_of_an_object_elsewhere_is_judged_without_the_deleted_study(bench: OnBoth) -> None:
    bench.receive_study()
    bench.indexer.run_once()
    bench.delete()
    bench.receive_study()
    bench.receive_study()
    bench.indexer.run_once()
    assert sorted(bench.states()) == ["current", "current", "duplicate", "duplicate"]
