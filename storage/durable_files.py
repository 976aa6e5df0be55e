"""How bytes reach the disk for good: written whole, synced, named by a rename; and what a failure to do so means."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from storage.errors import SpoolFull, SpoolUnsafe

ByteString = bytes | bytearray | memoryview

_STALE_TMP_S = 3600.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_all(file: int, data: ByteString) -> int:
    """os.write until everything is written: a short write is no success. Returns the number of bytes."""
    view = memoryview(data).cast("B")
    written = 0
    while written < len(view):
        count = os.write(file, view[written:])
        if count <= 0:
            raise OSError(errno.EIO, "write made no progress")
        written += count
    return written


def write_file(path: Path, data: bytes) -> None:
    write_chunks(path, (data,))


def write_chunks(path: Path, chunks: Iterable[bytes]) -> tuple[str, int]:
    """A new file of these bytes, one chunk in memory at a time; returns (SHA-256, number of bytes)."""
    digest, size = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += write_all(file, chunk)
        os.fsync(file)
    finally:
        os.close(file)
    return digest.hexdigest(), size


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_name(name: str) -> str:
    """Name in `tmp/` of a file that is being written: it says by which process of which host."""
    return f"{name}.{_host()}.{os.getpid()}.part"


def is_abandoned(path: Path) -> bool:
    """The writer's process is gone, or the file is so old that its process id may have been given out again.

    A spool may be shared by several hosts: of another one's processes nothing is known, so only age tells.
    """
    pieces = path.name.rsplit(".", 3)
    if len(pieces) == 4 and pieces[1] == _host():
        try:
            os.kill(int(pieces[2]), 0)
        except (ValueError, ProcessLookupError):
            return True
        except PermissionError:
            pass
    try:
        return time.time() - path.stat().st_mtime > _STALE_TMP_S
    except FileNotFoundError:
        return False


def full_message(root: Path) -> str:
    return f"free space in {root} is below the reserve; remove delivered studies or enlarge the disk"


def storage_error(error: OSError, root: Path) -> SpoolFull | SpoolUnsafe:
    if error.errno in _FULL:
        return SpoolFull(f"the file system of {root} is full: {error.strerror}")
    return unsafe(error, root)


def unsafe(error: OSError, root: Path) -> SpoolUnsafe:
    return SpoolUnsafe(f"the spool {root} cannot promise durability: {error.strerror or error}")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64]
