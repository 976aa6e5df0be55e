"""A file that is there as a whole, or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
