"""gateway.monitoring: facts of studies in the database, their reference and window, alarms, and `seggate drift`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.monitoring.drift_window import served_versions
from gateway.settings import load_settings
from gateway.state import prepare_state
from storage.alarms import open_alarms
from storage.database import Database
from tests.support.config_folder import write_config
from tests.support.drift_studies import add_studies, check, prepared, serve


@pytest.mark.requirement("ART-20", open="acknowledging and snoozing alarms, and the fine-tuning that they start")
def test_a_changed_scanner_raises_an_alarm_that_names_stream_and_studies_and_ends_when_it_ends(
    database: Database, tmp_path: Path
) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 80, days_ago=60)
        add_studies(session, 20, start=80, days_ago=50)  # before the window
        add_studies(session, 35, start=100)
    (quiet,) = check(database, tmp_path)
    assert (quiet.report.severity, quiet.report.reference, quiet.report.window) == ("none", 80, 35)
    with database.session() as session:
        add_studies(session, 40, start=200, days_ago=0.5, manufacturer="Other")
    everything, *scanners = check(database, tmp_path)
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
    assert check(database, tmp_path)[0].report.severity == "none"
    with database.reading() as session:
        assert open_alarms(session) == []


def test_a_version_that_was_promoted_starts_with_a_reference_of_its_own(database: Database, tmp_path: Path) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 120, days_ago=3)
        add_studies(session, 50, start=200, days_ago=1, version="1.1.0", volume_ml=9.0)
    with database.reading() as session:
        assert served_versions(session) == [("tiny", "1.1.0")]
    (found,) = check(database, tmp_path)
    assert found.model_version == "1.1.0"
    assert found.report.too_few == "50 studies in the reference, 60 are needed"


def test_a_version_that_serves_and_has_seen_nothing_yet_is_asked_for_instead_of_the_one_before(
    database: Database, tmp_path: Path
) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 120, days_ago=3)
        serve(session, "1.1.0")
    (found,) = check(database, tmp_path)
    assert found.model_version == "1.1.0"
    assert found.report.too_few == "0 studies in the reference, 60 are needed"


def test_studies_that_were_not_judged_yet_do_not_count_and_few_are_an_answer(
    database: Database, tmp_path: Path
) -> None:
    with database.session() as session:
        prepared(session)
        add_studies(session, 90)
        add_studies(session, 60, start=90, verdict=None)
    (found,) = check(database, tmp_path)
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
