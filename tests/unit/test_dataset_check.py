"""engine.dataset_check: every fault of a dataset is found in one pass, by name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from engine.dataset_check import KINDS, CheckReport, Severity, check_dataset
from tests.support.raw_datasets import write_array, write_dataset, write_faulty_dataset

SHAPE = (6, 10, 12)


def _kinds(report: CheckReport) -> set[tuple[str, str | None]]:
    return {(finding.kind, finding.case) for finding in report.findings}


def _check(folder: Path) -> CheckReport:
    return check_dataset(folder, processes=1)


def _nan_image(folder: Path, name: str) -> None:
    image = np.ones(SHAPE, np.float32)
    image[2, 3, 4] = np.nan
    write_array(folder / "imagesTr" / f"{name}_0000.nii.gz", image)


def _edit_json(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.requirement("ART-01")
def test_a_clean_dataset_has_no_finding(tmp_path: Path) -> None:
    report = _check(write_dataset(tmp_path / "Dataset001_Clean", channels=2))
    assert report.findings == ()
    assert report.is_usable
    assert report.num_cases == 6


@pytest.mark.requirement("ART-01")
def test_all_faults_of_a_dataset_are_found_in_one_pass(tmp_path: Path) -> None:
    folder = write_faulty_dataset(tmp_path / "Dataset001_Bad")
    report = _check(folder)
    assert _kinds(report) == {
        ("num-training", None),
        ("file-name", None),
        ("label-without-image", None),
        ("unknown-patient-case", None),
        ("splits", None),
        ("missing-label", "case_00"),
        ("unexpected-label", "case_01"),
        ("not-finite", "case_02"),
        ("grid", "case_03"),
        ("grid", "case_04"),
        ("position", "case_05"),
        ("channel-count", "case_06"),
        ("unreadable", "case_07"),
        ("thin-volume", "case_08"),
        ("constant-image", "case_06"),
        ("constant-image", "case_08"),
        ("empty-foreground", "case_09"),
        ("all-zero", "case_10"),
        ("duplicate-image", "case_12"),
        ("grid", "case_13"),
    }
    assert not report.is_usable
    for finding in report.findings:
        assert finding.cause
        assert finding.remedy


def test_one_case_can_have_several_faults(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Bad", cases=2)
    _nan_image(folder, "case_00")
    write_array(folder / "labelsTr" / "case_00.nii.gz", np.full(SHAPE, 9, np.uint8))
    assert _kinds(_check(folder)) == {("not-finite", "case_00"), ("unexpected-label", "case_00")}


def test_a_label_map_with_nan_or_fractions_is_found(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Bad", cases=3)
    label = np.ones(SHAPE, np.float32)
    write_array(folder / "labelsTr" / "case_00.nii.gz", label * 1.5)
    label[0, 0, 0] = np.inf
    write_array(folder / "labelsTr" / "case_01.nii.gz", label)
    assert _kinds(_check(folder)) == {("unreadable", "case_00"), ("not-finite", "case_01")}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _cut_inside(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-400]))


def _huge(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.parametrize("damage", [_truncate, _cut_inside, _huge])
def test_a_damaged_file_is_a_finding_and_no_exception(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Bad", cases=2)
    damage(folder / "imagesTr" / "case_01_0000.nii.gz")
    assert _kinds(_check(folder)) == {("unreadable", "case_01")}


def test_a_dataset_of_slices_has_one_warning_not_one_per_case(tmp_path: Path) -> None:
    report = _check(write_dataset(tmp_path / "Dataset001_Flat", shape=(3, 10, 12)))
    assert report.findings == ()
    folder = tmp_path / "Dataset002_Flat"
    write_dataset(folder, cases=3)
    for index in range(3):
        image = np.full((1, 10, 12), index + 1, np.float32)
        image[0, 0, 0] = 9
        write_array(folder / "imagesTr" / f"case_{index:02}_0000.nii.gz", image)
        write_array(folder / "labelsTr" / f"case_{index:02}.nii.gz", np.ones((1, 10, 12), np.uint8))
    report = _check(folder)
    assert _kinds(report) == {("flat-dataset", None)}
    assert report.is_usable


def test_explicit_lists_with_absent_and_repeated_files_are_found(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Lists", cases=2)
    first, second = "imagesTr/case_00_0000.nii.gz", "imagesTr/case_01_0000.nii.gz"
    _edit_json(
        folder,
        numTraining=3,
        dataset={
            "a": {"images": [first], "label": "labelsTr/case_00.nii.gz"},
            "A": {"images": [second], "label": "labelsTr/case_00.nii.gz"},
            "c": {"images": ["imagesTr/gone.nii.gz"], "label": "labelsTr/gone.nii.gz"},
        },
    )
    assert _kinds(_check(folder)) == {
        ("duplicate-case", "A"),
        ("duplicate-name", "A"),
        ("missing-image", "c"),
        ("missing-label", "c"),
    }


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"labels": {"a": 1, "a": 2}}', b'{"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}']
)
def test_a_dataset_json_that_cannot_be_used_is_one_finding(tmp_path: Path, content: bytes) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Bad", cases=1)
    (folder / "dataset.json").write_bytes(content)
    assert _kinds(_check(folder)) == {("dataset-json", None)}


def test_a_folder_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    assert _kinds(_check(tmp_path / "gone")) == {("dataset-json", None)}


def test_a_missing_folder_of_labels_is_a_missing_label_of_each_case(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_NoLabels", cases=2)
    for path in (folder / "labelsTr").iterdir():
        path.unlink()
    (folder / "labelsTr").rmdir()
    assert _kinds(_check(folder)) == {("missing-label", "case_00"), ("missing-label", "case_01")}


def test_the_ignore_label_is_allowed_and_is_no_foreground(tmp_path: Path) -> None:
    labels = {"background": 0, "first": 1, "second": 2, "ignore": 3}
    folder = write_dataset(tmp_path / "Dataset001_Ignore", cases=2, labels=labels)
    write_array(folder / "labelsTr" / "case_00.nii.gz", np.full(SHAPE, 3, np.uint8))
    assert _kinds(_check(folder)) == {("empty-foreground", "case_00")}


def test_the_same_is_found_in_worker_processes_with_progress(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Bad", cases=4)
    _nan_image(folder, "case_02")
    seen: list[tuple[int, int]] = []
    report = check_dataset(folder, processes=2, progress=lambda done, total: seen.append((done, total)))
    assert report == _check(folder)
    assert seen == [(done, 4) for done in range(5)]


def test_every_kind_says_how_grave_it_is_and_what_to_do() -> None:
    assert {severity for severity, _ in KINDS.values()} == set(Severity)
    assert all(remedy for _, remedy in KINDS.values())


@pytest.mark.peer("shared-data")
def test_the_hippocampus_set_is_clean(shared_data: Path) -> None:
    report = check_dataset(shared_data / "Dataset004_Hippocampus", processes=2)
    assert report.findings == ()
    assert report.num_cases == 200


def _mirror(folder: Path, name: str) -> None:
    for path in (folder / "imagesTr" / f"{name}_0000.nii.gz", folder / "labelsTr" / f"{name}.nii.gz"):
        image = sitk.ReadImage(str(path))
        image.SetDirection((-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
        sitk.WriteImage(image, str(path))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"labels": {"background": 0, "kidney_left": 1, "kidney_right": 2}}, "mixed-sides"),
        ({"pairs": [["first", "second"]]}, "mixed-sides"),
        ({}, "orientation"),
        ({"pairs": [["first", "second"]], "overwrite_image_reader_writer": "SimpleITKIOWithReorient"}, None),
    ],
)
def test_cases_that_are_mirror_images_as_stored_are_found(
    tmp_path: Path, changes: dict[str, Any], kind: str | None
) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Mixed", cases=4, **changes)
    for name in ("case_01", "case_03"):
        _mirror(folder, name)
    report = _check(folder)
    assert _kinds(report) == ({(kind, None)} if kind else set())
    assert report.is_usable == (kind != "mixed-sides")
    if kind:
        assert "LPS in 2 (case_00, case_02); RPS in 2 (case_01, case_03)" in report.findings[0].cause


def test_a_label_that_says_a_side_without_its_other_is_found(tmp_path: Path) -> None:
    labels = {"background": 0, "left_kidney": 1, "liver": 2}
    folder = write_dataset(tmp_path / "Dataset001_One", labels=labels)
    report = _check(folder)
    assert _kinds(report) == {("unpaired-side", None)}
    assert report.is_usable
    _edit_json(folder, pairs=[])
    assert _check(folder).findings == ()
    _edit_json(folder, pairs=[["left_kidney", "nothing"]])
    assert _kinds(_check(folder)) == {("dataset-json", None)}


@pytest.mark.parametrize("value", [7, 40000, 70000, -1])
def test_any_undeclared_label_is_an_unexpected_label(tmp_path: Path, value: int) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Bad", cases=2)
    write_array(folder / "labelsTr" / "case_01.nii.gz", np.full(SHAPE, value, np.int32))
    report = _check(folder)
    assert [(f.kind, f.case, f.cause) for f in report.findings] == [
        ("unexpected-label", "case_01", f"label {value} in 720 voxels; declared are 0 to 2")
    ]


def test_an_image_of_one_value_is_told(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_A", cases=2)
    write_array(folder / "imagesTr" / "case_01_0000.nii.gz", np.full((6, 10, 12), 7.0, dtype=np.float32))
    report = check_dataset(folder, processes=1)
    assert [(f.kind, f.case, f.cause) for f in report.findings] == [
        ("constant-image", "case_01", "every voxel of the image is 7")
    ]
    assert report.is_usable
