"""engine.exclusions and what reads it: a case that is excluded is there and is not used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.dataset import open_dataset, unused_files
from engine.dataset_check import check_dataset
from engine.errors import DatasetInvalid
from engine.exclusions import EXCLUSIONS_JSON, exclude, read_exclusions, readmit
from engine.fingerprint import extract_fingerprint
from engine.splits import read_splits
from tests.support.raw_datasets import write_dataset


def test_an_excluded_case_keeps_reason_and_time_and_can_be_taken_back(tmp_path: Path) -> None:
    first = exclude(tmp_path, "case_01", "motion,\n  blurred")
    assert first.reason == "motion, blurred"
    assert first.excluded_at.endswith("+00:00")
    assert exclude(tmp_path, "case_01", "motion, blurred") == first
    second = exclude(tmp_path, "case_01", "wrong side")
    assert (second.reason, second.excluded_at) == ("wrong side", first.excluded_at)
    exclude(tmp_path, "case_00", "copy")
    assert list(read_exclusions(tmp_path)) == ["case_00", "case_01"]
    assert readmit(tmp_path, "case_01") == second
    assert readmit(tmp_path, "case_01") is None
    readmit(tmp_path, "case_00")
    assert not (tmp_path / EXCLUSIONS_JSON).exists()


@pytest.mark.parametrize("reason", ["", "  \n", "x" * 1001])
def test_a_reason_is_needed(tmp_path: Path, reason: str) -> None:
    with pytest.raises(DatasetInvalid, match="case_00: a reason"):
        exclude(tmp_path, "case_00", reason)


def test_the_dataset_has_the_case_no_more(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Some")
    whole = open_dataset(folder)
    exclude(folder, "case_02", "motion")
    dataset = open_dataset(folder)
    assert [case.name for case in dataset.cases] == [c.name for c in whole.cases if c.name != "case_02"]
    assert [case.name for case in dataset.excluded] == ["case_02"]
    # numTraining decides on nnU-Net's batch size, and is that of the cases in use.
    assert (whole.json.num_training, dataset.json.num_training) == (6, 5)
    assert unused_files(dataset) == ([], [])
    assert [case.name for case in extract_fingerprint(dataset, processes=1).cases] == [c.name for c in dataset.cases]


def test_a_dataset_without_a_case_left_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Some", cases=1)
    exclude(folder, "case_00", "motion")
    with pytest.raises(DatasetInvalid, match="all 1 cases are excluded"):
        open_dataset(folder)


def test_the_check_lists_it_and_reads_it_no_more(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Some")
    (folder / "imagesTr" / "case_02_0000.nii.gz").write_bytes(b"no image")
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_00", "case_02"], "val": ["case_01"]}]))
    assert not check_dataset(folder, processes=1).is_usable
    exclusion = exclude(folder, "case_02", "cannot be read")
    report = check_dataset(folder, processes=1)
    assert report.findings == ()
    assert (report.num_cases, report.excluded) == (5, (exclusion,))


def test_the_check_names_exclusions_of_cases_that_are_gone(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Some")
    exclude(folder, "case_77", "motion")
    report = check_dataset(folder, processes=1)
    assert [(f.kind, f.file) for f in report.findings] == [("unknown-excluded-case", EXCLUSIONS_JSON)]
    assert report.is_usable


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"cases": {"case_00": {"reason": "x"}}}'])
def test_a_file_that_cannot_be_read_is_a_finding(tmp_path: Path, content: str) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Some")
    (folder / EXCLUSIONS_JSON).write_text(content)
    report = check_dataset(folder, processes=1)
    assert [f.kind for f in report.findings] == ["dataset-json"]
    assert EXCLUSIONS_JSON in report.findings[0].cause


def test_splits_drop_what_is_excluded(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a", "b"], "val": ["c", "d"]}, {"train": ["c"], "val": ["a"]}]))
    (first, second) = read_splits(path, ["a", "b", "c"], excluded=["d"])
    assert (first.train, first.val, second.train, second.val) == (("a", "b"), ("c",), ("c",), ("a",))
    with pytest.raises(DatasetInvalid, match="fold 1: every case to validate on is excluded"):
        read_splits(path, ["b", "c", "d"], excluded=["a"])
    with pytest.raises(DatasetInvalid, match="fold 0: every case to validate on is excluded"):
        read_splits(path, ["a", "b", "x"], excluded=["d", "c"])
    with pytest.raises(DatasetInvalid, match="d is no case"):
        read_splits(path, ["a", "b", "c"])
