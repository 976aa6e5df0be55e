"""Keeps the HTTP server running beside the other roles of its process: what stops it stops nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
import uvicorn

from gateway.settings import SettingsInvalid
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.errors import DatabaseAway

ALARM = "web-down"
_SUBJECT = "gateway"
_log = structlog.get_logger(__name__)


class WebServer:
    """Runs the server that `make` gives in a thread; `tend` starts it, and again where it ended.

    A port that is taken, a certificate or a token that cannot be read is alarmed once, and tried again every
    `retry_s`. Used by one thread.
    """

    def __init__(
        self, make: Callable[[], uvicorn.Server], database: Database, *, where: str, retry_s: float = 5.0
    ) -> None:
        self._make = make
        self._database = database
        self._where = where
        self._retry_s = retry_s
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._again_at = 0.0
        self._failure = ""  # set by the server's thread
        self._told: str | None = None  # what the alarm says; empty: there is none; None: not known yet

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and bool(self._server and self._server.started)

    def tend(self) -> None:
        """Start the server where it does not run; call this every second or so."""
        if self._thread is not None and self._thread.is_alive():
            if self.is_running:
                self._tell("")
            return
        if self._thread is not None:
            self._thread = None
            self._again_at = time.monotonic() + self._retry_s
            self._tell(self._failure)
        if time.monotonic() < self._again_at:
            return
        try:
            self._server = self._make()
        except (SettingsInvalid, OSError) as error:
            self._again_at = time.monotonic() + self._retry_s
            self._tell(str(error))
            return
        self._thread = threading.Thread(target=self._run, args=(self._server,), name="web", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self, server: uvicorn.Server) -> None:
        self._failure = "it ended"
        try:
            server.run()
        except SystemExit:  # uvicorn's way to say that it could not listen; it logs the system's word for it
            self._failure = "it cannot listen there; is the port taken?"
        except OSError as error:
            self._failure = f"certificate or key cannot be used: {error}"

    def _tell(self, failure: str) -> None:
        if failure == self._told:
            return
        message = f"no health checks and metrics at {self._where}: {failure}; tried again until it works"
        try:
            with self._database.session() as session:
                if failure:
                    raise_alarm(session, kind=ALARM, subject=_SUBJECT, message=message)
                else:
                    clear_alarms(session, kind=ALARM, subject=_SUBJECT, by="web")
        except DatabaseAway as error:
            _log.warning("an alarm waits for the database", kind=ALARM, error=str(error))
            return
        self._told = failure
