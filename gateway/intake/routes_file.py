"""The routes file in use: read again when it changes; a broken file never replaces a good one (RTE-25)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import structlog
from sqlalchemy import select

from gateway.intake.routing import keep_rule_set
from gateway.intake.routing_rules import RuleSet, RulesInvalid, parse_rules
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.records import RuleSet as RuleSetRecord
from storage.records import utc_now

ALARM_BROKEN = "routes-file"
ALARM_NO_MODEL = "routes-model"
_SUBJECT = "gateway"
_log = structlog.get_logger(__name__)
_Stamp = tuple[int, int, int]
_RETRY = timedelta(seconds=10)


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """`stamp` is of the file that was looked at last; `fault` is set where it was refused, `absent` where enabled rules
    name models of which no version serves, and `until` in both cases."""

    stamp: _Stamp | None
    rules: RuleSet
    fault: str = ""
    absent: tuple[str, ...] = ()
    until: datetime | None = None  # then the file is read again: what was wrong around it may have been mended


class RoutesFile:
    """Gives the rules in use. Safe to share between threads.

    `serves` says whether a version of a model serves. Rules for other models are taken, because the model may be
    imported later, with a warning in the log and an alarm until it is.
    """

    def __init__(
        self,
        path: Path,
        database: Database,
        *,
        serves: Callable[[str], bool],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._path = path
        self._database = database
        self._serves = serves
        self._clock = clock
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    def current(self) -> RuleSet:
        """The rules of the file, or of the last good one where the file is broken or gone.

        Raises RulesInvalid only where no good one was ever loaded into this database.
        """
        with self._lock:
            stamp, now, known = self._stamp(), self._clock(), self._loaded
            if known is not None and known.stamp == stamp and (known.until is None or now < known.until):
                return known.rules
            try:
                rules = self._read()
            except RulesInvalid as error:
                again = known is not None and known.fault == str(error)
                rules = known.rules if known is not None and again else self._last_good(error)
                self._loaded = _Loaded(stamp=stamp, rules=rules, fault=str(error), until=now + _RETRY)
            else:
                self._accept(rules)
                absent = self._without_model(rules, known.absent if known is not None else ())
                self._loaded = _Loaded(stamp=stamp, rules=rules, absent=absent, until=now + _RETRY if absent else None)
            return rules

    def _stamp(self) -> _Stamp | None:
        """What changes when the file is rewritten or replaced; None where it is not there."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> RuleSet:
        try:
            text = self._path.read_text(encoding="utf-8")
        except OSError as error:
            raise RulesInvalid(f"{self._path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RulesInvalid(f"{self._path}: not UTF-8 text: {error}") from error
        return parse_rules(text, source=str(self._path))

    def _accept(self, rules: RuleSet) -> None:
        """Make the text the newest of the kept ones, so that it is the one to fall back on."""
        with self._database.session() as session:
            newest = session.scalars(_NEWEST).first()
            if newest is None or newest.digest != rules.digest:
                keep_rule_set(session, rules)
                # A text that comes back (a rollback) is the newest again.
                session.get_one(RuleSetRecord, rules.digest).loaded_at = self._clock()
                ledger.append(
                    session,
                    subject=_SUBJECT,
                    kind="routes-loaded",
                    actor="worker",
                    detail={
                        "rule_set": rules.digest,
                        "rules": [r.name for r in rules.rules],
                        "previous": newest.digest if newest else None,
                    },
                )
                _log.info("routes loaded", digest=rules.digest[:12], rules=len(rules.rules))
            clear_alarms(session, kind=ALARM_BROKEN, subject=_SUBJECT, by="worker")

    def _without_model(self, rules: RuleSet, before: tuple[str, ...]) -> tuple[str, ...]:
        """Names of models in enabled rules of which no version serves; alarmed and logged, once for the same names."""
        named = {rule.model for rule in rules.rules if rule.enabled and rule.model is not None}
        absent = tuple(sorted(name for name in named if not self._serves(name)))
        if absent and absent != before:
            message = (
                f"routes name models of which no version serves: {', '.join(absent)}; their series are parked; "
                "import the model with `seggate models import`, or take the rule out"
            )
            with self._database.session() as session:
                raise_alarm(session, kind=ALARM_NO_MODEL, subject=_SUBJECT, message=message)
            _log.warning("routes name models that do not serve", models=list(absent))
        elif not absent:
            with self._database.session() as session:
                clear_alarms(session, kind=ALARM_NO_MODEL, subject=_SUBJECT, by="worker")
        return absent

    def _last_good(self, error: RulesInvalid) -> RuleSet:
        """The rules in use, else the newest kept ones (at start-up); alarmed either way."""
        in_use = self._loaded.rules if self._loaded is not None else None
        with self._database.session() as session:
            if in_use is None:
                newest = session.scalars(_NEWEST).first()
                in_use = self._parsed(newest) if newest is not None else None
            consequence = f"rule set {in_use.digest[:12]} stays in use" if in_use else "nothing can be routed"
            raise_alarm(
                session, kind=ALARM_BROKEN, subject=_SUBJECT, message=f"routes file refused, {consequence}: {error}"
            )
        _log.error("routes file refused", consequence=consequence, faults=str(error).splitlines()[:20])
        if in_use is None:
            raise error
        return in_use

    def _parsed(self, record: RuleSetRecord) -> RuleSet:
        """A kept text, which was valid once."""
        return parse_rules(record.text, source=f"rule set {record.digest[:12]}")


_NEWEST = select(RuleSetRecord).order_by(RuleSetRecord.loaded_at.desc(), RuleSetRecord.digest).limit(1)
