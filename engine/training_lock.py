"""One training per folder, and how it is told to stop.

The lock is the kernel's (flock), so a process that was killed leaves none behind; the file says who holds it. A file
`stop` asks the training to write a checkpoint and end; it is looked for before each step.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from engine.errors import TrainingRefused

LOCK, STOP = "training.lock", "stop"
_ATTEMPTS = 5


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Holds the folder; a request to stop from before is forgotten. Raises TrainingRefused when another process has
    it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        if not _locked(file):
            who = _read(folder / LOCK)
            raise TrainingRefused(
                f"{folder.name} of {folder.parent.name} is being trained by process {who['pid']} on {who['host']}"
            )
        (folder / STOP).unlink(missing_ok=True)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        try:
            yield
        finally:
            (folder / STOP).unlink(missing_ok=True)


def holder(folder: Path) -> Mapping[str, Any] | None:
    """Who trains in the folder (host, pid); None when nobody does."""
    path = folder / LOCK
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(path)
    return None


def ask_to_stop(folder: Path) -> None:
    (folder / STOP).touch()


def is_asked_to_stop(folder: Path) -> bool:
    return (folder / STOP).exists()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    # The holder may be about to write its name.
    return content if isinstance(content, dict) else {"host": "unknown", "pid": None}


def _locked(file: IO[str]) -> bool:
    """Tries for a moment: who only looks for the holder has the lock as well, for an instant."""
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1 if attempt + 1 < _ATTEMPTS else 0)
        else:
            return True
    return False
