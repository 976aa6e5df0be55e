"""Heartbeats of executors, and the takeover of a dead one's work by a live one (QUE-28).

DBOS recovers an executor's work when that executor starts again. For one that never does, a live executor of the
same role calls recovery for it. Doing that to a living executor would run a step twice; steps are idempotent, and
the takeover time is several beats long.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

import structlog
from sqlalchemy import delete, select, update

from storage import ledger
from storage.alarms import raise_alarm
from storage.database import Database
from storage.errors import DatabaseAway
from storage.records import Executor, utc_now

_log = structlog.get_logger(__name__)
_FORGOTTEN_AFTER = timedelta(days=7)
ALARM_CLOCK = "clock-ahead"


def executor_id(role: str) -> str:
    """Stable per role and host, so that a restart finds its own work (SEGGATE_EXECUTOR names several on one host)."""
    suffix = os.environ.get("SEGGATE_EXECUTOR", "")
    return f"{role}@{socket.gethostname()}{'.' + suffix if suffix else ''}"


class Heartbeat:
    """Beats for this process in a thread, and looks for dead executors of the same role."""

    def __init__(
        self, database: Database, *, role: str, beat_s: float, takeover_s: float, recover: Callable[[str], int]
    ) -> None:
        self.executor_id = executor_id(role)
        self._database = database
        self._role = role
        self._beat_s = beat_s
        self._takeover_s = takeover_s
        self._recover = recover
        self._takes_over = False
        self._lock = threading.Lock()
        self._works: dict[str, datetime] = {}  # what this process is busy with, and until when at most
        self._ahead: dict[str, tuple[datetime, float]] = {}  # executor -> its beat in the future, and since when seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the first beat, then go on in the background."""
        now = utc_now()
        with self._database.session() as session:
            row = session.get(Executor, self.executor_id)
            if row is None:
                row = Executor(executor_id=self.executor_id, role=self._role)
                session.add(row)
            row.host, row.pid = socket.gethostname(), os.getpid()
            row.started_at = row.beat_at = now
            row.busy_with = row.deadline_at = row.stopped_at = None
        self._thread.start()

    def take_over(self) -> None:
        """From now on the work of dead executors is recovered; call once work can be executed here."""
        self._takes_over = True

    def stop(self) -> None:
        """Say goodbye: what is unfinished may be taken over after the takeover time."""
        self._stop.set()
        self._thread.join(timeout=self._beat_s + 5)
        try:
            with self._database.session() as session:
                session.execute(
                    update(Executor)
                    .where(Executor.executor_id == self.executor_id, Executor.pid == os.getpid())
                    .values(stopped_at=utc_now(), busy_with=None, deadline_at=None)
                )
        except DatabaseAway as error:
            _log.warning("stopped without a goodbye; counts as dead after the takeover time", error=str(error))

    def busy(self, work: str, deadline_s: float) -> None:
        """Announce work that the supervisor must end when it takes longer than `deadline_s`; raises DatabaseAway.

        Several works may go on at a time; the supervisor sees the one whose deadline is nearest.
        """
        with self._lock:
            self._works[work] = utc_now() + timedelta(seconds=deadline_s)
        try:
            self.beat()
        except DatabaseAway:
            self._forget(work)
            raise

    def idle(self, work: str) -> None:
        """The announced work is done. While the database is away the next beat says so."""
        self._forget(work)
        try:
            self.beat()
        except DatabaseAway as error:
            _log.warning("heartbeat missed", error=str(error))

    def _forget(self, work: str) -> None:
        with self._lock:
            self._works.pop(work, None)

    def _run(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                self.beat()
                if self._takes_over:
                    self.take_over_dead()
            except DatabaseAway as error:
                _log.warning("heartbeat missed", error=str(error))
            except Exception:  # noqa: BLE001 - the edge: without beats a living worker would count as dead
                _log.exception("heartbeat failed; goes on with the next one")

    def beat(self) -> None:
        """Write that this process lives and what it is busy with."""
        with self._lock:
            nearest = min(self._works.items(), key=lambda item: item[1], default=(None, None))
            with self._database.session() as session:
                session.execute(
                    update(Executor)
                    .where(Executor.executor_id == self.executor_id)
                    .values(beat_at=utc_now(), busy_with=nearest[0], deadline_at=nearest[1])
                )

    def take_over_dead(self) -> list[str]:
        """Recover the work of executors of this role that are silent for longer than the takeover time."""
        now = utc_now()
        limit = timedelta(seconds=self._takeover_s)
        with self._database.reading() as session:
            beats = {
                name: beat_at
                for name, beat_at in session.execute(
                    select(Executor.executor_id, Executor.beat_at).where(
                        Executor.role == self._role, Executor.executor_id != self.executor_id
                    )
                )
            }
        ahead = {name: beat_at for name, beat_at in beats.items() if beat_at > now + limit}
        dead = [name for name, beat_at in beats.items() if beat_at < now - limit] + self._stopped_ahead(ahead, now)
        forgotten = {name for name, beat_at in beats.items() if beat_at < now - _FORGOTTEN_AFTER}
        taken = []
        for name in dead:
            recovered = self._recover(name)
            if recovered:
                taken.append(name)
                _log.warning("took over a dead executor's work", executor=name, workflows=recovered)
                with self._database.session() as session:
                    ledger.append(
                        session,
                        subject="gateway",
                        kind="takeover",
                        actor=self.executor_id,
                        detail={"dead": name, "workflows": recovered},
                    )
            elif name in forgotten:
                # Containers bring a new name with every start; what has no work left is dropped some day.
                with self._database.session() as session:
                    session.execute(delete(Executor).where(Executor.executor_id == name))
        return taken

    def _stopped_ahead(self, ahead: Mapping[str, datetime], now: datetime) -> list[str]:
        """Which of the executors whose last beat lies in the future have not beaten again for the takeover time.

        Their clock, or this host's, was wrong then or is wrong now. Until the time of the beat has come only waiting
        for the next one tells a dead executor from a living one with another time.
        """
        seen, self._ahead = self._ahead, {}
        for name, beat_at in ahead.items():
            before = seen.get(name)
            self._ahead[name] = before if before and before[0] == beat_at else (beat_at, time.monotonic())
            if before is None:
                with self._database.session() as session:
                    raise_alarm(
                        session,
                        kind=ALARM_CLOCK,
                        subject=f"executor:{name}",
                        message=f"the last beat of {name} lies {beat_at - now} ahead of the clock of "
                        f"{self.executor_id}; look at the clocks of both hosts (NTP)",
                    )
        return [name for name, (_, since) in self._ahead.items() if time.monotonic() - since > self._takeover_s]
