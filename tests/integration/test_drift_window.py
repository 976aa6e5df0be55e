"""gateway.monitoring: facts of studies in the database, their reference and window, alarms, and `seggate drift`."""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from gateway.cli import app
from gateway.monitoring.drift_window import check_served_models, served_versions
from gateway.settings import DriftSettings, load_settings
from gateway.state import prepare_state
from storage.alarms import open_alarms
from storage.database import Database
from storage.records import ResultState, StudyFacts, StudyState, utc_now
from tests.support.config_folder import write_config
from tests.support.story_rows import add_result, add_study, add_version

SETTINGS = DriftSettings(reference_studies=80, window_days=30)
NOW = utc_now()


def add_studies(
    session: Session,
    count: int,
    *,
    start: int = 0,
    days_ago: float = 1.0,
    manufacturer: str = "ACME",
    volume_ml: float = 3.0,
    version: str = "1.0.0",
    verdict: str | None = "pass",
) -> None:
    """Studies of one site, one minute apart, that end so many days ago."""
    random = np.random.default_rng(start + 1)
    for index in range(start, start + count):
        result = add_result(
            session,
            ResultState.RELEASED,
            result_id=f"r{index}",
            verdict=verdict,
            measurements=[
                {
                    "name": "Anterior",
                    "voxels": 900,
                    "volume_ml": volume_ml * float(random.lognormal(0, 0.1)),
                    "confidence": float(random.normal(0.95, 0.01)),
                    "components": 1,
                    "fold_dice": None,
                    "mirror_dice": 0.97,
                    "border_entropy": 0.4,
                }
            ],
            runtime={"mean_confidence": 0.95},
        )
        result.model_version = version
        middle = 30 + 1.5 * math.sin(index)
        shares = np.exp(-((np.arange(64) - middle) ** 2) / 50)
        histogram = [round(float(share), 6) for share in shares]
        channel = {"whole": histogram, "foreground": None, "percentiles": [0, 1, 2], "noise": 0.02}
        session.add(
            StudyFacts(
                result_id=result.result_id,
                model_name=result.model_name,
                model_version=version,
                scanner=f"{manufacturer} One",
                recorded_at=NOW - timedelta(days=days_ago) + timedelta(seconds=index),
                acquisition={
                    "categories": {"manufacturer": manufacturer},
                    "numbers": {"slices": float(random.integers(30, 40))},
                },
                image={
                    "channels": [channel],
                    "spacing_mm": [1.0, 1.0, 1.0],
                    "size": [9, 17, 17],
                    "volumes_ml": [3.0],
                    "foreground_share": 0.2,
                },
            )
        )
    session.flush()


def prepared(session: Session) -> None:
    add_study(session, StudyState.VERIFIED)
    add_version(session)


def check(database: Database, *, now: datetime = NOW, settings: DriftSettings = SETTINGS) -> Any:
    return check_served_models(database, settings, now=now)


@pytest.mark.requirement("ART-20", open="acknowledging and snoozing alarms, and what they start")
def test_a_changed_scanner_raises_an_alarm_that_names_stream_and_studies_and_ends_when_it_ends(
    database: Database,
) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 80, days_ago=60)
        add_studies(session, 20, start=80, days_ago=50)  # before the window
        add_studies(session, 35, start=100)
    (quiet,) = check(database)
    assert (quiet.report.severity, quiet.report.reference, quiet.report.window) == ("none", 80, 35)
    with database.session() as session:
        add_studies(session, 40, start=200, days_ago=0.5, manufacturer="Other")
    everything, *scanners = check(database)
    assert (everything.report.severity, everything.report.window) == ("critical", 40)
    assert [finding.name for finding in everything.report.drifted] == ["manufacturer"]
    assert set(everything.examples["manufacturer"]) <= {f"r{index}" for index in range(200, 240)}
    # Each scanner for itself is what it was, or too young for an answer.
    assert {one.scanner for one in scanners} <= {"ACME One"}
    assert all(one.report.severity == "none" for one in scanners)
    with database.reading() as session:
        (alarm,) = open_alarms(session)
    assert (alarm.kind, alarm.subject) == ("drift", "model:tiny 1.0.0")
    assert alarm.message.startswith("critical: the last 40 studies differ from the first 80 in manufacturer (critical")
    with database.session() as session:
        add_studies(session, 40, start=300, days_ago=0.2)
    assert check(database)[0].report.severity == "none"
    with database.reading() as session:
        assert open_alarms(session) == []


def test_a_version_that_was_promoted_starts_with_a_reference_of_its_own(database: Database) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 120, days_ago=3)
        add_studies(session, 50, start=200, days_ago=1, version="1.1.0", volume_ml=9.0)
    with database.reading() as session:
        assert served_versions(session) == [("tiny", "1.1.0")]
    (found,) = check(database)
    assert found.model_version == "1.1.0"
    assert found.report.too_few == "50 studies in the reference, 60 are needed"


def test_studies_that_were_not_judged_yet_do_not_count_and_few_are_an_answer(database: Database) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 90)
        add_studies(session, 60, start=90, verdict=None)
    (found,) = check(database)
    assert found.report.too_few == "10 studies since, 30 are needed"
    with database.reading() as session:
        assert open_alarms(session) == []


def test_the_command_says_what_has_drifted_and_exits_with_1(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    database = prepare_state(load_settings(config))
    runner = CliRunner()
    ran = runner.invoke(app, ["drift", "--config", str(config)])
    assert (ran.exit_code, "no study was recorded yet" in ran.output) == (0, True)
    with database.session() as session:
        prepared(session)
        add_studies(session, 200, days_ago=20)
    ran = runner.invoke(app, ["drift", "--config", str(config)])
    assert (ran.exit_code, "too few studies (0 studies since, 30 are needed)" in ran.output) == (0, True), ran.output
    with database.session() as session:
        add_studies(session, 60, start=300, volume_ml=6.0)
    ran = runner.invoke(app, ["drift", "tiny", "--json", "--config", str(config)])
    assert ran.exit_code == 1
    (document,) = json.loads(ran.stdout)
    assert (document["severity"], document["window"], document["scanner"]) == ("critical", 60, None)
    first = document["findings"][0]
    assert (first["name"], first["severity"], len(first["examples"])) == ("volume-ml Anterior", "critical", 3)
    with database.reading() as session:
        assert open_alarms(session) == []
    ran = runner.invoke(app, ["drift", "--alarms", "--config", str(config)])
    assert (ran.exit_code, "volume-ml Anterior" in ran.output) == (1, True), ran.output
    with database.reading() as session:
        assert len(open_alarms(session)) == 1
    ran = runner.invoke(app, ["drift", "nobody", "--config", str(config)])
    assert (ran.exit_code, "no study was recorded for a model 'nobody'; there are tiny" in ran.output) == (1, True)
