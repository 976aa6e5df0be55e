"""What storage can fail with. The gateway maps these to Transient, Permanent or Rejected (gateway/errors.py)."""

from __future__ import annotations


class StorageError(Exception):
    """Root of everything that storage raises on purpose."""


class SpoolFull(StorageError):
    """Free space is below the reserve, or the file system said ENOSPC; nothing was kept of the write."""


class SpoolUnsafe(StorageError):
    """The spool folder cannot promise durability (read-only, vanished, fsync failed)."""


class ObjectMissing(StorageError):
    """A row names an object that is not in the spool."""


class ObjectChanged(StorageError):
    """Bytes that are written once were about to be written differently, or differ from their digest."""


class DatabaseAway(StorageError):
    """The database did not answer; trying again later may help."""


class LedgerBroken(StorageError):
    """The hash chain of a subject's events does not hold."""


class ModelMissing(StorageError):
    """No model of that name, version or alias is registered."""


class ModelChanged(StorageError):
    """A weight file no longer has the sha256 that was registered."""
