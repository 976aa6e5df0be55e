"""Files become cases by nnU-Net's names, and what cannot be told is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import InputRejected
from gateway.prediction.file_cases import cases_in_folder, cases_of_files
from gateway.prediction.request import UsageRefused


def _touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def test_a_folder_is_grouped_by_case_and_sorted_with_channels_in_order(tmp_path: Path) -> None:
    _touch(tmp_path, "b_0001.nii.gz", "b_0000.nii.gz", "a_1_0000.nii.gz", "a_1_0001.nii.gz", ".b_0002.nii.gz", "x.txt")
    cases, notes = cases_in_folder(tmp_path, ending=".nii.gz", channels=2)
    assert [(case.name, [path.name for path in case.files]) for case in cases] == [
        ("a_1", ["a_1_0000.nii.gz", "a_1_0001.nii.gz"]),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"]),
    ]
    assert notes == []


@pytest.mark.parametrize("names", [("a_0000.mha",), ("a_0000.mha", "a_0002.mha"), ("a_0001.mha", "a_0002.mha")])
def test_a_case_without_its_channels_says_which_are_there(tmp_path: Path, names: tuple[str, ...]) -> None:
    _touch(tmp_path, *names)
    (case,), _ = cases_in_folder(tmp_path, ending=".mha", channels=2)
    with pytest.raises(InputRejected, match=r"channels 000.*; the model takes 2, from 0000 on"):
        case.geometry()


def test_the_datasets_ending_goes_first_and_another_is_taken_where_it_is_the_only_one(tmp_path: Path) -> None:
    _touch(tmp_path, "a_0000.nii.gz", "b_0000.nrrd")
    cases, _ = cases_in_folder(tmp_path, ending=".nrrd", channels=1)
    assert [(case.name, case.ending) for case in cases] == [("b", ".nrrd")]
    with pytest.raises(UsageRefused, match=r"\.nii\.gz, \.nrrd and none \.mha"):
        cases_in_folder(tmp_path, ending=".mha", channels=1)
    (tmp_path / "b_0000.nrrd").unlink()
    cases, _ = cases_in_folder(tmp_path, ending=".mha", channels=1)
    assert [(case.name, case.ending) for case in cases] == [("a", ".nii.gz")]


def test_files_with_other_names_are_told_and_a_folder_of_them_is_refused(tmp_path: Path) -> None:
    _touch(tmp_path, "a_0000.nii.gz", "mask.nii.gz")
    _, notes = cases_in_folder(tmp_path, ending=".nii.gz", channels=1)
    assert notes == ["1 files are not named CASE_0000.nii.gz and are left out"]
    (tmp_path / "a_0000.nii.gz").unlink()
    with pytest.raises(UsageRefused, match="no file is named CASE_0000"):
        cases_in_folder(tmp_path, ending=".nii.gz", channels=1)


def test_a_folder_without_images_has_no_cases(tmp_path: Path) -> None:
    _touch(tmp_path, "IM0001", "notes.txt")
    assert cases_in_folder(tmp_path, ending=".nii.gz", channels=1) == ([], [])


def test_given_files_are_cases_of_a_model_with_one_channel_whatever_their_names(tmp_path: Path) -> None:
    files = _touch(tmp_path, "scan.nii", "other_0003.mha")
    assert [case.name for case in cases_of_files(files, channels=1, name=None)] == ["other_0003", "scan"]
    assert [case.name for case in cases_of_files(files[:1], channels=1, name="mine")] == ["mine"]
    with pytest.raises(UsageRefused, match="--name is for one case, and there are 2"):
        cases_of_files(files, channels=1, name="mine")
    (case,) = cases_of_files(_touch(tmp_path, "a_0000.nii.gz"), channels=1, name=None)
    assert case.name == "a"


def test_given_files_in_channel_order_are_one_case(tmp_path: Path) -> None:
    files = _touch(tmp_path, "t1.nii.gz", "flair.nii.gz")
    (case,) = cases_of_files(files, channels=2, name="patient")
    assert (case.name, case.files) == ("patient", tuple(files))
    with pytest.raises(UsageRefused, match="takes 2 channels and 1 files"):
        cases_of_files(files[:1], channels=2, name=None)


def test_given_files_named_as_nnunet_names_them_are_grouped_in_any_order(tmp_path: Path) -> None:
    files = _touch(tmp_path, "b_0001.nii.gz", "a_0000.nii.gz", "b_0000.nii.gz", "a_0001.nii.gz")
    cases = cases_of_files(files, channels=2, name=None)
    assert [[path.name for path in case.files] for case in cases] == [
        ["a_0000.nii.gz", "a_0001.nii.gz"],
        ["b_0000.nii.gz", "b_0001.nii.gz"],
    ]


def test_two_cases_of_one_name_are_refused_and_so_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files = [*_touch(tmp_path, "a_0000.nii.gz"), *_touch(tmp_path / "other", "a_0000.nii.gz")]
    with pytest.raises(UsageRefused, match="two cases would be written as a"):
        cases_of_files(files, channels=1, name=None)
    with pytest.raises(InputRejected, match=r"picture\.png: is no image that is read here"):
        cases_of_files(_touch(tmp_path, "picture.png"), channels=1, name=None)
