"""What a drift leads to, and what waits for labels: asked for once, never again before a person saw what failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import select

from gateway.learning import runs
from gateway.learning.policy import LearningPolicy
from gateway.monitoring.drift_window import ModelDrift
from gateway.settings import load_settings
from storage.database import Database
from storage.errors import ModelMissing
from storage.learning_records import LearningRun, ReviewTask, RunState
from storage.models import ModelRegistry
from tests.support.config_folder import write_config
from tests.support.story_rows import NotedQueue


class Registered:
    """A registry in which `liver` and `lung` serve."""

    def champion(self, name: str) -> Any:
        if name not in ("liver", "lung"):
            raise ModelMissing(name)
        return SimpleNamespace(name=name, semver="1.0.0")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'rows.sqlite'}")
    database.create_all()
    yield database
    database.close()


@pytest.fixture
def policy(database: Database, tmp_path: Path) -> LearningPolicy:
    config = write_config(tmp_path)
    entry = '[[models]]\nname = "{0}"\non_drift = "{1}"\ntrained = "/t"\ndataset = "/d"\n'
    (config / "learning.toml").write_text(
        entry.format("liver", "fine-tune") + entry.format("lung", "nothing") + entry.format("heart", "fine-tune")
    )
    return LearningPolicy(
        database=database,
        enqueuer=NotedQueue(),
        registry=cast(ModelRegistry, Registered()),
        settings=load_settings(config),
    )


def drift(name: str, severity: str = "critical") -> ModelDrift:
    finding = SimpleNamespace(name="noise")
    report = SimpleNamespace(severity=severity, drifted=[finding], too_few=None)
    return cast(ModelDrift, SimpleNamespace(model_name=name, report=report))


def all_runs(database: Database) -> list[LearningRun]:
    with database.reading() as session:
        return runs.runs_of(session, None)


def move(database: Database, state: RunState) -> None:
    with database.session() as session:
        runs.move(session, runs.runs_of(session, "liver")[0], state)


def test_a_drift_asks_for_a_fine_tuning_and_readers_for_labels(database: Database, policy: LearningPolicy) -> None:
    assert policy.after_drift([drift("liver"), drift("liver")]) == "liver: fine-tuning waiting"
    (run,) = all_runs(database)
    assert (run.base_version, run.requested_by, run.reason) == ("1.0.0", "policy", "drift of noise")
    with database.reading() as session:
        (task,) = session.scalars(select(ReviewTask)).all()
    assert (task.kind, task.model_name) == ("label", "liver")


@pytest.mark.parametrize(
    ("name", "severity"),
    [
        pytest.param("lung", "critical", id="the policy is nothing"),
        pytest.param("spleen", "critical", id="no entry"),
        pytest.param("heart", "critical", id="nothing serves"),
        pytest.param("liver", "none", id="no drift"),
    ],
)
def test_nothing_is_asked_for_otherwise(database: Database, policy: LearningPolicy, name: str, severity: str) -> None:
    assert policy.after_drift([drift(name, severity)]) == ""
    assert all_runs(database) == []


@pytest.mark.parametrize("state", [RunState.WAITING, RunState.TRAINING, RunState.CANDIDATE, RunState.FAILED])
def test_not_while_one_is_under_way_waits_for_a_decision_or_has_failed(
    database: Database, policy: LearningPolicy, state: RunState
) -> None:
    policy.after_drift([drift("liver")])
    move(database, state)
    assert policy.after_drift([drift("liver")]) == ""
    assert len(all_runs(database)) == 1


@pytest.mark.parametrize("state", [RunState.REFUSED, RunState.PROMOTED])
def test_again_once_the_last_one_is_decided(database: Database, policy: LearningPolicy, state: RunState) -> None:
    policy.after_drift([drift("liver")])
    move(database, state)
    assert policy.after_drift([drift("liver")]) == "liver: fine-tuning waiting"


def test_what_waits_is_looked_at_and_goes_on_waiting(database: Database, policy: LearningPolicy) -> None:
    assert policy.look_at_waiting() == "nothing waits for labels"
    policy.after_drift([drift("liver")])
    assert policy.look_at_waiting().startswith("liver: waiting, ")
    assert [run.state for run in all_runs(database)] == [RunState.WAITING]


def test_without_new_labels_nothing_is_trained_anew(database: Database, policy: LearningPolicy) -> None:
    assert policy.retrain_all().startswith("liver: no study of this model was recorded yet")
    assert all_runs(database) == []
