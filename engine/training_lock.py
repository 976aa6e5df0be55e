"""One training per folder, and how it is told to stop.

The lock is the kernel's (flock), so a process that was killed leaves none behind; the file says who holds it. A file
`stop` asks the training to write a checkpoint and end; it is looked for before each step.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import TrainingRefused
from engine.lock_file import read_holder, try_lock, write_holder

LOCK, STOP = "training.lock", "stop"


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Holds the folder; a request to stop from before is forgotten. Raises TrainingRefused when another process has
    it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        if not try_lock(file):
            who = read_holder(folder / LOCK)
            raise TrainingRefused(
                f"{folder.name} of {folder.parent.name} is being trained by process {who['pid']} on {who['host']}"
            )
        (folder / STOP).unlink(missing_ok=True)
        write_holder(file)
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
            return read_holder(path)
    return None


def ask_to_stop(folder: Path) -> None:
    (folder / STOP).touch()


def is_asked_to_stop(folder: Path) -> bool:
    return (folder / STOP).exists()
