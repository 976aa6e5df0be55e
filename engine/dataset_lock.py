"""Who changes a raw dataset has it alone, and nobody changes it while it is read to be planned or preprocessed.

DatasetNNN_Name/dataset.lock    only while somebody has it; what a killed process left locks nothing
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from engine.errors import DatasetBusy
from engine.lock_file import read_holder, try_lock, write_holder

LOCK = "dataset.lock"
_ATTEMPTS = 5


@contextmanager
def changing_dataset(folder: Path) -> Iterator[None]:
    """Holds the dataset alone. The folder is made where it is not there, and removed again where it is left empty.

    Raises DatasetBusy when another process changes or reads it, OSError when there can be no lock file.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _held(folder, shared=False):
            yield
    finally:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # something is in it
                break


@contextmanager
def reading_dataset(folder: Path) -> Iterator[None]:
    """Holds the dataset together with others that read it. One that cannot be written to is not locked: nobody changes
    it from here. Raises DatasetBusy when another process changes it."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield
        return
    with _held(folder, shared=True):
        yield


@contextmanager
def _held(folder: Path, *, shared: bool) -> Iterator[None]:
    path = folder / LOCK
    with _locked(folder, shared=shared) as file:
        if shared:
            file.truncate(0)  # whoever was killed
        else:
            write_holder(file)
        try:
            yield
        finally:
            # The last one removes it; `_locked` sees that a file which it waited for is gone.
            if try_lock(file, attempts=1) and _is(path, file):
                path.unlink()


def _locked(folder: Path, *, shared: bool) -> IO[str]:
    """The lock file, open and locked."""
    path = folder / LOCK
    for _ in range(_ATTEMPTS):
        if not shared:
            folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        with suppress(OSError):  # of another user, who did it
            os.fchmod(file.fileno(), 0o666)  # who shares the dataset shares its lock
        if not try_lock(file, shared=shared):
            file.close()
            who = read_holder(path)
            by = "" if who["pid"] is None else f" by process {who['pid']} on {who['host']}"
            doing = "being changed" if shared or by else "in use"
            raise DatasetBusy(f"{folder.resolve().name}: is {doing}{by}; wait until that has ended, and start again")
        if _is(path, file):
            return file
        file.close()
    raise DatasetBusy(f"{folder.resolve().name}: is in use; wait until that has ended, and start again")


def _is(path: Path, file: IO[str]) -> bool:
    """Whether the open file is the one that has the name now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
