"""`seggate alarms`."""

from __future__ import annotations

import getpass
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from gateway.commands.output import local, print_json, say, table
from gateway.settings import load_settings
from gateway.state import existing_database
from storage import ledger
from storage.alarms import is_quiet, open_alarms, take_on
from storage.records import Alarm, utc_now

_TIME = re.compile(r"([0-9]{1,4})([mhd])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_FIELDS = (
    "alarm_id",
    "kind",
    "subject",
    "message",
    "count",
    "raised_at",
    "last_at",
    "seen_at",
    "seen_by",
    "seen_reason",
    "quiet_until",
)


def alarms(config: Path, *, clear: int | None, as_json: bool) -> int:
    """List the open alarms, or clear one; who cleared it is kept in the ledger."""
    database = existing_database(load_settings(config))
    if clear is not None:
        with database.session() as session:
            alarm = _open(session, clear)
            if alarm is None:
                return 1
            alarm.cleared_at, alarm.cleared_by = utc_now(), getpass.getuser()
            _record(session, alarm, "alarm-cleared", {})
        say(f"alarm {clear} cleared")
        return 0
    with database.reading() as session:
        found = open_alarms(session)
    if as_json:
        print_json([{f: getattr(a, f) for f in _FIELDS} for a in found])
    elif not found:
        say("no open alarms")
    else:
        now = utc_now()
        rows = [
            (a.alarm_id, a.kind, a.subject, a.message, a.count, local(a.last_at), _seen(a) if is_quiet(a, now) else "")
            for a in found
        ]
        table("", ("no.", "kind", "subject", "what", "times", "last", "seen"), rows)
    return 0


def take_on_alarm(config: Path, number: int, *, reason: str | None, quiet_for: str | None) -> int:
    """Acknowledge an open alarm, or snooze it for a time such as 7d, 12h or 30m. 0 when done, 1 when there is no such
    open alarm, 2 without a reason or with a time that is none."""
    if not reason or not reason.strip():
        say("seggate: --reason is needed: why nobody needs to be told again")
        return 2
    until = None
    if quiet_for is not None:
        found = _TIME.fullmatch(quiet_for)
        if found is None or not int(found[1]):
            say(f"seggate: --for {quiet_for[:20]!r}: a time like 30m, 12h or 7d is needed")
            return 2
        until = utc_now() + timedelta(**{_UNITS[found[2]]: int(found[1])})
    with existing_database(load_settings(config)).session() as session:
        alarm = _open(session, number)
        if alarm is None:
            return 1
        take_on(session, alarm, by=getpass.getuser(), reason=reason.strip(), until=until)
        kind = "alarm-acknowledged" if until is None else "alarm-snoozed"
        detail = {"reason": reason.strip()} if until is None else {"reason": reason.strip(), "until": until.isoformat()}
        _record(session, alarm, kind, detail)
    say(f"alarm {number} {'acknowledged' if until is None else f'is quiet until {local(until)}'}")
    return 0


def _open(session: Session, number: int) -> Alarm | None:
    alarm = session.get(Alarm, number)
    if alarm is None or alarm.cleared_at is not None:
        say(f"seggate: there is no open alarm {number}")
        return None
    return alarm


def _record(session: Session, alarm: Alarm, kind: str, detail: dict[str, Any]) -> None:
    ledger.append(
        session,
        subject=alarm.subject,
        kind=kind,
        actor=f"user:{getpass.getuser()}",
        detail={"alarm": alarm.kind, "message": alarm.message, "count": alarm.count, **detail},
    )


def _seen(alarm: Alarm) -> str:
    until = "" if alarm.quiet_until is None else f", quiet until {local(alarm.quiet_until)}"
    return f"{alarm.seen_by}: {alarm.seen_reason}{until}"
