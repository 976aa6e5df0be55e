"""`seggate alarms`: an alarm that somebody has taken on stays open and quiet, and the ledger keeps who and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.metrics import exposition
from gateway.settings import load_settings
from gateway.state import open_spool, prepare_state
from storage import ledger
from storage.alarms import is_quiet, open_alarms, raise_alarm
from storage.database import Database
from storage.records import Alarm, utc_now
from tests.support.config_folder import write_config

SUBJECT = "model:liver 1.0.0"


@pytest.fixture
def alarmed(tmp_path: Path) -> Iterator[tuple[Path, Database]]:
    """One open alarm, with the number 1."""
    config = write_config(tmp_path)
    database = prepare_state(load_settings(config))
    with database.session() as session:
        raise_alarm(session, kind="drift", subject=SUBJECT, message="warn: another scanner")
    yield config, database
    database.close()


def run(config: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["alarms", *words, "--config", str(config)])


def alarm_of(database: Database) -> Alarm:
    with database.reading() as session:
        (alarm,) = open_alarms(session)
    return alarm


@pytest.mark.requirement("ART-20", open="what an alarm starts")
def test_an_acknowledged_alarm_is_open_and_quiet_with_name_and_reason(alarmed: tuple[Path, Database]) -> None:
    config, database = alarmed
    spool = open_spool(load_settings(config))
    assert b'seggate_alarms_open{kind="drift"} 1.0' in exposition(database, spool)
    ran = run(config, "--acknowledge", "1", "--reason", "the new CT of ward 3")
    assert (ran.exit_code, "alarm 1 acknowledged" in ran.output) == (0, True), ran.output
    alarm = alarm_of(database)
    assert is_quiet(alarm, utc_now() + timedelta(days=1000))
    (document,) = json.loads(run(config, "--json").stdout)
    assert (document["seen_reason"], document["quiet_until"]) == ("the new CT of ward 3", None)
    assert document["seen_by"]
    with database.reading() as session:
        (event,) = ledger.events(session, SUBJECT)
    assert (event.kind, event.detail["reason"]) == ("alarm-acknowledged", "the new CT of ward 3")
    assert event.actor == f"user:{document['seen_by']}"
    # Once more is counted; nobody is told again.
    with database.session() as session:
        raise_alarm(session, kind="drift", subject=SUBJECT, message="warn: another scanner")
    assert (alarm_of(database).count, is_quiet(alarm_of(database), utc_now())) == (2, True)
    assert b"seggate_alarms_open{" not in exposition(database, spool)


@pytest.mark.requirement("ART-20", open="what an alarm starts")
def test_a_snoozed_alarm_is_quiet_until_then(alarmed: tuple[Path, Database]) -> None:
    config, database = alarmed
    ran = run(config, "--snooze", "1", "--for", "7d", "--reason", "the service is coming")
    assert (ran.exit_code, "alarm 1 is quiet until" in ran.output) == (0, True), ran.output
    alarm = alarm_of(database)
    assert is_quiet(alarm, utc_now() + timedelta(days=6))
    assert not is_quiet(alarm, utc_now() + timedelta(days=8))
    assert "quiet until" in " ".join(run(config).output.split())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--acknowledge", "1"], 2, "--reason is needed"),
        (["--acknowledge", "1", "--reason", "  "], 2, "--reason is needed"),
        (["--acknowledge", "9", "--reason", "x"], 1, "there is no open alarm 9"),
        (["--snooze", "1", "--for", "soon", "--reason", "x"], 2, "a time like 30m, 12h or 7d is needed"),
        (["--snooze", "1", "--for", "0d", "--reason", "x"], 2, "a time like 30m, 12h or 7d is needed"),
        (["--snooze", "1", "--reason", "x"], 2, "go together"),
        (["--clear", "1", "--acknowledge", "1"], 2, "at a time"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    alarmed: tuple[Path, Database], words: list[str], code: int, said: str
) -> None:
    config, database = alarmed
    ran = run(config, *words)
    assert (ran.exit_code, said in ran.output) == (code, True), ran.output
    alarm = alarm_of(database)
    assert (alarm.seen_at, alarm.quiet_until) == (None, None)
