"""`seggate evaluate`: what it measures, where it writes it, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from gateway.cli import app
from tests.support.raw_datasets import write_array

LABELS = {"background": 0, "liver": 1, "spleen": 2}
SPACING = (2.0, 1.0, 1.0)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two cases: in the first the prediction is shifted by one voxel of 1 mm, in the second neither has a spleen."""
    predictions, references = tmp_path / "predicted", tmp_path / "data" / "labelsTr"
    predictions.mkdir()
    references.mkdir(parents=True)
    whole = np.zeros((6, 12, 12), dtype=np.uint8)
    whole[1:5, 2:6, 2:6], whole[1:5, 8:10, 2:6] = 1, 2
    _write(references / "a.nii.gz", whole)
    _write(predictions / "a.nii.gz", np.roll(whole, 1, axis=2))
    liver = whole * (whole == 1)
    _write(references / "b.nii.gz", liver)
    _write(predictions / "b.nii.gz", liver)
    document = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 2, "file_ending": ".nii.gz"}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(document))
    return predictions, references


def _write(path: Path, array: NDArray[Any]) -> None:
    write_array(path, array, SPACING)


def _evaluate(folders: tuple[Path, Path], *words: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, folders), *words, "--processes", "1"])


@pytest.mark.requirement("ART-16", open="corrected results in the gateway")
def test_each_label_is_measured_and_the_summary_is_nnunets(folders: tuple[Path, Path]) -> None:
    ran = _evaluate(folders, "--json")
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document["cases"] == 2
    assert document["labels"]["liver"]["Dice"] == pytest.approx((0.75 + 1) / 2)
    assert document["labels"]["liver"]["HD95"] == pytest.approx((1.0 + 0.0) / 2)
    assert document["labels"]["spleen"]["Dice"] == pytest.approx(0.75)
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert document["summary"] == str(folders[0] / "summary.json")
    assert set(summary) == {"foreground_mean", "mean", "metric_per_case"}
    second = summary["metric_per_case"][1]
    assert second["prediction_file"] == str(folders[0] / "b.nii.gz")
    assert math.isnan(second["metrics"]["2"]["Dice"])


def test_the_table_has_a_row_for_each_label_and_all(folders: tuple[Path, Path], tmp_path: Path) -> None:
    ran = _evaluate(folders, "--out", str(tmp_path / "mine.json"))
    assert ran.exit_code == 0, ran.output
    assert all(name in ran.stdout for name in ("liver", "spleen", "all", "0.8750"))
    assert (tmp_path / "mine.json").exists()
    assert not (folders[0] / "summary.json").exists()


def test_a_missing_prediction_is_an_error_unless_it_is_allowed(folders: tuple[Path, Path]) -> None:
    (folders[0] / "b.nii.gz").unlink()
    ran = _evaluate(folders, "--json")
    assert ran.exit_code == 1
    assert json.loads(ran.stdout)["error"].startswith("b has no prediction (1 such)")
    assert json.loads(_evaluate(folders, "--json", "--chill").stdout)["cases"] == 1


def test_a_prediction_without_a_reference_is_an_error(folders: tuple[Path, Path]) -> None:
    (folders[1] / "b.nii.gz").unlink()
    assert "b has no reference" in _evaluate(folders, "--chill").stderr


def test_another_grid_is_named_with_case_and_both_shapes(folders: tuple[Path, Path]) -> None:
    _write(folders[0] / "a.nii.gz", np.zeros((6, 12, 11), dtype=np.uint8))
    ran = _evaluate(folders)
    assert ran.exit_code == 1
    assert "a: a.nii.gz: shape (6, 12, 11) (z, y, x), the reference has (6, 12, 12)" in ran.stderr


def test_labels_that_nobody_named_are_asked_for(folders: tuple[Path, Path]) -> None:
    document = folders[1].parent / "dataset.json"
    document.rename(folders[0].parent / "elsewhere.json")
    assert "--dataset-json" in _evaluate(folders).stderr
    assert _evaluate(folders, "--dataset-json", str(folders[0].parent / "elsewhere.json")).exit_code == 0


@pytest.mark.parametrize("value", [7, 65535, 2**31 - 1, -1])
def test_a_value_that_is_not_declared_counts_as_no_label_with_a_warning(folders: tuple[Path, Path], value: int) -> None:
    """As in nnU-Net, which looks at the labels of dataset.json alone."""
    plain = json.loads(_evaluate(folders, "--json").stdout)
    assert plain["warnings"] == []
    prediction = folders[0] / "a.nii.gz"
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(prediction))).astype(np.int32)
    array[0, 0, 0] = value
    _write(prediction, array)
    ran = _evaluate(folders, "--json")
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    warning = f"a: prediction a.nii.gz: label {value} in 1 voxel; declared are 0 to 2; it counts as none of them"
    assert document == {**plain, "warnings": [warning]}
    assert f"seggate: warning: {warning}" in ran.stderr


def test_labels_that_predictions_and_references_describe_otherwise_are_refused(folders: tuple[Path, Path]) -> None:
    """nnU-Net puts a dataset.json beside its predictions: with the labels exchanged, each would be measured as the
    other."""
    predictions, references = folders
    document = json.loads((references.parent / "dataset.json").read_text())
    (predictions / "dataset.json").write_text(json.dumps({**document, "numTraining": 7}))
    assert _evaluate(folders).exit_code == 0
    exchanged = {**document, "labels": {"background": 0, "spleen": 1, "liver": 2}}
    for folder in (predictions, predictions.parent):  # in the folder, and above it
        (predictions / "dataset.json").unlink(missing_ok=True)
        (folder / "dataset.json").write_text(json.dumps(exchanged))
        ran = _evaluate(folders)
        assert ran.exit_code == 1
        assert "name other labels, or other values for them" in ran.stderr
    assert _evaluate(folders, "--dataset-json", str(references.parent / "dataset.json")).exit_code == 0
    (references.parent / "dataset.json").unlink()
    document = json.loads(_evaluate(folders, "--json").stdout)
    assert document["labels"]["spleen"]["HD95"] == pytest.approx(0.5)


def test_the_same_labels_in_another_order_are_no_contradiction(folders: tuple[Path, Path]) -> None:
    document = json.loads((folders[1].parent / "dataset.json").read_text())
    turned = {**document, "labels": {"spleen": 2, "liver": 1, "background": 0}}
    (folders[0] / "dataset.json").write_text(json.dumps(turned))
    assert _evaluate(folders).exit_code == 0
