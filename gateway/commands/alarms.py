"""`seggate alarms`."""

from __future__ import annotations

import getpass
from pathlib import Path

from gateway.commands.output import local, print_json, say, table
from gateway.settings import load_settings
from gateway.state import existing_database
from storage import ledger
from storage.alarms import open_alarms
from storage.records import Alarm, utc_now


def alarms(config: Path, *, clear: int | None, as_json: bool) -> int:
    """List the open alarms, or clear one; who cleared it is kept in the ledger."""
    database = existing_database(load_settings(config))
    if clear is not None:
        with database.session() as session:
            alarm = session.get(Alarm, clear)
            if alarm is None or alarm.cleared_at is not None:
                say(f"seggate: there is no open alarm {clear}")
                return 1
            alarm.cleared_at, alarm.cleared_by = utc_now(), getpass.getuser()
            ledger.append(
                session,
                subject=alarm.subject,
                kind="alarm-cleared",
                actor=f"user:{getpass.getuser()}",
                detail={"alarm": alarm.kind, "message": alarm.message, "count": alarm.count},
            )
        say(f"alarm {clear} cleared")
        return 0
    with database.reading() as session:
        found = open_alarms(session)
    if as_json:
        fields = ("alarm_id", "kind", "subject", "message", "count", "raised_at", "last_at")
        print_json([{f: getattr(a, f) for f in fields} for a in found])
    elif not found:
        say("no open alarms")
    else:
        rows = [(a.alarm_id, a.kind, a.subject, a.message, a.count, local(a.last_at)) for a in found]
        table("", ("no.", "kind", "subject", "what", "times", "last"), rows)
    return 0
