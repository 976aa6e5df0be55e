"""SIGTERM and SIGINT end work in an orderly way: by an event that is looked at, else by an exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(BaseException):
    """The work was told to stop. No Exception, like KeyboardInterrupt: no handler of errors is to take it for one."""


def set_on_stop_signals(stop: threading.Event) -> None:
    """From now on SIGTERM and SIGINT set `stop`. To be called in the main thread."""
    for number in _NUMBERS:
        signal.signal(number, lambda _number, _frame: _set(stop))


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """While open, the first SIGTERM or SIGINT sets the event; the next does what it did before. Main thread only."""
    asked = threading.Event()
    with _handled(lambda: _set(asked)):
        yield asked


@contextmanager
def raised_when_stopped(stop: threading.Event) -> Iterator[None]:
    """While open, the first SIGTERM or SIGINT sets `stop` and raises StopRequested in the main thread wherever that is:
    for work that may be killed at any point and goes on when it is started again. Raises it at once where `stop` is
    set."""

    def leave() -> None:
        _set(stop)
        raise StopRequested

    with _handled(leave):
        if stop.is_set():
            raise StopRequested
        yield


@contextmanager
def _handled(ask: Callable[[], None]) -> Iterator[None]:
    before: dict[int, object] = {}

    def handle(_number: int, _frame: FrameType | None) -> None:
        restore()
        ask()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    for number in _NUMBERS:
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def _set(stop: threading.Event) -> None:
    """A handler runs in the main thread between two of its instructions, and so may run while that thread, in
    `stop.wait()`, holds the event's own lock: setting the event there would wait for ever. A thread of its own sets it.
    """
    threading.Thread(target=stop.set, name="stop", daemon=True).start()
