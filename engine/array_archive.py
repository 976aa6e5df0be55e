"""Arrays in a compressed .npz, the same bytes for the same arrays, and read without believing what the file claims.

numpy's own reader allocates what a header asks for before it looks at the data; here shape and type are known
beforehand, and nothing larger is unpacked.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEADER_BYTES = 1024
_DATE = (1980, 1, 1, 0, 0, 0)
_VERSION = (1, 0)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """The arrays by name, in this order, little-endian and C-contiguous."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            np.lib.format.write_array(content, plain, version=_VERSION, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_DATE)
            entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            archive.writestr(entry, content.getvalue(), compresslevel=9)


def read_arrays(
    path: Path, expected: Mapping[str, tuple[tuple[int, ...], Collection[str]]], *, error: type[Exception]
) -> dict[str, NDArray[Any]]:
    """Exactly the arrays in `expected`: name to shape and the types that are allowed ("uint8", "float32").

    Raises `error` with the file's name for anything else, damaged or larger.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if sorted(entries) != sorted(f"{name}.npy" for name in expected):
                raise error(f"{path.name}: holds other arrays than {', '.join(expected)}")
            return {
                name: _read(archive, entries[f"{name}.npy"], shape, allowed)
                for name, (shape, allowed) in expected.items()
            }
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError) as exc:
        raise error(f"{path.name}: not readable as arrays of the sizes that belong there: {str(exc)[:200]}") from exc


def _read(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, shape: tuple[int, ...], allowed: Collection[str]
) -> NDArray[Any]:
    largest = max(np.dtype(name).itemsize for name in allowed)
    count = int(np.prod(shape, dtype=np.int64))
    if entry.file_size > largest * count + _HEADER_BYTES:
        raise ValueError(f"{entry.filename}: {entry.file_size} bytes")
    content = io.BytesIO(archive.read(entry))
    if np.lib.format.read_magic(content) != _VERSION:
        raise ValueError(f"{entry.filename}: another version of the format")
    found, in_fortran_order, dtype = np.lib.format.read_array_header_1_0(content)
    if found != shape or in_fortran_order or dtype.name not in allowed or dtype.byteorder == ">":
        raise ValueError(f"{entry.filename}: {dtype} {found} where {shape} is needed")
    data = content.read()
    if len(data) != dtype.itemsize * count:
        raise ValueError(f"{entry.filename}: {len(data)} bytes of data")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
