"""A training that makes way for something else: while a file `pause` is in its folder it waits between two steps.

Whoever supervises the training writes and removes the file. Before it waits the training writes a checkpoint, so that
it may be killed meanwhile, and it goes on listening for a stop. Time spent waiting is no time of training: neither of
its budget nor of its log.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

PAUSE = "pause"
_POLL_S = 0.5


class TrainingPause:
    """Of one training in one folder. `note` gets a line for the log when it begins to wait, and when it goes on."""

    def __init__(
        self, folder: Path, *, note: Callable[[str], None] = lambda _text: None, poll_s: float = _POLL_S
    ) -> None:
        self._path = folder / PAUSE
        self._note = note
        self._poll_s = poll_s
        self._waited_s = 0.0

    def is_asked(self) -> bool:
        return self._path.exists()

    def now(self) -> float:
        """Seconds of a clock that stands still while the training waits."""
        return time.monotonic() - self._waited_s

    def wait(self, stop: Callable[[], bool], asked: Callable[[], bool] | None = None) -> None:
        """Returns when the pause is over, or `stop` says so; at once where none is asked for. Of several processes that
        wait together `asked` is the question that they agree on."""
        asked = asked or self.is_asked
        if not asked():
            return
        self._note("paused; it goes on when the file `pause` is gone")
        began = time.monotonic()
        try:
            while asked() and not stop():
                time.sleep(self._poll_s)
        finally:
            self._waited_s += time.monotonic() - began
        self._note(f"paused for {time.monotonic() - began:.0f} s")
