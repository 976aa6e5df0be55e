"""A fold's validation counts for the cases and the references of today only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.dataset import RawDataset, open_dataset
from engine.errors import DatasetInvalid
from engine.evaluation import evaluate_pairs, find_pairs
from engine.metrics import SUMMARY, write_summary
from engine.prediction_record import PredictionRecord, read_record, reference_stamps, write_record
from engine.splits import Split
from engine.validated_fold import ValidatedFold
from tests.support.raw_datasets import write_array, write_dataset

NAMES = ("case_00", "case_01", "case_02")
SPLIT = Split(train=NAMES[2:], val=NAMES[:2])


@pytest.fixture
def dataset(tmp_path: Path) -> RawDataset:
    return open_dataset(write_dataset(tmp_path / "Dataset901_Tiny", cases=3))


@pytest.fixture
def fold(tmp_path: Path, dataset: RawDataset) -> Path:
    """A fold that predicted its two cases without fault."""
    validation = tmp_path / "model" / "fold_0" / "validation"
    validation.mkdir(parents=True)
    for name in SPLIT.val:
        shutil.copy(dataset.folder / "labelsTr" / f"{name}.nii.gz", validation)
    pairs = find_pairs(validation, dataset.folder / "labelsTr", ".nii.gz", chill=True)
    write_summary(validation / SUMMARY, evaluate_pairs(pairs, dataset.json.labels, processes=1))
    references = reference_stamps(case for case in dataset.cases if case.name in SPLIT.val)
    write_record(validation, PredictionRecord(predictor="mine", references=references))
    (validation.parent / "training.json").write_text(json.dumps({"val": list(SPLIT.val)}))
    return validation.parent


def _dice(fold: Path, dataset: RawDataset, split: Split = SPLIT) -> list[float]:
    validated = ValidatedFold(folder=fold, split=split, dataset=dataset)
    entries = validated.entries(processes=1, progress=lambda _done, _total: None)
    assert [Path(entry["prediction_file"]).name for entry in entries] == [f"{name}.nii.gz" for name in split.val]
    return [entry["metrics"]["1"]["Dice"] for entry in entries]


def _correct(dataset: RawDataset, *, seconds_ago: float = 0.0) -> None:
    """Another label map for the first case."""
    path = dataset.folder / "labelsTr" / "case_00.nii.gz"
    before = path.stat()
    labels = np.zeros((6, 10, 12), dtype=np.uint8)
    labels[0, 0, 0] = 1
    write_array(path, labels)
    then = before.st_mtime_ns - int(seconds_ago * 1e9)
    os.utime(path, ns=(then, then))


def test_a_fold_is_taken_as_it_was_measured(fold: Path, dataset: RawDataset) -> None:
    written = (fold / "validation" / SUMMARY).stat().st_mtime_ns
    assert _dice(fold, dataset) == [1.0, 1.0]
    assert (fold / "validation" / SUMMARY).stat().st_mtime_ns == written


def test_a_corrected_reference_is_measured_anew_however_old_its_file_is(fold: Path, dataset: RawDataset) -> None:
    _correct(dataset, seconds_ago=1000)
    assert _dice(fold, dataset) == [0.0, 1.0]
    summary = json.loads((fold / "validation" / SUMMARY).read_text())
    assert summary["mean"]["1"]["Dice"] == 0.5
    written = (fold / "validation" / SUMMARY).stat().st_mtime_ns
    assert _dice(fold, dataset) == [0.0, 1.0]
    assert (fold / "validation" / SUMMARY).stat().st_mtime_ns == written
    record = read_record(fold / "validation")
    assert record is not None
    assert record.predictor == "mine"


def test_without_a_record_a_reference_that_is_newer_than_the_summary_is_measured_anew(
    fold: Path, dataset: RawDataset
) -> None:
    (fold / "validation" / "predicted_by.json").unlink()
    _correct(dataset, seconds_ago=1000)
    assert _dice(fold, dataset) == [1.0, 1.0]
    os.utime(dataset.folder / "labelsTr" / "case_00.nii.gz")
    assert _dice(fold, dataset) == [0.0, 1.0]


@pytest.mark.parametrize("val", [NAMES, NAMES[:1], (NAMES[0], NAMES[2])])
def test_a_fold_of_other_splits_is_refused_with_its_cases(
    fold: Path, dataset: RawDataset, val: tuple[str, ...]
) -> None:
    split = Split(train=("case_09",), val=val)
    with pytest.raises(DatasetInvalid, match=r"model: fold_0 is of other folds .*case_0\d.*train it again, or put"):
        _dice(fold, dataset, split)


def test_what_training_json_says_counts_too(fold: Path, dataset: RawDataset) -> None:
    (fold / "training.json").write_text(json.dumps({"val": [NAMES[2]]}))
    with pytest.raises(DatasetInvalid, match="case_00, case_01 now, case_02 then"):
        _dice(fold, dataset)
    (fold / "training.json").unlink()
    assert _dice(fold, dataset) == [1.0, 1.0]


def test_a_case_that_the_dataset_has_no_more_is_left_out(fold: Path, dataset: RawDataset) -> None:
    for path in (dataset.folder / "imagesTr" / "case_00_0000.nii.gz", dataset.folder / "labelsTr" / "case_00.nii.gz"):
        path.unlink()
    assert _dice(fold, open_dataset(dataset.folder), Split(train=NAMES[2:], val=NAMES[1:2])) == [1.0]
