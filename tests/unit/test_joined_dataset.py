"""Old and new cases as one dataset: linked, never mixed with other cases, of one task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.dataset import open_dataset
from engine.errors import DatasetInvalid, TrainingRefused
from engine.joined_dataset import join_raw, link_preprocessed, refuse_other_task, refuse_same_names
from tests.support.raw_datasets import write_dataset


def renamed(folder: Path, *, cases: int = 2, name: str = "new", **changes: Any) -> Path:
    """A dataset whose cases are called new_00, new_01, ..."""
    write_dataset(folder, cases=cases, **changes)
    for sub in ("imagesTr", "labelsTr"):
        for path in sorted((folder / sub).iterdir()):
            path.rename(path.with_name(path.name.replace("case_", f"{name}_")))
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "Dataset901_Old", cases=3, patients={"case_00": "p0", "gone": "p9"})


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return renamed(tmp_path / "new", patients={"new_00": "p5"})


def test_the_joined_dataset_has_all_cases_and_patients_and_is_a_dataset_like_any(
    tmp_path: Path, old: Path, new: Path
) -> None:
    joined = join_raw(open_dataset(old), open_dataset(new), tmp_path / "joined")
    assert [case.name for case in joined.cases] == ["case_00", "case_01", "case_02", "new_00", "new_01"]
    assert joined.json.num_training == 5
    assert joined.json.patients == {"case_00": "p0", "new_00": "p5"}
    for case in joined.cases:
        source = (old if case.name.startswith("case") else new) / "labelsTr" / case.label.name
        assert case.label.samefile(source)


def test_it_outlives_the_datasets_that_it_was_made_of(tmp_path: Path, old: Path, new: Path) -> None:
    joined = join_raw(open_dataset(old), open_dataset(new), tmp_path / "joined")
    for folder in (old, new):
        shutil.rmtree(folder)
    assert all(case.label.stat().st_size and case.channels[0].stat().st_size for case in joined.cases)


def test_joined_again_files_stay_and_a_corrected_one_is_taken_over(tmp_path: Path, old: Path, new: Path) -> None:
    join_raw(open_dataset(old), open_dataset(new), tmp_path / "joined")
    before = {path: path.stat().st_ino for path in (tmp_path / "joined").glob("*Tr/*")}
    corrected = new / "labelsTr" / "new_00.nii.gz"
    content = (new / "labelsTr" / "new_01.nii.gz").read_bytes()
    corrected.unlink()
    corrected.write_bytes(content + b"")
    joined = join_raw(open_dataset(old), open_dataset(new), tmp_path / "joined")
    changed = {path for path, inode in before.items() if path.stat().st_ino != inode}
    assert changed == {tmp_path / "joined" / "labelsTr" / "new_00.nii.gz"}
    assert joined.cases[3].label.read_bytes() == content


def test_a_dataset_with_a_list_of_files_is_joined_under_the_usual_names(tmp_path: Path, old: Path, new: Path) -> None:
    document = json.loads((new / "dataset.json").read_text())
    document["dataset"] = {"fresh": {"images": ["imagesTr/new_00_0000.nii.gz"], "label": "labelsTr/new_00.nii.gz"}}
    (new / "dataset.json").write_text(json.dumps(document))
    joined = join_raw(open_dataset(old), open_dataset(new), tmp_path / "joined")
    assert joined.cases[-1].name == "fresh"
    assert joined.cases[-1].channels[0].name == "fresh_0000.nii.gz"


def test_cases_of_another_fine_tuning_are_never_mixed_in(tmp_path: Path, old: Path, new: Path) -> None:
    join_raw(open_dataset(old), open_dataset(new), tmp_path / "joined")
    other = renamed(tmp_path / "other", name="other")
    with pytest.raises(TrainingRefused, match=r"another fine-tuning \(new_00, 2 such\); choose another --results"):
        join_raw(open_dataset(old), open_dataset(other), tmp_path / "joined")


def test_an_excluded_case_is_left_out(tmp_path: Path, old: Path, new: Path) -> None:
    reason = {"reason": "blurred", "excluded_at": "2026-03-04T05:06:07+00:00"}
    (new / "exclusions.json").write_text(json.dumps({"cases": {"new_00": reason}}))
    joined = join_raw(open_dataset(old), open_dataset(new), tmp_path / "joined")
    assert [case.name for case in joined.cases][3:] == ["new_01"]


def test_a_missing_file_is_named(tmp_path: Path, old: Path, new: Path) -> None:
    (new / "labelsTr" / "new_01.nii.gz").unlink()
    with pytest.raises(DatasetInvalid, match=r"new_01: new_01\.nii\.gz is not there"):
        join_raw(open_dataset(old), open_dataset(new), tmp_path / "joined")


def test_a_name_that_both_have_is_refused(tmp_path: Path, old: Path) -> None:
    new = write_dataset(tmp_path / "new", cases=1)
    with pytest.raises(DatasetInvalid, match="case_00 is the name of a case of Dataset901_Old too"):
        refuse_same_names(open_dataset(old), open_dataset(new))


def _labels(document: dict[str, Any]) -> None:
    document["labels"] = {"background": 0, "second": 1, "first": 2}


def _channels(document: dict[str, Any]) -> None:
    document["channel_names"] = {"0": "CT"}


@pytest.mark.requirement("ART-21")
@pytest.mark.parametrize(("change", "named"), [(_labels, "labels are"), (_channels, "channels are")])
def test_other_labels_or_channels_are_another_model(
    old: Path, new: Path, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    document = json.loads((new / "dataset.json").read_text())
    change(document)
    (new / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(DatasetInvalid, match=f"{named}.*MAJOR version: train it anew"):
        refuse_other_task(open_dataset(old).json, open_dataset(new).json, what="new")


def test_labels_in_another_order_are_the_same(old: Path, new: Path) -> None:
    document = json.loads((new / "dataset.json").read_text())
    document["labels"] = dict(reversed(document["labels"].items()))
    (new / "dataset.json").write_text(json.dumps(document))
    refuse_other_task(open_dataset(old).json, open_dataset(new).json, what="new")


def test_preprocessed_cases_are_taken_over_whole_or_not_at_all(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("whole", "partial"):
        for part in (".npy", "_seg.npy", "_locations.npz", ".json"):
            (source / f"{name}{part}").write_text(name)
    (source / "partial.json").unlink()
    assert link_preprocessed(["whole", "partial", "absent"], source, target) == 1
    assert {path.name for path in target.iterdir()} == {
        "whole.npy",
        "whole_seg.npy",
        "whole_locations.npz",
        "whole.json",
    }
    assert link_preprocessed(["whole"], source, target) == 0
