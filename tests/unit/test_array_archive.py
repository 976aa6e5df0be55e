"""engine.array_archive: the same bytes for the same arrays, and nothing believed that a file claims."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.array_archive import read_arrays, write_arrays
from engine.errors import BundleInvalid

LABELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
IMAGE = np.linspace(-1, 1, 24, dtype=np.float32).reshape(1, 2, 3, 4)
EXPECTED: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "labels": ((2, 3, 4), ("uint8", "uint16")),
    "image": ((1, 2, 3, 4), ("int16", "float32")),
}


def test_arrays_come_back_and_numpy_reads_them_too(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"labels": LABELS, "image": IMAGE})
    found = read_arrays(tmp_path / "a.npz", EXPECTED, error=BundleInvalid)
    assert np.array_equal(found["labels"], LABELS)
    assert np.array_equal(found["image"], IMAGE)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        assert np.array_equal(stored["image"], IMAGE)


def test_the_same_arrays_give_the_same_bytes_whatever_their_layout(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"labels": LABELS})
    write_arrays(tmp_path / "b.npz", {"labels": np.asfortranarray(LABELS.astype(">u2").astype(np.uint8))})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def _npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def _npy(array: Any, *, pickled: bool = False) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=pickled)
    return content.getvalue()


def _claiming(shape: str) -> bytes:
    """A header that asks for more than there is."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 24


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"labels": _npy(LABELS), "more": _npy(LABELS)},
        {"labels": _npy(LABELS[0])},
        {"labels": _npy(LABELS.astype(np.int64))},
        {"labels": _npy(LABELS.astype(">u2"))},
        {"labels": _npy(np.asfortranarray(LABELS))},
        {"labels": _npy(np.array([None, "x"], dtype=object), pickled=True)},
        {"labels": _claiming("(1000000, 1000000, 1000000)")},
        {"labels": _claiming("(2, 3, 4)")[:-1]},
        {"labels": b"\0" * 50_000_000},
        {"labels": b"no array"},
    ],
)
def test_anything_but_the_expected_arrays_is_refused_with_the_files_name(
    tmp_path: Path, members: dict[str, bytes]
) -> None:
    path = _npz(tmp_path / "a.npz", **members)
    with pytest.raises(BundleInvalid, match=r"a\.npz"):
        read_arrays(path, {"labels": EXPECTED["labels"]}, error=BundleInvalid)


def test_a_file_that_is_absent_or_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match=r"a\.npz"):
        read_arrays(tmp_path / "a.npz", EXPECTED, error=BundleInvalid)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(BundleInvalid, match=r"a\.npz"):
        read_arrays(tmp_path / "a.npz", EXPECTED, error=BundleInvalid)
