"""engine.locked_cases: what locked cases are, what they are known by, and which models they fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import DatasetInvalid, InputRejected
from engine.locked_cases import LockedCases, misfit, missing_files, open_locked, read_locked
from engine.nifti import read_label_map, read_nifti, write_image
from tests.support.intensity_model import write_intensity_bundle
from tests.support.locked_dataset import LABELS, write_locked


def _read(folder: Path) -> LockedCases:
    return read_locked(open_locked(folder))


def test_every_case_has_its_stratum_where_there_are_strata(tmp_path: Path) -> None:
    strata = {"case_00": "site a", "case_01": "new/site b"}
    folder = write_locked(tmp_path / "locked", cases=2, strata=strata)
    steps: list[tuple[int, int]] = []
    found = read_locked(open_locked(folder), progress=lambda done, total: steps.append((done, total)))
    assert {case.name: case.stratum for case in found.cases} == strata
    assert steps == [(1, 2), (2, 2)]
    (folder / "strata.json").unlink()
    assert {case.stratum for case in _read(folder).cases} == {None}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"case_00": "a"}, "case_01 has no stratum"),
        ({"case_00": "a", "case_01": "b", "case_9": "c"}, "case_9: is no case"),
        ({"case_00": "a", "case_01": 3}, "case_01: a text"),
        ({"case_00": "a", "case_01": "b" * 65}, "at most 64"),
        ({"case_00": "a", "case_01": "b\x1b"}, "printable"),
        ([], "object"),
    ],
)
def test_strata_that_do_not_fit_the_cases_are_refused_with_the_case(
    tmp_path: Path, content: object, words: str
) -> None:
    folder = write_locked(tmp_path / "locked", cases=2)
    (folder / "strata.json").write_text(json.dumps(content))
    with pytest.raises(DatasetInvalid, match=words):
        open_locked(folder)


def _rename(folder: Path) -> None:
    for path in (folder / "imagesTr" / "case_00_0000.nii.gz", folder / "labelsTr" / "case_00.nii.gz"):
        path.rename(path.with_name(path.name.replace("case_00", "other")))


def _relabel(folder: Path) -> None:
    path = folder / "labelsTr" / "case_00.nii.gz"
    labels = read_label_map(path)
    labels.array[0, 0, 0] = 1
    write_image(labels.array, labels.geometry, path)


def _repaint(folder: Path) -> None:
    path = folder / "imagesTr" / "case_00_0000.nii.gz"
    volume = read_nifti([path])
    volume.array[0, 0, 0, 0] += 1
    write_image(volume.array[0], volume.geometry, path)


@pytest.mark.parametrize(("edit", "changes"), [(_rename, False), (_relabel, True), (_repaint, True)])
def test_the_digest_changes_with_image_and_labels_and_not_with_names(
    tmp_path: Path, edit: Callable[[Path], None], changes: bool
) -> None:
    folder = write_locked(tmp_path / "locked", cases=2)
    before = _read(folder)
    edit(folder)
    assert (_read(folder).digest != before.digest) is changes


def test_the_digest_of_an_image_is_the_same_in_any_voxel_order_and_type(tmp_path: Path) -> None:
    folder = write_locked(tmp_path / "locked", cases=1)
    before = _read(folder).cases[0]
    for path in (folder / "imagesTr" / "case_00_0000.nii.gz", folder / "labelsTr" / "case_00.nii.gz"):
        turned, _ = read_nifti([path]).reoriented("SAR")
        write_image(turned.array[0].astype(np.int16), turned.geometry, path)
    after = _read(folder).cases[0]
    assert after.image_digest == before.image_digest
    assert after.digest != before.digest


def test_a_case_that_changes_after_it_was_listed_is_not_measured(tmp_path: Path) -> None:
    folder = write_locked(tmp_path / "locked", cases=1)
    found = _read(folder)
    assert found.read(found.cases[0]).name == "case_00"
    _relabel(folder)
    with pytest.raises(DatasetInvalid, match="case_00: its files were changed"):
        found.read(found.cases[0])


def test_a_case_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write_locked(tmp_path / "locked", cases=2)
    (folder / "labelsTr" / "case_01.nii.gz").write_bytes(b"nothing")
    with pytest.raises(InputRejected, match="case_01"):
        _read(folder)


def test_files_that_are_missing_are_listed_without_opening_any(tmp_path: Path) -> None:
    folder = write_locked(tmp_path / "locked", cases=2)
    (folder / "labelsTr" / "case_01.nii.gz").unlink()
    cases = open_locked(folder).dataset.cases
    assert missing_files(cases, 1) == ["case_01: case_01.nii.gz is missing"]
    assert "case_00: channels 0000; the dataset has 2" in missing_files(cases, 2)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": LABELS}, None),
        ({"labels": {**LABELS, "third": 3}}, "third = 3; phantom 1.0.0 has left structure = 1"),
        ({"labels": {"background": 0, "right structure": 1, "left structure": 2}}, "right structure = 1"),
        ({"channel_names": {"0": "T2"}}, "channels T2; phantom 1.0.0 takes image"),
        ({"channel_names": {"0": "image", "1": "T2"}}, "channels image, T2"),
    ],
)
def test_labels_and_channels_must_be_those_of_the_model(
    tmp_path: Path, changes: dict[str, Any], words: str | None
) -> None:
    bundle = write_intensity_bundle(tmp_path / "bundle", name="phantom")
    difference = misfit(open_locked(write_locked(tmp_path / "locked", cases=1, **changes)).dataset.json, bundle)
    assert difference is None if words is None else difference is not None and words in difference
