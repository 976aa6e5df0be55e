"""Retention: the longest delivered first, until there is space; a dry run; a sender that was refused is taken again."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from gateway.cli import app
from gateway.deletion.deletions import Deletions
from gateway.deletion.legal_hold import hold_study
from gateway.deletion.retention import ALARM, Retention
from gateway.disk_space import ALARM_RESERVE, ReserveWatch
from gateway.intake.indexer import Indexer
from gateway.intake.scp import Receiver
from gateway.settings import Settings, load_settings
from gateway.state import prepare_state
from storage.alarms import open_alarms
from storage.database import Database
from storage.records import Instance, Study, StudyState, utc_now
from storage.spool import Spool
from tests.support.config_folder import settings_in, write_config
from tests.support.finished_study import add_finished, files_in
from tests.support.received_objects import data_set, intake_settings
from tests.support.scripted_peer import Rejected, ScriptedPeer
from tests.support.story_rows import NotedQueue

MIB = 1 << 20


class SmallDisk(Spool):
    """A spool on a disk of its own, of so many bytes."""

    def __init__(self, root: Path, *, capacity: int, reserve_bytes: int = 0) -> None:
        super().__init__(root, reserve_bytes)
        self.capacity = capacity

    def free_bytes(self) -> int:
        return self.capacity - sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())


def settings(folder: Path, **policy: Any) -> Settings:
    """As given, but for the order of megabytes, which studies of some kB cannot fill."""
    found = settings_in(folder)
    retention = found.gateway.retention.model_copy(update=policy)
    return found.model_copy(update={"gateway": found.gateway.model_copy(update={"retention": retention})})


def retention(database: Database, spool: Spool, configured: Settings) -> Retention:
    deletions = Deletions(database=database, spool=spool, enqueuer=NotedQueue(), settings=configured)
    return Retention(database=database, spool=spool, settings=configured, deletions=deletions)


def disk(folder: Path, *, free_mb: float) -> SmallDisk:
    spool = SmallDisk(folder / "state" / "spool", capacity=int(free_mb * MIB))
    spool.prepare()
    return spool


def fill(database: Database, spool: Spool, days: tuple[float, ...], *, size_mb: int = 1) -> list[str]:
    """A study for each age, of one object of so many MB; their UIDs."""
    made = []
    for number, days_ago in enumerate(days):
        uid = f"1.2.7.{number}"
        add_finished(database, spool, uid, days_ago=days_ago, objects=1)
        with database.session() as session:
            row = session.scalars(select(Instance).where(Instance.study_instance_uid == uid)).one()
            row.size_bytes = size_mb * MIB
            (spool.root / row.spool_path).write_bytes(b"\0" * (size_mb * MIB))
        made.append(uid)
    return made


def there(database: Database) -> set[str]:
    with database.reading() as session:
        return set(session.scalars(select(Study.study_instance_uid)))


def alarms(database: Database) -> list[str]:
    with database.reading() as session:
        return [alarm.kind for alarm in open_alarms(session)]


@pytest.mark.requirement("OPS-57")
def test_by_default_nothing_is_deleted_however_old_and_full(database: Database, tmp_path: Path) -> None:
    spool = disk(tmp_path, free_mb=3)
    uids = fill(database, spool, (4000, 300))
    own = retention(database, spool, settings(tmp_path))
    assert own.plan().going == ()
    assert own.run().startswith("[retention] deletes nothing")
    assert there(database) == set(uids)


@pytest.mark.requirement("OPS-57")
def test_for_space_the_longest_delivered_go_first_until_enough_is_free(database: Database, tmp_path: Path) -> None:
    spool = disk(tmp_path, free_mb=6.5)
    a, b, c, d, e = fill(database, spool, (20, 50, 40, 30, 60))
    own = retention(database, spool, settings(tmp_path, start_below_mb=2, stop_at_mb=4))
    plan = own.plan()
    assert [one.study.study_instance_uid for one in plan.going] == [e, b, c]
    assert [study.study_instance_uid for study in plan.staying] == [d, a]
    assert plan.short_bytes == 0
    assert own.run().startswith("3 studies deleted, 3 MB; 4 MB are free")
    assert there(database) == {a, d}
    assert own.run().startswith("0 studies deleted")
    assert alarms(database) == []


@pytest.mark.requirement("OPS-57")
def test_what_must_stay_is_passed_over_and_the_lack_is_an_alarm_until_there_is_space(
    database: Database, tmp_path: Path
) -> None:
    spool = disk(tmp_path, free_mb=3.5)
    held, fresh, free = fill(database, spool, (90, 2, 30))
    with database.session() as session:
        hold_study(session, held, by="ann", reason="case 7")
    own = retention(database, spool, settings(tmp_path, start_below_mb=3, stop_at_mb=3))
    plan = own.plan()
    assert [one.study.study_instance_uid for one in plan.going] == [free]
    assert {study.study_instance_uid: study.kinds for study in plan.staying} == {
        held: {"legal-hold"},
        fresh: {"keep-days"},
    }
    assert 0 < plan.short_bytes < 2 * MIB
    own.run()
    assert there(database) == {held, fresh}
    assert alarms(database) == [ALARM]
    spool.capacity += 5 * MIB
    own.run()
    assert alarms(database) == []


@pytest.mark.requirement("OPS-57")
def test_for_its_age_a_study_goes_however_much_space_there_is(database: Database, tmp_path: Path) -> None:
    spool = disk(tmp_path, free_mb=1000)
    old, young = fill(database, spool, (31, 29))
    unmatched = "1.2.8.1"
    add_finished(database, spool, unmatched, days_ago=50, delivered=False, state=StudyState.UNMATCHED)
    own = retention(database, spool, settings(tmp_path, delivered_days=30))
    own.run()
    assert there(database) == {young, unmatched}
    assert old not in there(database)
    retention(database, spool, settings(tmp_path, delivered_days=30, unmatched_days=40)).run()
    assert there(database) == {young}


@pytest.mark.requirement("OPS-57")
def test_a_reason_that_comes_up_after_the_look_still_counts(database: Database, tmp_path: Path) -> None:
    spool = disk(tmp_path, free_mb=1000)
    (uid,) = fill(database, spool, (31,))
    own = retention(database, spool, settings(tmp_path, delivered_days=30))
    looked = own._judged

    def then_held() -> Any:
        found = looked()
        with database.session() as session:
            hold_study(session, uid, by="ann", reason="case 7")
        return found

    own._judged = then_held  # type: ignore[method-assign]
    assert own.run().endswith("1 stayed after all")
    assert there(database) == {uid}


@pytest.mark.requirement("OPS-57")
def test_a_clock_that_was_put_back_deletes_nothing_early(database: Database, tmp_path: Path) -> None:
    spool = disk(tmp_path, free_mb=1000)
    (uid,) = fill(database, spool, (31,))
    own = retention(database, spool, settings(tmp_path, delivered_days=30))
    own._clock = lambda: utc_now() - timedelta(days=20)
    own.run()
    assert there(database) == {uid}


@pytest.mark.requirement("OPS-57", "REC-02")
def test_a_sender_that_was_refused_is_taken_again_once_retention_made_space(database: Database, tmp_path: Path) -> None:
    """Nothing is started anew: receiver, indexer and the watch of the reserve are the same before and after."""
    configured = settings(tmp_path, start_below_mb=2, stop_at_mb=2)
    reserve = MIB
    spool = SmallDisk(tmp_path / "state" / "spool", capacity=4 * MIB, reserve_bytes=reserve)
    spool.prepare()
    old = fill(database, spool, (90, 60, 30))
    spool.capacity -= MIB // 2
    intake = intake_settings(tmp_path)
    receiver, indexer = Receiver(intake, spool), Indexer(spool, database, intake)
    watch = ReserveWatch(database, spool, every_s=0)
    receiver.start()
    try:
        watch.look()
        assert alarms(database) == [ALARM_RESERVE]
        with ScriptedPeer(receiver.port) as peer, pytest.raises(Rejected) as refused:
            peer.associate()
        assert (refused.value.result, refused.value.source, refused.value.diagnostic) == (2, 3, 1)
        retention(database, spool, configured).run()
        watch.look()
        assert alarms(database) == []
        assert there(database) == {old[2]}
        with ScriptedPeer(receiver.port) as peer:
            peer.associate()
            assert peer.store(data_set("1.2.3.1", id="P1"), sop_instance=b"1.2.3.1").status == 0
            peer.release()
    finally:
        receiver.stop()
    indexer.run_once()
    assert len(there(database)) == 2


def test_a_run_that_takes_too_long_leaves_the_rest_to_the_next(database: Database, tmp_path: Path) -> None:
    spool = disk(tmp_path, free_mb=1000)
    fill(database, spool, (31, 32))
    own = retention(database, spool, settings(tmp_path, delivered_days=30, start_below_mb=2000))
    own._most_s = 0
    assert own.run().endswith("the next run goes on")
    assert len(there(database)) == 2
    assert alarms(database) == []


# -- the commands --------------------------------------------------------------------------------------------------


def run(config: Path, *words: str) -> tuple[int, Any, str]:
    """Exit code, JSON, what was said."""
    ran = CliRunner().invoke(app, [*words, "--json", "--config", str(config)])
    return ran.exit_code, json.loads(ran.stdout) if ran.stdout.strip() else None, ran.stderr


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, gateway="[retention]\ndelivered_days = 30\n")


@pytest.fixture
def gateway(config: Path) -> Database:
    found = load_settings(config)
    database = prepare_state(found)
    fill(database, Spool(found.spool_dir, 0), (31, 29))
    return database


@pytest.mark.requirement("OPS-57")
def test_a_dry_run_lists_what_would_go_and_why_the_others_stay(config: Path, gateway: Database) -> None:
    code, document, _ = run(config, "retention", "--dry-run")
    assert code == 0
    assert document["policy"] == "delivered for 30 days; nothing within 7 days"
    assert [(one["study_uid"], one["because"]) for one in document["going"]] == [("1.2.7.0", "age")]
    (stays,) = document["staying"]
    assert (stays["study_uid"], [reason["kind"] for reason in stays["reasons"]]) == ("1.2.7.1", ["not-yet"])
    assert there(gateway) == {"1.2.7.0", "1.2.7.1"}
    shown = CliRunner().invoke(app, ["retention", "--dry-run", "--config", str(config)])
    assert "Would go: 1" in shown.stdout
    assert "what keeps them: not-yet 1" in shown.stderr


@pytest.mark.requirement("OPS-57")
def test_the_command_deletes_what_the_dry_run_said_and_asks_before(config: Path, gateway: Database) -> None:
    code, _, said = run(config, "retention")
    assert (code, "give --yes" in said) == (2, True)
    code, document, _ = run(config, "retention", "--yes")
    assert code == 0
    assert document["said"].startswith("1 studies deleted, 1 MB")
    assert there(gateway) == {"1.2.7.1"}
    code, document, _ = run(config, "audit", "verify")
    assert (code, document["ok"]) == (0, True)


@pytest.mark.requirement("OPS-57")
def test_delete_asks_says_what_stands_against_it_and_deletes(config: Path, gateway: Database) -> None:
    spool = Spool(load_settings(config).spool_dir, 0)
    with gateway.session() as session:
        session.get_one(Study, "1.2.7.1").state = StudyState.FAILED
    assert run(config, "delete", "1.2.7.1", "--reason", "r")[0] == 2
    code, document, said = run(config, "delete", "1.2.7.1", "--reason", "r", "--yes")
    assert (code, document["with_force"], document["reasons"][0]["kind"]) == (1, True, "state")
    assert "what was not delivered then reaches nobody" in said
    code, document, _ = run(config, "delete", "1.2.7.1", "--reason", "r", "--yes", "--force")
    assert (code, document["ok"], document["objects"], document["in_spite_of"]) == (0, True, 1, ["state"])
    assert there(gateway) == {"1.2.7.0"}
    assert len(files_in(spool.root / "studies")) == 2
    code, _, said = run(config, "delete", "1.2.7.1", "--reason", "r", "--yes")
    assert (code, "was deleted at" in said) == (1, True)
    code, _, said = run(config, "delete", "9.9", "--reason", "r", "--yes")
    assert (code, "no study" in said) == (1, True)


@pytest.mark.requirement("OPS-57")
def test_keep_puts_a_study_under_legal_hold_and_lists_and_lifts_it(config: Path, gateway: Database) -> None:
    assert run(config, "keep", "1.2.7.0")[0] == 2
    assert run(config, "keep", "1.2.7.0", "--reason", "case 7")[0] == 0
    assert run(config, "keep", "1.2.7.0", "--reason", "case 8")[0] == 1
    assert [hold["reason"] for hold in run(config, "keep")[1]] == ["case 7"]
    code, document, said = run(config, "delete", "1.2.7.0", "--reason", "r", "--yes", "--force")
    assert (code, document["with_force"], "--force deletes" in said) == (1, False, False)
    assert run(config, "retention", "--dry-run")[1]["going"] == []
    assert run(config, "keep", "1.2.7.0", "--lift", "--reason", "closed")[0] == 0
    assert len(run(config, "retention", "--dry-run")[1]["going"]) == 1
