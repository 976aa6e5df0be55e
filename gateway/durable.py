"""DBOS wiring: one system database with our tables, JSON only, a fixed application version, stable executor ids.

Work is enqueued in the transaction that makes it due (`Enqueuer`), so that a state change and its consequence are
one. DBOS keeps its tables in our database: on SQLite in the same file, on PostgreSQL in the schema `dbos`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer, EnqueueOptions, error
from sqlalchemy.orm import Session

from storage.database import Database

# Raised only when the order or the meaning of steps changes; an upgrade then finishes what the old version began.
APPLICATION_VERSION = "seggate-1"
APPLICATION_NAME = "seggate"

# In the order in which they matter: who runs `shadow` stands back while results wait (gateway/learning/shadow.py).
STUDIES, INFERENCE, JOBS, SHADOW, TRAINING = "studies", "inference", "jobs", "shadow", "training"
# Of its own, so that a worker whose places for the others are taken still takes it up (gateway/device_share.py).
URGENT_INFERENCE = "urgent-inference"
# Nobody waits for the second in which they begin, and each look at a queue costs all workers some CPU.
_UNHURRIED, _UNHURRIED_POLL_S = frozenset({JOBS, SHADOW, TRAINING}), 1.0
URGENT, ROUTINE = 1, 100
_ENDED = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
_STATUSES_AT_ONCE = 500


def delivery_queue(destination: str) -> str:
    """The queue of one destination: a destination that is down delays no other."""
    return f"deliver-{destination}"


def next_workflow_id(workflow_id: str) -> str:
    """A workflow id is used once; the same work again has the next suffix: w, w~1, w~2."""
    stem, _, count = workflow_id.rpartition("~")
    return f"{stem}~{int(count) + 1}" if stem and count.isdigit() else f"{workflow_id}~1"


class Stopped(BaseException):
    """This process stops: the workflow is left as it is, for the next start.

    Not an Exception: DBOS would record that as the workflow's own end.
    """


class Execution:
    """The steps and waits of the workflows that run in this process, until `stop`."""

    def __init__(self, *, drain_s: int = 5) -> None:
        """`drain_s`: how long `stop` waits for steps that are at work."""
        self._drain_s = drain_s
        self._stopping = threading.Event()

    def step(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function as a durable step of the current workflow: finished steps are not run again.

        Raises Stopped instead of beginning after `stop`, and where a step that took too long finds DBOS gone.
        """
        if self._stopping.is_set():
            raise Stopped
        try:
            return DBOS.run_step({"name": name}, function, *args)
        except error.DBOSException as gone:
            if self._stopping.is_set():
                raise Stopped from gone
            raise

    def wait(self, seconds: float) -> None:
        """A durable wait: after a restart only the rest of it is waited. Raises Stopped when `stop` ends it."""
        until = self.step("wait", lambda: time.time() + seconds)
        # A clock that was set back does not make it longer.
        if self._stopping.wait(min(seconds, max(0.0, until - time.time()))):
            raise Stopped

    def stop(self) -> None:
        """Take no more work, end all waits; what is left unfinished is recovered at the next start."""
        self._stopping.set()
        DBOS.destroy(workflow_completion_timeout_sec=self._drain_s)


class Enqueuer:
    """Puts a workflow on a queue inside the caller's transaction; the same workflow id twice is once."""

    def __init__(self, database: Database) -> None:
        self._client = DBOSClient(
            system_database_url=_dbos_url(database),
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION_NAME,
        )

    def enqueue(
        self,
        session: Session,
        *,
        queue: str,
        workflow: str,
        workflow_id: str,
        argument: str,
        priority: int = ROUTINE,
        delay_s: float = 0.0,
    ) -> None:
        """`delay_s`: taken from the queue only after so many seconds; it occupies nobody until then."""
        options: EnqueueOptions = {
            "queue_name": queue,
            "workflow_name": workflow,
            "workflow_id": workflow_id,
            "app_version": APPLICATION_VERSION,
            "priority": priority,
        }
        if delay_s > 0:
            options["delay_seconds"] = delay_s
        self._client.enqueue_in_transaction(session, options, argument)

    def ended(self, workflow_ids: Collection[str]) -> dict[str, str]:
        """Which of these workflows will never run again, each with DBOS's word for how it ended."""
        found: dict[str, str] = {}
        ids = sorted(workflow_ids)
        for start in range(0, len(ids), _STATUSES_AT_ONCE):
            rows = self._client.list_workflows(
                workflow_ids=ids[start : start + _STATUSES_AT_ONCE],
                status=list(_ENDED),
                load_input=False,
                load_output=False,
            )
            found.update({row.workflow_id: str(row.status) for row in rows})
        return found

    def forget(self, workflow_ids: Collection[str]) -> None:
        """These workflows never run again, and nothing is left of them; one that runs ends at its next step."""
        ids = sorted(workflow_ids)
        for start in range(0, len(ids), _STATUSES_AT_ONCE):
            some = ids[start : start + _STATUSES_AT_ONCE]
            self._client.cancel_workflows(some)
            self._client.delete_workflows(some)

    def close(self) -> None:
        self._client.destroy()


def prepare(database: Database) -> None:
    """Make or migrate DBOS's tables; call once before several processes start."""
    from dbos import run_dbos_database_migrations

    quiet()
    run_dbos_database_migrations(system_database_url=_dbos_url(database))


def launch(*, queues: Sequence[tuple[str, int]], poll_s: float) -> None:
    """Start executing: recover this executor's own unfinished work, then take from `queues` (name, concurrency).

    `configure` and the registration of workflows come before. One DBOS per process.
    """
    DBOS.listen_queues([name for name, _ in queues])
    DBOS.launch()
    for name, concurrency in queues:
        every_s = max(poll_s, _UNHURRIED_POLL_S) if name in _UNHURRIED else poll_s
        DBOS.register_queue(
            name, worker_concurrency=concurrency, polling_interval_sec=every_s, on_conflict="always_update"
        )


def configure(database: Database, *, executor_id: str) -> None:
    """Make this process's DBOS instance; nothing runs before `launch`."""
    quiet()
    config: DBOSConfig = {
        "name": APPLICATION_NAME,
        "system_database_url": _dbos_url(database),
        "application_version": APPLICATION_VERSION,
        "executor_id": executor_id,
        "serializer": DBOSPortableJSONSerializer(),
        "enable_otlp": False,
        "log_level": "WARNING",
        "notification_listener_polling_interval_sec": 0.5,
    }
    DBOS(config=config)


def recover(executor_id: str) -> int:
    """Re-queue the unfinished workflows of another, dead executor; returns how many."""
    return len(DBOS._recover_pending_workflows([executor_id]))


def quiet() -> None:
    """DBOS logs through its own logger; only warnings are of interest, and never arguments."""
    logging.getLogger("dbos").setLevel(logging.WARNING)


def _dbos_url(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)
