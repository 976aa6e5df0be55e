"""Alarms: counted while they are open, and in the log once."""

from __future__ import annotations

from pathlib import Path

from structlog.testing import capture_logs

from storage.alarms import clear_alarms, open_alarms, raise_alarm
from storage.database import Database

_PARKED = {"kind": "parked", "subject": "study:1.2.3"}


def test_a_new_alarm_is_one_line_in_the_log_and_its_repeats_are_counted(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    with capture_logs() as logs:
        for words in ("no answer", "still no answer"):
            with database.session() as session:
                raise_alarm(session, **_PARKED, message=words)
    assert logs == [{"event": "alarm raised", "log_level": "warning", **_PARKED}]
    with database.session() as session:
        assert [(a.message, a.count) for a in open_alarms(session)] == [("still no answer", 2)]
        clear_alarms(session, **_PARKED, by="operator")
    with capture_logs() as logs, database.session() as session:
        raise_alarm(session, **_PARKED, message="again")
    assert [entry["event"] for entry in logs] == ["alarm raised"]
    database.close()
