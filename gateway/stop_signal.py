"""SIGTERM and SIGINT set an event that the main thread waits for."""

from __future__ import annotations

import signal
import threading
from types import FrameType


def set_on_stop_signals(stop: threading.Event) -> None:
    """From now on SIGTERM and SIGINT set `stop`. To be called in the main thread.

    A handler runs in the main thread between two of its instructions, and so may run while that thread, in
    `stop.wait()`, holds the event's own lock: setting the event there would wait for ever. A thread of its own sets it.
    """

    def ask(_number: int, _frame: FrameType | None) -> None:
        threading.Thread(target=stop.set, name="stop", daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
