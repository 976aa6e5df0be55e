"""A file that is there as a whole, or not at all."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


@contextmanager
def whole_file(path: Path, *, keeps_ending: bool = False) -> Iterator[Path]:
    """A hidden name beside `path` to write to; what is there takes the place of `path` when the block ends, and is
    removed when it raises.

    No two writers get the same name, whether threads, processes or hosts. `keeps_ending` is for libraries that choose
    a format by it; what a killed process leaves then looks like the others to a `glob` that does not skip hidden files.
    """
    token = secrets.token_hex(4)
    partial = path.with_name(f".{token}.{path.name}" if keeps_ending else f".{path.name}.{token}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_array(file: BinaryIO, array: NDArray[Any]) -> None:
    """numpy's `save`, with an OSError that says what is wrong: its own only counts what was written."""
    try:
        np.save(file, array, allow_pickle=False)
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.ENOSPC, "not written to its end; is the disk full?", str(file.name)) from error
