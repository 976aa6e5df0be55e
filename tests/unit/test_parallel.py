"""engine.parallel: results in order, errors and deaths of workers reach the caller."""

from __future__ import annotations

import os
import signal

import pytest

from engine.errors import InputRejected, WorkerDied
from engine.parallel import default_processes, map_cases


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


def test_nothing_to_do_gives_nothing() -> None:
    assert map_cases(_square, [], processes=4) == []


def test_the_default_is_the_cores_that_may_be_used() -> None:
    assert 1 <= default_processes() <= min(8, len(os.sched_getaffinity(0)))
