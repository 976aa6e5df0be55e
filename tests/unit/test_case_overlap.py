"""engine.case_overlap: a locked case that was learnt from is found, renamed, in another form, or moved away."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine import case_overlap
from engine.case_overlap import ImageDigests, copies, named_as_learnt
from engine.dataset import RawDataset, open_dataset
from engine.errors import InputRejected
from engine.exclusions import exclude
from engine.locked_cases import open_locked, read_locked
from engine.nifti import read_nifti, write_image
from engine.provenance import DataOrigin, Provenance, cases_digest
from tests.support.locked_dataset import write_locked


def _images(folder: Path) -> dict[str, str]:
    return {case.name: case.image_digest for case in read_locked(open_locked(folder)).cases}


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    return write_locked(tmp_path / "locked", cases=3, first=100)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_locked(tmp_path / "Dataset001_Trained", cases=3)


def test_cases_of_the_same_names_with_other_images_are_other_cases(locked: Path, trained: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = copies(
        _images(locked),
        [open_dataset(trained)],
        ImageDigests(None),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert found == {}
    assert steps[-1] == (3, 3)


@pytest.mark.requirement("ART-23", "OPS-67", open="lineage of training data, shadow run")
def test_a_copy_is_found_under_another_name_in_another_order_and_type(locked: Path, trained: Path) -> None:
    source = read_nifti([locked / "imagesTr" / "case_01_0000.nii.gz"])
    turned, _ = source.reoriented("SLP")
    write_image(turned.array[0].astype(np.int16), turned.geometry, trained / "imagesTr" / "renamed_0000.nii.gz")
    found = copies(_images(locked), [open_dataset(trained)], ImageDigests(None))
    assert found == {"case_01": "Dataset001_Trained"}


def test_an_excluded_case_counts_as_learnt_from_and_may_be_unreadable(locked: Path, trained: Path) -> None:
    shutil.copy(locked / "imagesTr" / "case_02_0000.nii.gz", trained / "imagesTr" / "case_02_0000.nii.gz")
    (trained / "imagesTr" / "case_01_0000.nii.gz").write_bytes(b"nothing")
    with pytest.raises(InputRejected, match="case_01"):
        copies(_images(locked), [open_dataset(trained)], ImageDigests(None))
    for case in ("case_01", "case_02"):
        exclude(trained, case, "damaged")
    found = copies(_images(locked), [open_dataset(trained)], ImageDigests(None))
    assert found == {"case_02": "Dataset001_Trained"}


def test_an_image_is_read_once_and_again_when_its_file_changes(
    locked: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path = _images(locked), tmp_path / "models" / "images.json"
    reads: list[str] = []

    def counting(paths: list[Path]) -> object:
        reads.append(paths[0].name)
        return read_nifti(paths)

    monkeypatch.setattr(case_overlap, "read_nifti", counting)
    copies(images, [open_dataset(trained)], ImageDigests(path))
    assert len(reads) == 3
    copies(images, [open_dataset(trained)], ImageDigests(path))
    assert len(reads) == 3
    changed = trained / "imagesTr" / "case_01_0000.nii.gz"
    os.utime(changed, ns=(0, 0))
    copies(images, [open_dataset(trained)], ImageDigests(path))
    assert reads[3:] == ["case_01_0000.nii.gz"]
    assert len(json.loads(path.read_text())["images"]) == 3, "what a file was before is forgotten"
    path.write_text(path.read_text()[:40])
    copies(images, [open_dataset(trained)], ImageDigests(path))
    assert len(reads) == 7


def _provenance(names: list[str]) -> Provenance:
    data = DataOrigin(
        name="x", licence="", reference="", release="", cases=len(names), cases_digest=cases_digest(names)
    )
    return Provenance(data=data, training=(), exported_by="seggate 0.1.0")


def test_names_that_a_training_knows_count_where_its_dataset_lost_them(trained: Path) -> None:
    dataset: RawDataset = open_dataset(trained)  # case_00 to case_02
    learnt = frozenset({"case_00", "case_01", "moved"})
    assert named_as_learnt(["moved", "case_01", "free"], learnt, [dataset], None) == {"moved"}
    assert named_as_learnt(["free"], learnt, [dataset], None) == frozenset()
    assert named_as_learnt(["moved"], learnt, [], None) == {"moved"}


def test_a_bundle_that_learnt_from_exactly_these_names_says_so(trained: Path) -> None:
    dataset, nothing = open_dataset(trained), frozenset[str]()
    present = ["case_00", "case_01", "case_02"]
    assert named_as_learnt(["a", "b"], nothing, [], _provenance(["b", "a"])) == {"a", "b"}
    assert named_as_learnt(["a", "b"], nothing, [dataset], _provenance([*present, "a", "b"])) == {"a", "b"}
    assert named_as_learnt(["a", "b"], nothing, [dataset], _provenance(present)) == nothing
    # All of these names are in the dataset still: their voxels were compared.
    assert named_as_learnt(present, nothing, [dataset], _provenance(present)) == nothing
