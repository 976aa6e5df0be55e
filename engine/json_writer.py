"""Writing JSON as nnU-Net does (indent 4), whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(document: Any, path: Path, *, sort_keys: bool = False) -> None:
    """The document as a file; the folder is made. A reader sees the old file or the new one, never a part.

    Raises ValueError for NaN and infinity, OSError when the file cannot be written.
    """
    text = json.dumps(document, indent=4, sort_keys=sort_keys, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
