"""gateway.learning.pauses: what waits while a model is paused, and how it goes on."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from engine.bundle import load_bundle
from gateway.cli import app
from gateway.demo.story import model_folder
from gateway.errors import Rejected
from gateway.learning.pauses import hold_result, is_paused, pause, reason_to_wait, resume
from gateway.learning.registration import register
from gateway.monitoring.drift_alarms import tell
from gateway.monitoring.drift_window import check_model
from gateway.settings import load_settings
from gateway.state import prepare_state
from storage import ledger
from storage.alarms import open_alarms
from storage.database import Database
from storage.learning_records import ServingPeriod
from storage.records import Result, ResultState, Study, StudyState, utc_now
from tests.support.config_folder import write_config
from tests.support.drift_studies import NOW, SETTINGS, add_studies, check, prepared
from tests.support.story_rows import STUDY_UID, NotedQueue, add_result, add_study, add_version

PAUSED = "model paused: a new scanner"


def held(session: Session, result_id: str, *, uid: str = STUDY_UID, version: int = 1) -> Result:
    """A result that waits."""
    result = add_result(session, ResultState.PENDING, result_id=result_id, uid=uid, version=version)
    reason = reason_to_wait(session, "tiny")
    assert reason == PAUSED
    hold_result(session, result, reason)
    return result


def serve(session: Session, version: str) -> None:
    session.add(
        ServingPeriod(
            model_name="tiny", model_version=version, weights_digest="w" * 64, began_at=utc_now(), began_by="user:ann"
        )
    )


@pytest.fixture
def queue() -> NotedQueue:
    return NotedQueue()


@pytest.mark.requirement("OPS-66", open="edit and reject rates of readers; what starts a shadow")
def test_what_waits_says_so_and_all_of_it_runs_when_the_model_is_resumed(database: Database, queue: NotedQueue) -> None:
    uids = ["1.2.1", "1.2.2"]
    with database.session() as session:
        for uid in uids:
            add_study(session, StudyState.PROCESSING, uid=uid)
            add_version(session, uid=uid)
        pause(session, "tiny", by="user:ann", reason=" a new scanner ")
        pause(session, "tiny", by="user:bob", reason="another reason")  # the first one stays
        for age, uid in enumerate(uids):
            held(session, f"r{age}", uid=uid).created_at = utc_now() - timedelta(hours=age)
        add_result(session, ResultState.HELD, result_id="doubtful", uid=uids[0], state_reason="held by QA: volume")
    with database.reading() as session:
        assert is_paused(session, "tiny")
        assert not is_paused(session, "other")
        study = session.get_one(Study, uids[1])
        assert (study.state, study.state_reason) == (StudyState.HELD, PAUSED)
        (alarm,) = open_alarms(session)
        assert (alarm.kind, alarm.subject, alarm.count) == ("model-paused", "model:tiny", 1)
    with database.session() as session:
        resumed = resume(session, queue, "tiny", by="user:ann")
    assert (resumed.results, resumed.studies) == (2, 0)
    assert queue.ids == ["result r1~1", "result r0~1"]  # the oldest first
    with database.reading() as session:
        assert open_alarms(session) == []
        assert {session.get_one(Result, f"r{n}").state for n in (0, 1)} == {ResultState.PENDING}
        assert session.get_one(Result, "doubtful").state == ResultState.HELD
        assert [session.get_one(Study, uid).state for uid in uids] == [StudyState.PROCESSING] * 2
        kinds = [event.kind for event in ledger.events(session, "model:tiny")]
    assert kinds == ["model-paused", "model-resumed"]


def test_a_pause_needs_a_reason_and_what_is_not_paused_cannot_be_resumed(database: Database, queue: NotedQueue) -> None:
    with database.session() as session:
        with pytest.raises(Rejected, match="needs a reason"):
            pause(session, "tiny", by="user:ann", reason="  ")
        with pytest.raises(Rejected, match="tiny is not paused"):
            resume(session, queue, "tiny", by="user:ann")


def test_the_released_result_of_an_older_version_stays_until_the_new_one_is_there(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING, version=2)
        add_version(session)
        add_version(session, 2)
        add_result(session, ResultState.RELEASED, result_id="old", verdict="pass")
        pause(session, "tiny", by="user:ann", reason="a new scanner")
        held(session, "new", version=2)
        assert session.get_one(Result, "old").state == ResultState.RELEASED
        assert [alarm.kind for alarm in open_alarms(session)] == ["model-paused"]


def test_where_another_version_serves_meanwhile_the_study_is_ordered_again_for_that_one(
    database: Database, queue: NotedQueue
) -> None:
    with database.session() as session:
        serve(session, "1.1.0")
        for uid, state in (("1.2.1", StudyState.PROCESSING), ("1.2.2", StudyState.PROCESSING)):
            add_study(session, state, uid=uid)
            add_version(session, uid=uid)
        pause(session, "tiny", by="policy", reason="a new scanner")
        held(session, "first", uid="1.2.1")
        held(session, "second", uid="1.2.1")
        held(session, "third", uid="1.2.2").model_version = "1.1.0"
        resumed = resume(session, queue, "tiny", by="user:ann")
    assert (resumed.results, resumed.studies) == (1, 1)
    assert [(call["workflow"], call["workflow_id"]) for call in queue.calls] == [
        ("process_study", "study 1.2.1 1~1"),
        ("make_result", "result third~1"),
    ]
    with database.reading() as session:
        assert session.get(Result, "first") is None
        assert session.get(Result, "second") is None
        assert session.get_one(Study, "1.2.1").state == StudyState.WHOLE


def test_a_study_that_got_more_objects_goes_on_as_it_was(database: Database, queue: NotedQueue) -> None:
    with database.session() as session:
        serve(session, "1.1.0")
        study = add_study(session, StudyState.PROCESSING)
        add_version(session)
        pause(session, "tiny", by="policy", reason="a new scanner")
        held(session, "r1")
        study.state = StudyState.RECEIVING
        resumed = resume(session, queue, "tiny", by="user:ann")
        assert (resumed.results, resumed.studies) == (1, 0)
        assert session.get_one(Result, "r1").state == ResultState.PENDING
        assert study.state == StudyState.RECEIVING


@pytest.mark.peer("postgresql")
@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_result_that_is_ordered_while_the_model_is_resumed_is_not_left_behind(
    database: Database, queue: NotedQueue
) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        pause(session, "tiny", by="user:ann", reason="a new scanner")
    looked, done = threading.Event(), threading.Event()

    def order() -> None:
        with database.session() as session:
            result = add_result(session, ResultState.PENDING)
            reason = reason_to_wait(session, "tiny")
            looked.set()
            done.wait(0.5)  # long enough for the other to come as far as it can
            if reason is not None:
                hold_result(session, result, reason)

    ordering = threading.Thread(target=order)
    ordering.start()
    assert looked.wait(10)
    with database.session() as session:
        assert resume(session, queue, "tiny", by="user:ann").results == 1
    ordering.join()
    assert queue.ids == ["result r1~1"]


@pytest.mark.requirement("ART-20", open="the fine-tuning that an alarm starts")
@pytest.mark.requirement("OPS-66", open="edit and reject rates of readers; what starts a shadow")
def test_a_new_critical_drift_pauses_the_model_where_its_policy_says_so_and_a_person_is_not_overruled(
    database: Database, queue: NotedQueue, tmp_path: Path
) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 80, days_ago=60)
        add_studies(session, 40, start=200, days_ago=0.5, manufacturer="Other")
    assert check(database, tmp_path)[0].report.severity == "critical"
    with database.session() as session:
        assert not is_paused(session, "tiny")
        session.delete(open_alarms(session)[0])
    check(database, tmp_path, on_drift="pause")
    with database.session() as session:
        assert reason_to_wait(session, "tiny") == "model paused: critical drift in manufacturer"
        resume(session, queue, "tiny", by="user:ann")
    assert check(database, tmp_path, on_drift="pause")[0].report.severity == "critical"
    with database.reading() as session:
        assert not is_paused(session, "tiny")


def test_a_warning_never_pauses_a_model(database: Database) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 80, days_ago=60)
        add_studies(session, 40, start=200, days_ago=0.5, volume_ml=6.0)
    with database.reading() as session:
        (found,) = check_model(session, "tiny", "1.0.0", SETTINGS, now=NOW)
    slight = replace(found, report=replace(found.report, severity="warn"))
    with database.session() as session:
        tell(session, slight, {}, pauses_model=True)
        assert not is_paused(session, "tiny")
        assert [alarm.kind for alarm in open_alarms(session)] == ["drift"]


def test_the_commands_pause_and_resume(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    settings = load_settings(config)
    database = prepare_state(settings)
    register(settings, load_bundle(model_folder()), candidate=False, actor="test")
    runner, end = CliRunner(), ["--config", str(config)]
    ran = runner.invoke(app, ["models", "pause", "nobody", "--reason", "x", *end])
    assert (ran.exit_code, "no model 'nobody' is registered here" in ran.output) == (1, True)
    ran = runner.invoke(app, ["models", "pause", "hippocampus-mr", "--reason", " ", *end])
    assert (ran.exit_code, "needs a reason" in ran.output) == (1, True), ran.output
    for was in (False, True):
        ran = runner.invoke(app, ["models", "pause", "hippocampus-mr", "--reason", "a new coil", "--json", *end])
        document = json.loads(ran.stdout)
        assert (document["reason"], document["was_paused"]) == ("a new coil", was)
    with database.reading() as session:
        assert is_paused(session, "hippocampus-mr")
    ran = runner.invoke(app, ["models", "resume", "hippocampus-mr", *end])
    assert (ran.exit_code, "runs again; 0 results" in ran.output) == (0, True), ran.output
    ran = runner.invoke(app, ["models", "resume", "hippocampus-mr", *end])
    assert (ran.exit_code, "is not paused" in ran.output) == (1, True)
