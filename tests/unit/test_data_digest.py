"""What a network was trained on is known by its content, wherever it lies and whenever it was made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.data_digest import content_digest, data_digest
from engine.errors import DatasetInvalid
from engine.json_writer import write_json

IMAGE = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
LABELS = np.zeros((3, 4, 5), dtype=np.int16)


def test_the_digest_of_arrays_changes_with_a_value_a_shape_or_a_type_and_not_with_the_order_in_memory() -> None:
    other = LABELS.copy()
    other[1, 2, 3] = 1
    found = {
        content_digest(IMAGE, LABELS),
        content_digest(IMAGE, other),
        content_digest(IMAGE.reshape(2, 3, 5, 4), LABELS),
        content_digest(IMAGE.astype(np.float64), LABELS),
    }
    assert len(found) == 4
    assert content_digest(np.asfortranarray(IMAGE), np.asfortranarray(LABELS)) == content_digest(IMAGE, LABELS)


def test_a_fold_is_the_same_in_another_folder_and_with_new_stamps(tmp_path: Path) -> None:
    for name in "ab":
        write_json({"stamp": "first", "content": f"arrays of {name}"}, tmp_path / f"one/{name}.json")
        write_json({"stamp": "second", "content": f"arrays of {name}"}, tmp_path / f"two/{name}.json")
    assert data_digest(tmp_path / "one", ["a", "b"]) == data_digest(tmp_path / "two", ["b", "a", "b"])
    assert data_digest(tmp_path / "one", ["a"]) != data_digest(tmp_path / "one", ["a", "b"])
    write_json({"stamp": "first", "content": "corrected"}, tmp_path / "one/b.json")
    assert data_digest(tmp_path / "one", ["a", "b"]) != data_digest(tmp_path / "two", ["a", "b"])


def test_a_case_without_a_digest_of_its_arrays_is_known_by_its_stamp(tmp_path: Path) -> None:
    write_json({"stamp": "first"}, tmp_path / "a.json")
    before = data_digest(tmp_path, ["a"])
    write_json({"stamp": "second"}, tmp_path / "a.json")
    assert data_digest(tmp_path, ["a"]) != before


@pytest.mark.parametrize("changed", ["a.b2nd", "a_seg.b2nd"])
def test_nnunets_files_are_known_by_size_and_time(tmp_path: Path, changed: str) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("a.b2nd", "a_seg.b2nd"):
        (folder / name).write_bytes(b"1234")
    before = data_digest(folder, ["a"])
    shutil.copytree(folder, tmp_path / "two")
    assert data_digest(tmp_path / "two", ["a"]) == before
    os.utime(folder / changed, ns=(1, 1))
    assert data_digest(folder, ["a"]) != before


def test_a_case_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"a\.json: cannot be read"):
        data_digest(tmp_path, ["a"])
    (tmp_path / "a.b2nd").touch()
    with pytest.raises(DatasetInvalid, match=r"a_seg\.b2nd: cannot be read"):
        data_digest(tmp_path, ["a"])
