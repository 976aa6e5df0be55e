"""What a network was trained on, as one short text that changes when the arrays of any of its cases do.

Our own preprocessed cases are known by their content, so that a dataset may be moved or copied, and made again. Of
nnU-Net's (CASE.b2nd) size and time of last change are looked at: a copy has to keep the times (cp -a, rsync -a).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DatasetInvalid
from engine.json_reader import Reader, read_json

CONTENT, STAMP = "content", "stamp"
"""Keys of CASE.json (engine/preprocessed.py): the digest of the arrays, and of what they were made from."""


def content_digest(image_CZYX: NDArray[Any], labels_ZYX: NDArray[Any]) -> str:
    """Of shapes, types and values of both."""
    found = hashlib.sha256()
    for array in (image_CZYX, labels_ZYX):
        found.update(f"{array.dtype.str} {array.shape}\n".encode())
        # Part by part: the whole may lie in another order of axes, and would be copied.
        for part in array:
            found.update(np.ascontiguousarray(part).data)
    return found.hexdigest()


def data_digest(folder: Path, names: Iterable[str]) -> str:
    """Of the preprocessed cases of these names, in any order. Raises DatasetInvalid for a case that is not there."""
    found = hashlib.sha256()
    for name in sorted(set(names)):
        found.update(f"{name} {_case(folder, name)}\n".encode())
    return found.hexdigest()[:12]


def _case(folder: Path, name: str) -> str:
    if not (folder / f"{name}.b2nd").exists():
        described = Reader(
            read_json(folder / f"{name}.json", error=DatasetInvalid), where=f"{name}.json", error=DatasetInvalid
        )
        # Cases made before their content was noted have the stamp alone.
        return described.text(CONTENT if CONTENT in described else STAMP)
    parts = []
    for file in (f"{name}.b2nd", f"{name}_seg.b2nd"):
        try:
            state = (folder / file).stat()
        except OSError as error:
            raise DatasetInvalid(f"{folder.name}/{file}: cannot be read: {error.strerror}") from error
        parts.append(f"{state.st_size} {state.st_mtime_ns}")
    return ", ".join(parts)
