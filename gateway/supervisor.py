"""`seggate serve`: one process per group of roles, restarted when it dies, ended when it is stuck.

The supervisor does no work itself. It starts the processes, restarts one that died (with a growing delay when it
dies at once), kills one whose inference is past its deadline (its workflow is then recovered), and on SIGTERM or
SIGINT passes the signal on and waits for them. A process that cannot start because another gateway or program is in its
place ends everything: waiting would not help, and two gateways on one state must not be.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import select

from gateway.role import CANNOT_START
from gateway.stop_signal import set_on_stop_signals
from storage.database import Database
from storage.errors import DatabaseAway
from storage.records import Executor, utc_now

_log = structlog.get_logger(__name__)

RECEIVER, INDEXER, WORKER, SERVICES = "receiver", "indexer", "worker", "services"
# Role asked for on the command line -> the processes that do it.
PROCESSES: Mapping[str, tuple[str, ...]] = {
    "receiver": (RECEIVER, INDEXER),
    "worker": (WORKER,),
    "delivery": (SERVICES,),
    "scheduler": (SERVICES,),
    "web": (SERVICES,),
}
_LONGEST_DELAY_S = 30.0
_STEADY_S = 20.0


@dataclass
class _Child:
    group: str
    roles: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    delay_s: float = 0.0
    lives: int = 0


class Supervisor:
    """Runs the processes of the given roles until told to stop."""

    def __init__(
        self,
        config: Path,
        roles: Sequence[str],
        *,
        database: Database,
        drain_s: float,
        check_s: float = 0.5,
        entry: str = "gateway.role",
    ) -> None:
        """`entry` is the module that each process runs, with a group of roles as its first argument."""
        groups: dict[str, list[str]] = {}
        for role in roles:
            for group in PROCESSES[role]:
                groups.setdefault(group, []).append(role)
        self._children = [_Child(group=g, roles=tuple(r)) for g, r in groups.items()]
        self._config = config
        self._database = database
        self._drain_s = drain_s
        self._check_s = check_s
        self._entry = entry
        self._stop = threading.Event()
        self._unstartable = ""

    def run(self) -> int:
        """Start everything and stay until SIGTERM or SIGINT; returns 0 after a clean stop.

        1 when a process could not start because its place is taken (it said so itself), after ending the others.
        """
        set_on_stop_signals(self._stop)
        for child in self._children:
            self._start(child)
        last_deadline_check = 0.0
        while not self._stop.wait(self._check_s):
            for child in self._children:
                self._tend(child)
            if self._unstartable:
                _log.error("the gateway ends: a process cannot start, as it says above", process=self._unstartable)
                self._end_all()
                return 1
            if time.monotonic() - last_deadline_check > 2.0:
                last_deadline_check = time.monotonic()
                self._end_stuck()
        return self._end_all()

    def _start(self, child: _Child) -> None:
        command = [sys.executable, "-m", self._entry, child.group, "--config", str(self._config)]
        command += ["--roles", ",".join(child.roles), "--parent", str(os.getpid())]
        # A new session: Ctrl-C in a terminal reaches only the supervisor, which stops its children in order.
        child.process = subprocess.Popen(command, start_new_session=True)
        child.started_at = time.monotonic()
        child.lives += 1
        _log.info("started", process=child.group, pid=child.process.pid)

    def _tend(self, child: _Child) -> None:
        if child.process is None:
            if time.monotonic() >= child.started_at + child.delay_s:
                self._start(child)
            return
        code = child.process.poll()
        if code is None:
            if child.delay_s and time.monotonic() - child.started_at > _STEADY_S:
                child.delay_s = 0.0
            return
        if code == CANNOT_START and child.lives == 1:
            self._unstartable = child.group
            return
        lived_s = time.monotonic() - child.started_at
        child.delay_s = 0.0 if lived_s > _STEADY_S else min(_LONGEST_DELAY_S, max(0.5, child.delay_s * 2))
        _log.error("process ended; restarting", process=child.group, code=code, delay_s=child.delay_s)
        child.process = None
        child.started_at = time.monotonic()

    def _end_stuck(self) -> None:
        """SIGKILL for a child whose announced work is past its deadline; recovery runs the work again (QUE-28)."""
        pids = {c.process.pid for c in self._children if c.process is not None}
        try:
            with self._database.reading() as session:
                stuck = session.scalars(
                    select(Executor).where(
                        # Other hosts write here as well, and their process ids mean nothing on this one.
                        Executor.host == socket.gethostname(),
                        Executor.pid.in_(pids),
                        Executor.stopped_at.is_(None),
                        Executor.deadline_at < utc_now(),
                    )
                ).all()
        except DatabaseAway:
            return
        for row in stuck:
            for child in self._children:
                if child.process is not None and child.process.pid == row.pid and child.process.poll() is None:
                    _log.error("work is past its deadline; ending the process", process=child.group, work=row.busy_with)
                    child.process.kill()

    def _end_all(self) -> int:
        # Receivers first: what they have acknowledged the others can finish or leave for the next start.
        for child in self._children:
            if child.process is not None and child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + self._drain_s
        for child in self._children:
            if child.process is None:
                continue
            try:
                child.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning("process did not stop in time; ending it", process=child.group)
                child.process.kill()
                child.process.wait()
        return 0
