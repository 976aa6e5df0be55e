"""The supervisor: restarts what dies, ends what is stuck, stops in order. Its processes are small scripts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from gateway.role import CANNOT_START
from gateway.supervisor import PROCESSES
from storage.database import Database
from storage.records import Executor, utc_now
from tests.support.peers import ROOT
from tests.support.waiting import wait_until

# Runs a supervisor whose processes are `entry.py` of the same folder.
_SUPERVISOR = """
    import sys
    from pathlib import Path
    from gateway.supervisor import Supervisor
    from storage.database import Database
    folder = Path(sys.argv[1])
    database = Database(f"sqlite:///{folder / 'test.sqlite'}")
    sys.exit(Supervisor(folder, sys.argv[2].split(","), database=database, drain_s=float(sys.argv[3]), check_s=0.05,
                        entry="entry").run())
"""
# A process that notes its start and waits; a file named `die-<group>` makes it end at its start, with the code in it.
_ENTRY = """
    import os, signal, sys, time
    from pathlib import Path
    group, folder = sys.argv[1], Path(sys.argv[3])
    roles = sys.argv[sys.argv.index("--roles") + 1]
    if os.environ.get("STUBBORN") == group:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with (folder / f"lives-{group}").open("a") as lives:
        lives.write(f"{os.getpid()} {roles}\\n")
    if (folder / f"die-{group}").exists():
        sys.exit(int((folder / f"die-{group}").read_text()))
    while True:
        time.sleep(0.05)
"""


class Supervised:
    """A supervisor in a process of its own, and what its children noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = Database(f"sqlite:///{folder / 'test.sqlite'}")
        self.database.create_all()
        (folder / "supervise.py").write_text(textwrap.dedent(_SUPERVISOR))
        (folder / "entry.py").write_text(textwrap.dedent(_ENTRY))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, roles: str, *, drain_s: float = 20.0, stubborn: str = "") -> None:
        environment = {**os.environ, "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}", "STUBBORN": stubborn}
        self.process = subprocess.Popen(
            [sys.executable, str(self.folder / "supervise.py"), str(self.folder), roles, str(drain_s)], env=environment
        )

    def lives(self, group: str) -> list[tuple[int, str]]:
        """(process id, roles) of every life of a group, oldest first."""
        try:
            lines = (self.folder / f"lives-{group}").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(int(pid), roles) for pid, roles in (line.split(" ") for line in lines)]

    def wait_for_life(self, group: str, number: int) -> int:
        wait_until(lambda: len(self.lives(group)) >= number, f"{group} lives for the {number}. time")
        return self.lives(group)[number - 1][0]

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    supervised = Supervised(tmp_path)
    yield supervised
    if supervised.process is not None and supervised.process.poll() is None:
        supervised.process.kill()
        supervised.process.wait()
    supervised.database.close()


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_every_role_has_its_process_and_delivery_scheduler_and_web_share_one() -> None:
    assert set(PROCESSES) == {"receiver", "worker", "delivery", "scheduler", "web"}
    assert {group for role in ("delivery", "scheduler", "web") for group in PROCESSES[role]} == {"services"}
    assert PROCESSES["receiver"] == ("receiver", "indexer")


def test_roles_of_one_group_run_in_one_process_and_all_end_at_sigterm(supervised: Supervised) -> None:
    supervised.start("receiver,delivery,web")
    pids = [supervised.wait_for_life(group, 1) for group in ("receiver", "indexer", "services")]
    assert supervised.lives("services") == [(pids[2], "delivery,web")]
    assert supervised.stop() == 0
    assert all(_gone(pid) for pid in pids)


def test_a_process_that_dies_is_started_again(supervised: Supervised) -> None:
    supervised.start("worker")
    first = supervised.wait_for_life("worker", 1)
    os.kill(first, signal.SIGKILL)
    second = supervised.wait_for_life("worker", 2)
    assert second != first
    assert supervised.stop() == 0


def test_a_process_that_dies_at_once_is_started_again_with_growing_pauses(supervised: Supervised) -> None:
    (supervised.folder / "die-worker").write_text("3")
    began = utc_now()
    supervised.start("worker,receiver")
    receiver = supervised.wait_for_life("receiver", 1)
    supervised.wait_for_life("worker", 4)
    assert (utc_now() - began).total_seconds() >= 0.5 + 1.0 + 2.0
    assert not _gone(receiver)
    assert len(supervised.lives("receiver")) == 1
    assert supervised.stop() == 0


def test_a_process_whose_place_is_taken_at_the_first_start_ends_the_gateway(supervised: Supervised) -> None:
    (supervised.folder / "die-worker").write_text(str(CANNOT_START))
    supervised.start("receiver,worker")
    assert supervised.process is not None
    assert supervised.process.wait(timeout=60) == 1
    assert len(supervised.lives("worker")) == 1
    assert all(_gone(pid) for group in ("receiver", "indexer") for pid, _ in supervised.lives(group))


def test_a_process_whose_place_is_taken_later_is_started_again(supervised: Supervised) -> None:
    supervised.start("worker")
    first = supervised.wait_for_life("worker", 1)
    (supervised.folder / "die-worker").write_text(str(CANNOT_START))
    os.kill(first, signal.SIGKILL)
    supervised.wait_for_life("worker", 3)
    assert supervised.stop() == 0


def _busy(supervised: Supervised, pid: int, deadline_at: datetime, *, host: str = "", name: str = "e") -> None:
    now = utc_now()
    with supervised.database.session() as session:
        session.add(
            Executor(
                executor_id=name,
                role="worker",
                host=host or socket.gethostname(),
                pid=pid,
                started_at=now,
                beat_at=now,
                busy_with="r1",
                deadline_at=deadline_at,
            )
        )


@pytest.mark.requirement("QUE-28", open="hung driver calls on a real GPU")
def test_a_process_whose_work_is_past_its_deadline_is_ended_and_started_again(supervised: Supervised) -> None:
    supervised.start("worker")
    first = supervised.wait_for_life("worker", 1)
    _busy(supervised, first, utc_now() - timedelta(seconds=1))
    wait_until(partial(_gone, first), "the stuck process is ended")
    supervised.wait_for_life("worker", 2)
    assert supervised.stop() == 0


def test_deadlines_of_other_hosts_and_deadlines_to_come_end_nothing(supervised: Supervised) -> None:
    supervised.start("worker,receiver")
    worker = supervised.wait_for_life("worker", 1)
    receiver = supervised.wait_for_life("receiver", 1)
    _busy(supervised, worker, utc_now() - timedelta(seconds=1), host="another-host", name="elsewhere")
    _busy(supervised, worker, utc_now() + timedelta(hours=1), name="here")
    # The next look at the deadlines is over when a process that is stuck indeed has been ended.
    _busy(supervised, receiver, utc_now() - timedelta(seconds=1), name="stuck")
    wait_until(partial(_gone, receiver), "the stuck process is ended")
    assert not _gone(worker)
    assert supervised.stop() == 0


def test_a_process_that_does_not_stop_is_ended_after_the_drain_time(supervised: Supervised) -> None:
    supervised.start("worker", drain_s=0.5, stubborn="worker")
    pid = supervised.wait_for_life("worker", 1)
    assert supervised.stop() == 0
    assert _gone(pid)
