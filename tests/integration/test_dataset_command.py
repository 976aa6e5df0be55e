"""`seggate dataset check`: exit codes, the table for people, the document for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from tests.support.raw_datasets import write_dataset, write_faulty_dataset


def _check(*words: str) -> Result:
    return CliRunner().invoke(app, ["dataset", "check", *words])


@pytest.mark.requirement("ART-01")
def test_a_clean_dataset_ends_with_0(tmp_path: Path) -> None:
    ran = _check(str(write_dataset(tmp_path / "Dataset001_Clean")), "--processes", "2")
    assert ran.exit_code == 0, ran.output
    assert "6 cases, 0 errors, 0 warnings" in ran.stdout


@pytest.mark.requirement("ART-01")
def test_an_error_ends_with_1_and_names_case_file_cause_and_remedy(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Bad")
    (folder / "labelsTr" / "case_03.nii.gz").unlink()
    shown = _check(str(folder), "--processes", "1")
    assert shown.exit_code == 1
    assert "case_03.nii.gz" in shown.stdout
    ran = _check(str(folder), "--processes", "1", "--json")
    assert ran.exit_code == 1
    document = json.loads(ran.stdout)
    assert document["ok"] is False
    assert document["cases"] == 6
    (finding,) = document["findings"]
    assert finding["severity"] == "error"
    assert finding["kind"] == "missing-label"
    assert finding["case"] == "case_03"
    assert finding["file"] == "case_03.nii.gz"
    assert finding["cause"] == "is not there"
    assert "add the label map" in finding["remedy"]


def test_a_warning_ends_with_0(tmp_path: Path) -> None:
    ran = _check(str(write_dataset(tmp_path / "odd name")), "--processes", "1", "--json")
    assert ran.exit_code == 0
    assert [f["kind"] for f in json.loads(ran.stdout)["findings"]] == ["dataset-name"]


def test_patients_that_are_stated_after_planning_are_a_warning_where_folds_tear_them_apart(tmp_path: Path) -> None:
    names = [f"case_{index:02}" for index in range(6)]
    raw = write_dataset(tmp_path / "Dataset001_Late", patients={name: f"p{int(name[5:]) // 2}" for name in names})
    words = (str(raw), "--processes", "1", "--json")
    assert json.loads(_check(*words).stdout)["findings"] == []
    planned = tmp_path / "preprocessed" / "Dataset001_Other"
    planned.mkdir(parents=True)
    splits = [{"train": names[1::2], "val": names[::2]}, {"train": names[2:], "val": names[:2]}]
    (planned / "splits_final.json").write_text(json.dumps(splits))
    where = ("--preprocessed", str(planned.parent))
    assert json.loads(_check(*words, *where).stdout)["findings"] == []
    ran = _check(*words, *where, "--dataset-name", planned.name)
    assert ran.exit_code == 0
    (finding,) = json.loads(ran.stdout)["findings"]
    assert (finding["kind"], finding["severity"], finding["file"]) == ("mixed-patients", "warning", "splits_final.json")
    assert finding["cause"].startswith("3 patient(s) are in training and validation of one fold")
    assert "seggate plan --splits stratified" in finding["remedy"]
    # Folds of its own, before anything is planned.
    (raw / "splits_final.json").write_text(json.dumps(splits))
    assert [f["kind"] for f in json.loads(_check(*words).stdout)["findings"]] == ["mixed-patients"]
    (planned / "splits_final.json").write_text(json.dumps(splits[1:]))
    assert json.loads(_check(*words, *where, "--dataset-name", planned.name).stdout)["findings"] == []


def test_a_folder_that_is_no_dataset_is_said_without_a_traceback(tmp_path: Path) -> None:
    ran = _check(str(tmp_path))
    assert ran.exit_code == 1
    assert "dataset.json" in ran.stdout
    assert "Traceback" not in ran.output


def test_every_fault_of_a_dataset_is_listed_by_one_run_without_a_traceback(tmp_path: Path) -> None:
    folder = str(write_faulty_dataset(tmp_path / "Dataset001_Bad"))
    ran = _check(folder, "--processes", "2", "--json")
    assert ran.exit_code == 1
    severities = {f["kind"]: f["severity"] for f in json.loads(ran.stdout)["findings"]}
    assert severities == {
        **dict.fromkeys(
            ("num-training", "file-name", "splits", "missing-label", "unexpected-label", "not-finite", "grid",
             "channel-count", "unreadable", "all-zero"),
            "error",
        ),
        **dict.fromkeys(
            ("label-without-image", "unknown-patient-case", "position", "thin-volume", "empty-foreground",
             "duplicate-image", "constant-image"),
            "warning",
        ),
    }  # fmt: skip
    shown = _check(folder, "--processes", "1")
    assert shown.exit_code == 1
    assert all(f"case_{index:02}" in shown.stdout for index in range(14) if index != 11)
    assert "Traceback" not in ran.output + shown.output
