"""One acknowledged object (or event) on its way into the spool: nothing of it counts before `commit` has returned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from storage.durable_files import (
    ByteString,
    full_message,
    partial_name,
    storage_error,
    sync_folder,
    write_all,
)
from storage.errors import SpoolFull

if TYPE_CHECKING:
    from storage.spool import Spool

_SPACE_CHECK_BYTES = 16 << 20  # free space is looked at again after so many bytes of one object


class ObjectWriter:
    """One object on its way into `incoming/`: write, then `commit` or `discard`. Used by one thread at a time."""

    def __init__(self, spool: Spool, name: str, head: bytes, *, may_use_reserve: bool = False) -> None:
        self._spool = spool
        self._target = spool.root / "incoming" / name
        self._partial = spool.root / "tmp" / partial_name(name)
        self._since_check = 0
        self._file = -1
        if not may_use_reserve and not spool.has_space():
            raise SpoolFull(full_message(spool.root))
        try:
            self._file = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise storage_error(error, spool.root) from error
        self.write(head)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write(self, data: ByteString) -> None:
        """Append bytes. Raises SpoolFull, SpoolUnsafe; then the object is already discarded."""
        try:
            size = write_all(self._file, data)
            self._since_check += size
            if self._since_check >= _SPACE_CHECK_BYTES:
                self._since_check = 0
                if not self._spool.has_space():
                    raise SpoolFull(full_message(self._spool.root))
        except OSError as error:
            self.discard()
            raise storage_error(error, self._spool.root) from error
        except SpoolFull:
            self.discard()
            raise

    def commit(self) -> Path:
        """Make the object durable and visible; returns its path.

        Raises SpoolFull, SpoolUnsafe: the sender must not hear Success. When only the sync of the folder failed, the
        file stays (its name may or may not survive a power cut, and the indexer may already know it); the sender's
        next try then counts as a duplicate and harms nothing.
        """
        try:
            os.fsync(self._file)
            self._close()
            self._partial.rename(self._target)
        except OSError as error:
            self.discard()
            raise storage_error(error, self._spool.root) from error
        try:
            sync_folder(self._target.parent)
        except OSError as error:
            raise storage_error(error, self._spool.root) from error
        return self._target

    def discard(self) -> None:
        """Drop what was written, unless it was committed; may be called again."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)
