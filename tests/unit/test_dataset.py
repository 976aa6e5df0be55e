"""engine.dataset: what a raw dataset says and holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.dataset import grid_difference, open_dataset, read_case, read_dataset_json
from engine.errors import DatasetInvalid, InputRejected
from engine.volume import Geometry
from tests.support.raw_datasets import write_array, write_dataset


@pytest.mark.requirement("ART-01")
def test_cases_are_listed_by_name_with_their_channels_in_order(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "Dataset007_Two", channels=2))
    assert dataset.name == "Dataset007_Two"
    assert [case.name for case in dataset.cases] == [f"case_{i:02}" for i in range(6)]
    assert [path.name for path in dataset.cases[3].channels.values()] == ["case_03_0000.nii.gz", "case_03_0001.nii.gz"]
    assert dataset.cases[3].label.name == "case_03.nii.gz"


def test_a_case_is_read_with_the_spacing_of_its_file(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "d", channels=2))
    loaded = read_case(dataset.cases[0], dataset.json)
    assert loaded.volume.array.shape == (2, 6, 10, 12)
    assert loaded.labels.array.shape == (6, 10, 12)
    assert loaded.spacing_mm == (2.0, 0.75, 0.5)


def test_a_2d_image_gets_nnunets_spacing_along_the_axis_it_lacks(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", cases=1)
    for path in (folder / "imagesTr" / "case_00_0000.nii.gz", folder / "labelsTr" / "case_00.nii.gz"):
        write_array(path, np.ones((8, 9), np.uint8), (0.75, 0.5), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0))
    dataset = open_dataset(folder)
    loaded = read_case(dataset.cases[0], dataset.json)
    assert loaded.volume.array.shape == (1, 1, 8, 9)
    assert loaded.spacing_mm == (999 * 0.75, 0.75, 0.5)


def test_legacy_modality_and_explicit_lists_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = write_dataset(tmp_path / "elsewhere", cases=2)
    monkeypatch.setenv("DATA_ROOT", str(elsewhere))
    folder = tmp_path / "d"
    folder.mkdir()
    document = json.loads((elsewhere / "dataset.json").read_text())
    document["modality"] = document.pop("channel_names")
    document["dataset"] = {
        "b": {"images": ["$DATA_ROOT/imagesTr/case_01_0000.nii.gz"], "label": "$DATA_ROOT/labelsTr/case_01.nii.gz"},
        "a": {
            "images": ["../elsewhere/imagesTr/case_00_0000.nii.gz"],
            "label": "../elsewhere/labelsTr/case_00.nii.gz",
        },
    }
    (folder / "dataset.json").write_text(json.dumps(document))
    dataset = open_dataset(folder)
    assert dataset.json.channel_names == ("MRI",)
    assert [case.name for case in dataset.cases] == ["b", "a"]
    for case in dataset.cases:
        assert read_case(case, dataset.json).labels.array.max() == 2


def test_a_reader_that_reorients_gives_ras_and_the_spacing_with_it(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", cases=1, overwrite_image_reader_writer="NibabelIOWithReorient")
    image = np.zeros((4, 5, 6), np.float32)
    image[0, 1, 2] = 7
    # x grows backwards (P), y to the feet (I), z to the right (R): all three axes change places.
    direction = (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
    write_array(folder / "imagesTr" / "case_00_0000.nii.gz", image, (3.0, 2.0, 1.0), direction=direction)
    write_array(
        folder / "labelsTr" / "case_00.nii.gz", (image > 0).astype(np.uint8), (3.0, 2.0, 1.0), direction=direction
    )
    dataset = open_dataset(folder)
    loaded = read_case(dataset.cases[0], dataset.json)
    assert loaded.volume.geometry.orientation == "RAS"
    assert loaded.spacing_mm == (2.0, 1.0, 3.0)
    assert loaded.volume.array.shape == (1, 5, 6, 4)
    assert np.argwhere(loaded.volume.array[0] == 7).tolist() == [[3, 3, 0]]
    np.testing.assert_array_equal(loaded.labels.array, loaded.volume.array[0] > 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"channel_names": None}, "channel_names"),
        ({"channel_names": {"1": "MRI", "0": "CT"}}, "in this order"),
        ({"channel_names": {}}, "in this order"),
        ({"labels": {"background": 0, "a": 2}}, "without gaps"),
        ({"labels": None}, "labels is missing"),
        ({"numTraining": None}, "numTraining is missing"),
        ({"numTraining": "six"}, "whole number"),
        ({"file_ending": ".dcm"}, r"file_ending: '\.dcm'"),
        ({"file_ending": ".png"}, "convert the images"),
        ({"file_ending": ".mha"}, r"no file CASE_0000\.mha"),
        ({"overwrite_image_reader_writer": "MyReader"}, "MyReader"),
        ({"dataset": {"../a": {"images": ["x"], "label": "y"}}}, "fit for a file name"),
        ({"dataset": {"a": {"images": ["x"]}}}, "label is missing"),
        ({"patients": {"case_00": 5}}, "patients: case_00"),
    ],
)
def test_a_wrong_dataset_json_is_refused_with_its_key(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = write_dataset(tmp_path / "d", cases=1, **changes)
    with pytest.raises(DatasetInvalid, match=named):
        open_dataset(folder)


def test_a_missing_dataset_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"dataset\.json: cannot be read"):
        read_dataset_json(tmp_path / "dataset.json")


def test_a_case_without_one_of_its_channels_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", cases=1, channels=2)
    (folder / "imagesTr" / "case_00_0000.nii.gz").unlink()
    dataset = open_dataset(folder)
    with pytest.raises(InputRejected, match="case_00: channels 0001; the dataset has 2"):
        read_case(dataset.cases[0], dataset.json)


def _grid(affine: list[list[float]], shape: tuple[int, int, int] = (4, 5, 6)) -> Geometry:
    return Geometry(shape=shape, affine_lps=np.array([*affine, [0, 0, 0, 1]], dtype=np.float64))


PLAIN = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 2.0, 0]]


@pytest.mark.parametrize(
    ("other", "is_error", "text"),
    [
        (_grid(PLAIN, (4, 5, 7)), True, "shape"),
        (_grid([[1.001, 0, 0, 0], *PLAIN[1:]]), True, "spacing"),
        (_grid([[-1.0, 0, 0, 5], *PLAIN[1:]]), True, "axes run RPS, those of the image LPS"),
        (_grid([[1.0, 0, 0, 0.5], *PLAIN[1:]]), False, "origin 0.5 mm"),
    ],
)
def test_grids_that_do_not_match_are_errors_and_moved_ones_are_not(other: Geometry, is_error: bool, text: str) -> None:
    difference = grid_difference(_grid(PLAIN), other)
    assert difference is not None
    assert difference.is_error is is_error
    assert text in difference.text


def test_rounding_of_a_header_is_no_difference() -> None:
    assert grid_difference(_grid(PLAIN), _grid([[1.0 + 1e-7, 0, 0, 1e-5], *PLAIN[1:]])) is None


def test_a_moved_label_is_read_on_the_grid_of_its_image(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", cases=1)
    label = folder / "labelsTr" / "case_00.nii.gz"
    write_array(label, np.ones((6, 10, 12), np.uint8), origin=(0.4, 0.0, 0.0))
    dataset = open_dataset(folder)
    loaded = read_case(dataset.cases[0], dataset.json)
    assert loaded.labels.geometry is loaded.volume.geometry
    write_array(label, np.ones((6, 10, 11), np.uint8))
    with pytest.raises(InputRejected, match=r"case_00: case_00\.nii\.gz: shape"):
        read_case(dataset.cases[0], dataset.json)


@pytest.mark.parametrize("value", [7, 300, 40000, 65535, 70000, 2**31 - 1, -1])
def test_a_label_that_is_not_declared_is_named_with_case_and_value(tmp_path: Path, value: int) -> None:
    folder = write_dataset(tmp_path / "d", cases=1)
    labels = np.zeros((6, 10, 12), np.int32)
    labels[2, 3, 4:6] = value
    write_array(folder / "labelsTr" / "case_00.nii.gz", labels)
    dataset = open_dataset(folder)
    message = rf"case_00: case_00\.nii\.gz: label {value} in 2 voxels; declared are 0 to 2; correct"
    with pytest.raises(DatasetInvalid, match=message):
        read_case(dataset.cases[0], dataset.json)


def test_the_ignore_label_is_declared(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", cases=1, labels={"background": 0, "a": 1, "b": 2, "ignore": 3})
    write_array(folder / "labelsTr" / "case_00.nii.gz", np.full((6, 10, 12), 3, np.uint8))
    dataset = open_dataset(folder)
    assert read_case(dataset.cases[0], dataset.json).labels.array.max() == 3


def test_cases_whose_preprocessed_files_would_have_one_name_are_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", cases=2)
    (folder / "imagesTr" / "case_01_0000.nii.gz").rename(folder / "imagesTr" / "case_00_seg_0000.nii.gz")
    (folder / "labelsTr" / "case_01.nii.gz").rename(folder / "labelsTr" / "case_00_seg.nii.gz")
    with pytest.raises(DatasetInvalid, match=r"the cases case_00 and case_00_seg: .*rename one"):
        open_dataset(folder)
