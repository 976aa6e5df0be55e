"""Up to when the index is complete, what assembly makes of it, and clocks that are put right."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.intake.assembly import Assembly
from gateway.intake.expected_count import ExpectedCounts
from gateway.intake.header import read_header
from gateway.intake.index_mark import IndexMark
from gateway.intake.indexer import ALARM_CLOCK, Indexer
from storage.errors import DatabaseAway, SpoolUnsafe
from storage.part10 import ObjectEvidence
from storage.records import Instance, Series, StudyVersion
from storage.spool import Incoming
from tests.integration.test_indexer import A, Bench
from tests.support.received_objects import data_set, element
from tests.support.scripted_peer import CT_IMAGE, EXPLICIT_LITTLE


class Clocked(Bench):
    """A bench whose indexer and assembly have a clock of the test's own; one association brings every object."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.now = datetime.now(UTC)
        self.mark = IndexMark(self.spool.root)
        self.indexer = self.new_indexer()
        self.assembly = Assembly(
            self.database,
            self.settings,
            expected_count=ExpectedCounts(calling_ae="SEGGATE"),
            headers=lambda path: read_header(self.spool.resolve(path)).dataset,
            enqueue=lambda session, version: None,
            indexed_until=self.mark.read,
            clock=lambda: self.now,
        )

    def new_indexer(self) -> Indexer:
        return Indexer(self.spool, self.database, self.settings, wall_clock=lambda: self.now)

    def put(self, number: int, received_at: datetime) -> None:
        sop = f"1.2.3.{number}"
        position = element(0x00200032, "DS", f"0\\0\\{number}") + element(0x00200037, "DS", "1\\0\\0\\0\\1\\0")
        evidence = ObjectEvidence(
            object_id=self.spool.new_id(), association_id="a" * 32, peer_address="192.0.2.1", calling_ae="CT1",
            called_ae="SEGGATE", received_at=received_at, sop_class_uid=CT_IMAGE, sop_instance_uid=sop,
            transfer_syntax_uid=EXPLICIT_LITTLE,
        )  # fmt: skip
        self.spool.write_object(data_set(sop, extra=position, **A), evidence=evidence)

    def ended(self) -> None:
        self.event("ended", ended="released", ended_at=self.now.isoformat())

    def tick_after(self, seconds: float) -> list[str]:
        """Time passes, the indexer looks, assembly ticks."""
        self.now += timedelta(seconds=seconds)
        self.indexer.run_once()
        return self.assembly.tick()

    def clock_alarms(self) -> list[str]:
        return [message for kind, message in self.alarms() if kind == ALARM_CLOCK]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Clocked]:
    made = Clocked(tmp_path)
    made.indexer.run_once()
    yield made
    made.database.close()


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
def test_a_backlog_is_declared_whole_only_when_all_of_it_is_indexed(
    bench: Clocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database was away for ten minutes and goes again after the first batch of one association's slices."""
    bench.event("opened")
    for number in range(120):
        bench.put(number, bench.now + timedelta(seconds=number))
    bench.ended()
    bench.now += timedelta(minutes=10)
    index = Indexer._index
    batches: list[int] = []

    def index_one_batch(indexer: Indexer, batch: Sequence[Incoming]) -> None:
        if batches:
            raise DatabaseAway("away")
        batches.append(len(batch))
        index(indexer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Indexer, "_index", index_one_batch)
        with pytest.raises(DatabaseAway):
            bench.indexer.run_once()
    assert len(bench.states()) == 99
    assert bench.assembly.tick() == []
    assert "index, which is behind" in str(bench.study().state_reason)
    assert len(bench.tick_after(1)) == 1
    (version,) = bench.rows(StudyVersion)
    assert (len(version.object_ids), version.rule) == (120, "quiet-after-release")


def test_an_object_is_not_older_than_the_look_that_did_not_see_it(bench: Clocked) -> None:
    """Another host's clock, or a folder that shows its names late: quiet time begins when the index hears of it."""
    bench.event("opened")
    stamped = bench.now - timedelta(minutes=10)
    bench.put(1, stamped)
    bench.ended()
    assert bench.tick_after(1) == []
    assert bench.rows(Instance)[0].received_at == stamped
    assert bench.study().last_received_at == bench.rows(Series)[0].last_received_at == bench.now - timedelta(seconds=1)
    assert bench.tick_after(28) == []
    assert len(bench.tick_after(1)) == 1


def test_objects_from_the_future_count_as_received_now_with_one_alarm(bench: Clocked) -> None:
    bench.event("opened")
    for number in range(3):
        bench.put(number, bench.now + timedelta(days=1))
    bench.ended()
    assert bench.tick_after(0) == []
    assert {row.received_at for row in bench.rows(Instance)} == {bench.now}
    (alarm,) = bench.clock_alarms()
    assert "ahead of this host's clock" in alarm
    assert bench.tick_after(29) == []
    assert len(bench.tick_after(1)) == 1


def test_a_clock_that_is_put_right_after_running_ahead_keeps_no_study_waiting(bench: Clocked) -> None:
    right = bench.now
    bench.now += timedelta(days=1)
    bench.event("opened")
    bench.put(1, bench.now)
    bench.ended()
    assert bench.tick_after(0) == []
    bench.now = right
    bench.indexer = bench.new_indexer()  # also over a restart
    assert bench.tick_after(0) == []
    assert bench.study().last_received_at == right
    (alarm,) = bench.clock_alarms()
    assert "put back by 1 day" in alarm
    assert bench.tick_after(29) == []
    assert len(bench.tick_after(1)) == 1
    assert len(bench.clock_alarms()) == 1


def test_the_mark_says_up_to_when_the_index_is_complete(bench: Clocked, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.mark.read() == bench.now
    before = bench.now
    bench.put(1, bench.now)
    bench.now += timedelta(seconds=5)

    def away(*_: Any) -> None:
        raise DatabaseAway("away")

    with monkeypatch.context() as patch:
        patch.setattr(Indexer, "_commit", away)
        with pytest.raises(DatabaseAway):
            bench.indexer.run_once()
        assert bench.mark.read() == before
        # A new start may be over a restored database: what the mark said is not known any more.
        bench.indexer = bench.new_indexer()
        with pytest.raises(DatabaseAway):
            bench.indexer.run_once()
        assert bench.mark.read() is None
    bench.indexer.run_once()
    assert bench.mark.read() == bench.now


def test_a_mark_that_cannot_be_written_stops_the_round(bench: Clocked, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    with pytest.raises(SpoolUnsafe):
        bench.indexer.run_once()
