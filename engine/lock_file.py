"""A lock on a file that the kernel holds (flock): it ends with the process, however that ends. The file says who has
it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any


def try_lock(file: IO[str], *, shared: bool = False, attempts: int = 5) -> bool:
    """Whether the file could be locked. Tries for a moment: who only looks for the holder has the lock as well, for an
    instant."""
    for attempt in range(attempts):
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1 if attempt + 1 < attempts else 0)
        else:
            return True
    return False


def write_holder(file: IO[str]) -> None:
    """Says in a locked file (mode a+) that this process has it."""
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    file.flush()


def read_holder(path: Path) -> dict[str, Any]:
    """host and pid, which are "unknown" and None while the holder is about to write them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {"host": "unknown", "pid": None}
