"""One function over many cases in worker processes, with results as they come and errors that reach the caller."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import FrameType
from typing import TypeVar

from engine.errors import WorkerDied

Argument = TypeVar("Argument")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called with how many are done and how many there are."""

_MOST_BY_DEFAULT = 8
_AFTER_PARENT_S = 0.5


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
    try:
        for index, result in _run(function, arguments, min(processes, total)):
            results[index] = result
            if progress is not None:
                progress(len(results), total)
    except WorkerDied:
        # Whoever ends all processes at once, as a service manager does, ends workers too: the caller then raises here
        # that it was told to stop, and no memory ran out.
        if progress is not None:
            progress(len(results), total)
        raise
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
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker) as pool:
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


def _begin_worker() -> None:
    """A worker's end is its parent's to decide: Ctrl-C in a terminal reaches both; a parent that was killed says
    nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_late)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_late(_number: int, _frame: FrameType | None) -> None:
    """After the parent has noticed a signal that was meant for both."""
    time.sleep(_AFTER_PARENT_S)
    os._exit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
