"""engine.parallel: results in order, errors and deaths of workers reach the caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.errors import InputRejected, WorkerDied
from engine.parallel import default_processes, map_cases
from tests.support.peers import ROOT
from tests.support.waiting import wait_until


def _square(value: int) -> int:
    return value * value


def _refuse_three(value: int) -> int:
    if value == 3:
        raise InputRejected("case 3: at fault")
    return value


def _die(value: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return value


@pytest.mark.parametrize("processes", [1, 3])
def test_results_are_in_the_order_of_the_arguments(processes: int) -> None:
    seen: list[tuple[int, int]] = []
    found = map_cases(_square, range(20), processes=processes, progress=lambda d, t: seen.append((d, t)))
    assert found == [value * value for value in range(20)]
    assert seen == [(done, 20) for done in range(21)]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_a_case_is_raised_as_it_was(processes: int) -> None:
    with pytest.raises(InputRejected, match="case 3: at fault"):
        map_cases(_refuse_three, range(8), processes=processes)


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(WorkerDied, match="use fewer processes"):
        map_cases(_die, range(4), processes=2)


class _ToldToStop(Exception):
    pass


def test_workers_that_were_ended_together_with_their_parent_are_no_lack_of_memory() -> None:
    """A service manager sends SIGTERM to all; the caller's progress then says that it was told to stop."""
    stopped: list[int] = []

    def progress(_done: int, _total: int) -> None:
        if stopped:
            raise _ToldToStop

    before = signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    try:
        with pytest.raises(_ToldToStop):
            map_cases(_end_all, [os.getpid()] * 4, processes=2, progress=progress)
    finally:
        signal.signal(signal.SIGTERM, before)


ORPHANS = """
import sys
from engine.parallel import map_cases
from tests.unit.test_parallel import _wait_for_ever
map_cases(_wait_for_ever, [sys.argv[1]] * 2, processes=2)
"""


def test_workers_end_when_their_parent_was_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path)], cwd=ROOT)
    wait_until(lambda: len(list(tmp_path.glob("*"))) == 2, "both workers")
    parent.kill()
    parent.wait()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(_is_running(number) for number in workers), "the end of both", timeout_s=60)


def _end_all(parent: int) -> None:
    for process in (parent, os.getpid()):
        os.kill(process, signal.SIGTERM)
    threading.Event().wait(60)


def _wait_for_ever(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    threading.Event().wait()


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_to_do_gives_nothing() -> None:
    assert map_cases(_square, [], processes=4) == []


def test_the_default_is_the_cores_that_may_be_used() -> None:
    assert 1 <= default_processes() <= min(8, len(os.sched_getaffinity(0)))
