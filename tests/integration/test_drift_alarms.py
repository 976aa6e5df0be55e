"""gateway.monitoring.drift_alarms: alarm, picture and review task of a drift, and how people take them on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select
from typer.testing import CliRunner

from engine.intensity_baseline import BINS, SHARES, ChannelBins, IntensityBaseline, PooledIntensities
from gateway.cli import app
from gateway.monitoring import drift_alarms
from gateway.monitoring.drift_alarms import KIND, KIND_TRAINING
from gateway.monitoring.drift_window import ModelDrift
from gateway.monitoring.review_tasks import close_task, open_tasks
from gateway.settings import load_settings
from gateway.state import prepare_state
from storage import ledger
from storage.alarms import open_alarms, raise_alarm, take_on
from storage.database import Database
from storage.learning_records import ReviewTask
from storage.records import Alarm
from tests.support.config_folder import write_config
from tests.support.drift_studies import add_studies, check, prepared, serve

SUBJECT = "model:tiny 1.0.0"


def baseline(middle: float) -> IntensityBaseline:
    """Of a training whose images are as bright as that."""
    shares = np.exp(-((np.arange(BINS) - middle) ** 2) / 50)
    edges = tuple(float(edge) for edge in np.linspace(-0.1, 1.4, BINS - 1))
    return IntensityBaseline(
        grid=(4, 2, 2),
        channels=(ChannelBins(name="MRI", scale="percentile", foreground_edges=edges, whole_edges=edges),),
        labels=("Anterior",),
        cases=200,
        pooled=(PooledIntensities(foreground=None, whole=tuple(float(s) for s in shares / shares.sum() * SHARES)),),
        studies=(),
    )


def alarms(database: Database) -> dict[str, Alarm]:
    with database.reading() as session:
        return {alarm.kind: alarm for alarm in open_alarms(session)}


def tasks(database: Database) -> list[ReviewTask]:
    with database.reading() as session:
        return list(session.scalars(select(ReviewTask).order_by(ReviewTask.task_id)))


def drifted(database: Database, folder: Path, *, start: int = 200, volume_ml: float = 3.0) -> None:
    """A reference, and a window from another manufacturer."""
    with database.session() as session:
        if start == 200:
            prepared(session)
            add_studies(session, 80, days_ago=60)
        add_studies(session, 40, start=start, days_ago=0.5, manufacturer="Other", volume_ml=volume_ml)
    check(database, folder)


@pytest.mark.requirement("ART-20", open="the fine-tuning that an alarm starts")
@pytest.mark.requirement("OPS-66", open="edit and reject rates of readers; what starts a shadow")
def test_a_drift_opens_one_task_with_stream_examples_and_picture_and_a_repeat_brings_it_up_to_date(
    database: Database, tmp_path: Path
) -> None:
    drifted(database, tmp_path)
    (task,) = tasks(database)
    assert (task.kind, task.subject, task.model_name, task.model_version) == (KIND, SUBJECT, "tiny", "1.0.0")
    assert task.summary == alarms(database)[KIND].message
    assert "manufacturer (critical" in task.summary
    assert set(task.result_ids) <= {f"r{index}" for index in range(200, 240)}
    assert len(task.result_ids) == 3
    assert task.picture is not None
    with Image.open(tmp_path / task.picture) as picture:
        assert picture.format == "PNG"
    drifted(database, tmp_path, start=300)
    (again,) = tasks(database)
    assert (again.task_id, again.opened_at) == (task.task_id, task.opened_at)
    assert set(again.result_ids) <= {f"r{index}" for index in range(300, 340)}
    with database.reading() as session:
        events = [event.kind for event in ledger.events(session, ledger.model_subject("tiny"))]
    assert events == ["review-task-opened"]


def test_a_task_that_was_closed_stays_closed_while_the_alarm_is_the_same(database: Database, tmp_path: Path) -> None:
    drifted(database, tmp_path)
    with database.session() as session:
        close_task(session, 1, by="user:ann", outcome="the new scanner; results are good")
    drifted(database, tmp_path, start=300)
    assert [task.closed_by for task in tasks(database)] == ["user:ann"]
    assert alarms(database)[KIND].count == 2
    with database.session() as session:  # all is well, and then it drifts again: something new
        add_studies(session, 40, start=400, days_ago=0.2)
    check(database, tmp_path)
    assert alarms(database) == {}
    with database.session() as session:
        add_studies(session, 40, start=500, days_ago=0.1, manufacturer="Other")
    check(database, tmp_path)
    assert [task.closed_at is None for task in tasks(database)] == [False, True]


def test_a_warning_that_was_taken_on_does_not_hide_a_critical_drift(database: Database, tmp_path: Path) -> None:
    drifted(database, tmp_path)
    with database.session() as session:
        (alarm,) = open_alarms(session)
        alarm.message = alarm.message.replace("critical:", "warn:", 1)  # as a slighter drift would have been
        take_on(session, alarm, by="ann", reason="known")
        close_task(session, 1, by="user:ann", outcome="known")
    check(database, tmp_path)
    found = alarms(database)[KIND]
    assert (found.seen_by, found.count, found.message[:9]) == (None, 1, "critical:")
    assert [task.closed_at is None for task in tasks(database)] == [False, True]


def test_a_promotion_closes_what_was_told_of_the_version_before_with_the_reason(
    database: Database, tmp_path: Path
) -> None:
    with database.session() as session:
        serve(session, "1.0.0")
    drifted(database, tmp_path)
    with database.session() as session:
        raise_alarm(session, kind=KIND, subject=f"{SUBJECT} on ACME One", message="critical: the same of one scanner")
        raise_alarm(session, kind=KIND, subject=f"{SUBJECT}0", message="of version 1.0.00, if there were one")
        raise_alarm(session, kind="model-rolled-back", subject=SUBJECT, message="something else")
        serve(session, "1.1.0", previous="1.0.0")
    assert sorted(alarms(database)) == [KIND, "model-rolled-back"]
    assert alarms(database)[KIND].subject == f"{SUBJECT}0"
    (task,) = tasks(database)
    assert (task.closed_by, task.outcome) == ("user:ann", "1.1.0 serves; reference and windows start anew")
    with database.reading() as session:
        chain = ledger.events(session, ledger.model_subject("tiny"))
        assert ledger.verify(session, ledger.model_subject("tiny")) == len(chain)
    assert [event.kind for event in chain][-3:] == ["model-promoted", "review-task-closed", "drift-alarms-closed"]
    told = chain[-1].detail
    assert (told["semver"], told["reason"]) == ("1.0.0", task.outcome)
    assert [one["subject"] for one in told["alarms"]] == [SUBJECT, f"{SUBJECT} on ACME One"]


def test_a_check_that_a_promotion_overtakes_says_nothing(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.session() as session:
        serve(session, "1.0.0")
    drawn = drift_alarms.draw_drift

    def and_promoted(drift: ModelDrift, folder: Path) -> dict[str, str]:
        with database.session() as session:
            serve(session, "1.1.0", previous="1.0.0")
        return drawn(drift, folder)

    monkeypatch.setattr(drift_alarms, "draw_drift", and_promoted)
    drifted(database, tmp_path)
    assert alarms(database) == {}
    assert tasks(database) == []


@pytest.mark.requirement("ART-20", open="the fine-tuning that an alarm starts")
def test_another_scanner_than_the_trainings_is_told_once_from_the_tenth_study_on(
    database: Database, tmp_path: Path
) -> None:
    other = baseline(middle=20.0)
    with database.session() as session:
        prepared(session)
        add_studies(session, 9, days_ago=2)
    (found,) = check(database, tmp_path, baselines=lambda _name, _version: other)
    assert (found.training, found.is_quiet) == ((), True)
    with database.session() as session:
        add_studies(session, 1, start=50, days_ago=1)
    for _ in range(2):
        (found,) = check(database, tmp_path, baselines=lambda _name, _version: other)
    assert found.report.too_few is not None
    assert [finding.name for finding in found.unlike_training] == ["intensities 0 against the training data"]
    alarm = alarms(database)[KIND_TRAINING]
    assert (alarm.subject, alarm.count, alarm.message[:5]) == (SUBJECT, 2, "warn:")
    (task,) = tasks(database)
    assert (task.kind, len(task.result_ids)) == (KIND_TRAINING, 3)
    assert task.picture is not None
    assert (tmp_path / task.picture).is_file()
    # Who takes it on is not asked again, and a drift beside it is an alarm of its own.
    with database.session() as session:
        take_on(session, session.get_one(Alarm, alarm.alarm_id), by="ann", reason="the site's scanner")
        close_task(session, task.task_id, by="user:ann", outcome="known since go-live")
        add_studies(session, 80, start=100, days_ago=1)
    check(database, tmp_path, baselines=lambda _name, _version: other)
    assert alarms(database)[KIND_TRAINING].seen_by == "ann"
    with database.reading() as session:
        assert list(open_tasks(session)) == []


def test_the_trainings_own_scanner_raises_nothing_and_ends_the_alarm(database: Database, tmp_path: Path) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 20, days_ago=2)
    check(database, tmp_path, baselines=lambda _name, _version: baseline(middle=20.0))
    assert set(alarms(database)) == {KIND_TRAINING}
    (found,) = check(database, tmp_path, baselines=lambda _name, _version: baseline(middle=30.0))
    assert [finding.severity for finding in found.training] == ["none"]
    assert alarms(database) == {}


def test_the_commands_draw_list_show_and_close(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    database = prepare_state(load_settings(config))
    runner, end = CliRunner(), ["--config", str(config)]
    assert "no open review tasks" in runner.invoke(app, ["tasks", "list", *end]).output
    with database.session() as session:
        prepared(session)
        add_studies(session, 200, days_ago=20)
        add_studies(session, 60, start=300, volume_ml=6.0)
    plot = tmp_path / "drift.png"
    ran = runner.invoke(app, ["drift", "--plot", str(plot), *end])
    assert (ran.exit_code, "--plot needs the name of one model" in ran.output) == (2, True)
    ran = runner.invoke(app, ["drift", "tiny", "--plot", str(plot), *end])
    assert (ran.exit_code, plot.read_bytes()[:4]) == (1, b"\x89PNG"), ran.output
    ran = runner.invoke(app, ["drift", "--alarms", "--json", *end])
    assert (ran.exit_code, json.loads(ran.stdout)[0]["severity"]) == (1, "critical")  # no line of the log among it
    (listed,) = json.loads(runner.invoke(app, ["tasks", "list", "--json", *end]).stdout)
    assert (listed["kind"], listed["model_name"], listed["closed_at"]) == ("drift", "tiny", None)
    assert Path(listed["picture"]).is_file()
    shown = json.loads(runner.invoke(app, ["tasks", "show", "1", "--json", *end]).stdout)
    assert set(shown["studies"].values()) == {"1.2.3.4"}
    assert "volume-ml Anterior" in runner.invoke(app, ["tasks", "show", "1", *end]).output
    assert runner.invoke(app, ["tasks", "show", "7", *end]).exit_code == 1
    assert runner.invoke(app, ["tasks", "close", "1", *end]).exit_code == 2
    ran = runner.invoke(app, ["tasks", "close", "1", "--outcome", "a new protocol", *end])
    assert (ran.exit_code, "review task 1 closed" in ran.output) == (0, True)
    ran = runner.invoke(app, ["tasks", "close", "1", "--outcome", "again", *end])
    assert (ran.exit_code, "was closed by user:" in ran.output) == (1, True)
    with database.reading() as session:
        kinds = [event.kind for event in ledger.events(session, "model:tiny")]
    assert kinds == ["review-task-opened", "review-task-closed"]
