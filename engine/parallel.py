"""One function over many cases in worker processes, with results as they come and errors that reach the caller."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from engine.errors import WorkerDied

Argument = TypeVar("Argument")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called with how many are done and how many there are."""

_MOST_BY_DEFAULT = 8


def default_processes() -> int:
    """The cores this process may use, at most 8: each worker holds a whole case in memory."""
    return min(_MOST_BY_DEFAULT, len(os.sched_getaffinity(0)))


def map_cases(
    function: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    *,
    processes: int,
    progress: Progress | None = None,
) -> list[Result]:
    """`function` of every argument, results in the order of the arguments.

    With one process (or one argument) all runs in this one. `function` is a module's, argument and result can be
    pickled. What `function` raises is raised here, once nothing runs any more. Raises WorkerDied when a worker ends
    without a result.
    """
    total = len(arguments)
    results: dict[int, Result] = {}
    if progress is not None:
        progress(0, total)
    for index, result in _run(function, arguments, min(processes, total)):
        results[index] = result
        if progress is not None:
            progress(len(results), total)
    return [results[index] for index in range(total)]


def _run(
    function: Callable[[Argument], Result], arguments: Sequence[Argument], processes: int
) -> Iterator[tuple[int, Result]]:
    if processes <= 1:
        for index, argument in enumerate(arguments):
            yield index, function(argument)
        return
    # A fork of this process could inherit a lock that one of its threads holds; the fork server has none.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = iter(enumerate(arguments))
        running: dict[Future[Result], int] = {}
        try:
            while True:
                # Few ahead of the workers, so that results are not piled up faster than the caller takes them.
                for index, argument in islice(waiting, 2 * processes - len(running)):
                    running[pool.submit(function, argument)] = index
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a worker process ended without a result, as a rule because memory ran out; use fewer processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
