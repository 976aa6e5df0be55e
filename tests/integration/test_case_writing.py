"""gateway.learning.case_writing: results with right labels become a dataset that trains on what inference saw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.dataset import DatasetJson, open_dataset, read_case, read_dataset_json
from engine.dataset_check import check_dataset
from engine.dataset_lock import changing_dataset
from engine.errors import DatasetBusy
from engine.labels import LabelManager
from engine.volume import Geometry
from gateway.errors import Rejected
from gateway.learning.case_writing import WrittenCases, case_name, write_cases
from gateway.learning.corrected_labels import CorrectedLabels
from gateway.learning.corrections import record_correction
from gateway.learning.result_source import result_source
from gateway.results.inference import load_labels
from gateway.results.series import decode
from storage.records import Result
from tests.support.live_results import LiveModel, live_model

DOCUMENT = {
    "name": "Phantom",
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "left structure": 1, "right structure": 2},
    "numTraining": 100,
    "file_ending": ".nii.gz",
    "licence": "CC0",
    "patients": {"old": "somebody"},
    "dataset": {"old": {"images": ["x_0000.nii.gz"], "label": "x.nii.gz"}},
}
ORIENTATION = "RAS"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveModel]:
    with live_model(tmp_path) as live:
        yield live


def dataset_json(folder: Path, **changes: Any) -> DatasetJson:
    path = folder / "model" / "dataset.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(DOCUMENT | changes))
    return read_dataset_json(path)


def approve(live: LiveModel, result_id: str) -> None:
    record_correction(live.database, live.spool, result_id, kind="approved", by="reader")


def correct(live: LiveModel, result_id: str) -> NDArray[Any]:
    """Other labels, on the grid of the series."""
    source = result_source(live.database, live.spool, result_id)
    right = load_labels(live.spool, source.result).copy()
    right[3:5, 2:6, 1:4] = 2
    labels = CorrectedLabels(
        array=right,
        geometry=source.part().geometry,
        labels=LabelManager.from_dataset_json(DOCUMENT),
    )
    record_correction(live.database, live.spool, result_id, kind="corrected", by="reader", labels=labels)
    return right


def write(live: LiveModel, results: list[str], target: Path, **options: Any) -> WrittenCases:
    chosen: dict[str, Any] = {"dataset_json": dataset_json(live.folder), "orientation": ORIENTATION, **options}
    return write_cases(live.database, live.spool, results, target, **chosen)


def contents(target: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in target.rglob("*") if path.is_file())
    return {str(path.relative_to(target)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.requirement("ART-21", "ART-26")
@pytest.mark.parametrize("orientation", [ORIENTATION, "PIR"])
def test_a_training_reads_the_very_voxels_that_the_model_saw_and_the_right_labels(
    tmp_path: Path, orientation: str
) -> None:
    """Series of any orientation and order; images and labels in the voxel order of the model, in the same place."""
    with live_model(tmp_path, orientation=orientation) as live:
        results = [
            live.serve(orientation=o, order=order, instance_numbers="against", rescale=rescale)
            for o, order, rescale in (
                ("axial-mirrored", "reversed", "shared"),
                ("double-oblique", "shuffled", "shared"),
                ("sagittal", "ascending", "per-slice"),
            )
        ]
        approve(live, results[0])
        approve(live, results[2])
        right = {results[1]: correct(live, results[1])}
        written = write(live, results, tmp_path / "Dataset901_Live", orientation=orientation)
        assert dict(written.names) == {result_id: f"live_{result_id}" for result_id in results}
        assert (written.made, dict(written.left_out)) == (3, {})
        dataset = open_dataset(tmp_path / "Dataset901_Live")
        assert check_dataset(tmp_path / "Dataset901_Live", processes=1).is_usable
        assert dataset.json.num_training == 3
        for result_id in results:
            case = next(c for c in dataset.cases if c.name == case_name(result_id))
            loaded = read_case(case, dataset.json)
            source = result_source(live.database, live.spool, result_id)
            volume = decode(source.part()).volume
            assert volume is not None
            seen, change = volume.reoriented(orientation)  # as Predictor.predict begins
            assert loaded.volume.array.dtype == np.float32
            assert np.array_equal(loaded.volume.array, seen.array)
            assert loaded.volume.geometry.same_grid(seen.geometry, tolerance_mm=0.01)
            assert loaded.volume.geometry.orientation == orientation
            labels = right.get(result_id, load_labels(live.spool, source.result))
            assert np.array_equal(loaded.labels.array, change.apply(labels))
            # The model finds in its own case what it found in the study.
            again = live.shelf.predictor(live.shelf.version("", "1.0.0")).predict(loaded.volume).labels
            assert np.array_equal(again.array, change.apply(load_labels(live.spool, source.result)))


def test_dataset_json_is_the_model_s_own_with_these_cases(live: LiveModel, tmp_path: Path) -> None:
    results = [live.serve(), live.serve()]
    for result_id in results:
        approve(live, result_id)
    write(live, results, tmp_path / "Dataset901_Live")
    document = json.loads((tmp_path / "Dataset901_Live" / "dataset.json").read_text())
    patients = document.pop("patients")
    assert document == {
        "name": "Phantom",
        "channel_names": {"0": "CT"},
        "labels": DOCUMENT["labels"],
        "file_ending": ".nii.gz",
        "licence": "CC0",
        "numTraining": 2,
    }
    assert patients.keys() == {case_name(result_id) for result_id in results}


@pytest.mark.requirement("ART-21")
def test_a_patient_s_cases_stay_together_and_nothing_says_who_it_is(live: LiveModel, tmp_path: Path) -> None:
    results = [live.serve(patient_id=name) for name in ("SECRET-1", "secret-1 ", "SECRET-2")]
    for result_id in results:
        approve(live, result_id)
    target = tmp_path / "Dataset901_Live"
    write(live, results, target)
    patients = json.loads((target / "dataset.json").read_text())["patients"]
    one, same, other = (patients[case_name(result_id)] for result_id in results)
    assert one == same != other
    everything = b"".join(name.encode() + data for name, (data, _) in contents(target).items()).lower()
    assert b"secret" not in everything
    assert b"confidential" not in everything
    salt = target.with_name("Dataset901_Live.salt")
    assert salt.stat().st_mode & 0o077 == 0
    # The salt keeps pseudonyms as they are; with another one they are others.
    write(live, results[:2], target)
    assert json.loads((target / "dataset.json").read_text())["patients"][case_name(results[0])] == one
    salt.unlink()
    write(live, results, target)
    assert json.loads((target / "dataset.json").read_text())["patients"][case_name(results[0])] != one


@pytest.mark.requirement("ART-21")
def test_started_again_only_what_is_missing_or_changed_is_made(live: LiveModel, tmp_path: Path) -> None:
    results = [live.serve(), live.serve(), live.serve()]
    for result_id in results:
        approve(live, result_id)
    target = tmp_path / "Dataset901_Live"
    assert write(live, results, target).made == 3
    before = contents(target)
    again = write(live, results, target)
    assert again.made == 0
    assert contents(target) == before

    # A file that was cut short, one that is gone, and labels that a reader gave meanwhile.
    short = target / "imagesTr" / f"{case_name(results[0])}_0000.nii.gz"
    short.write_bytes(short.read_bytes()[:-9])
    (target / "labelsTr" / f"{case_name(results[1])}.nii.gz").unlink()
    assert write(live, results, target).made == 2
    assert {name: data for name, (data, _) in contents(target).items()} == {
        name: data for name, (data, _) in before.items()
    }
    correct(live, results[2])
    written = write(live, results, target)
    assert written.made == 1
    changed = {name for name, (data, _) in contents(target).items() if before[name][0] != data}
    assert changed == {"cases.json", f"labelsTr/{case_name(results[2])}.nii.gz"}
    assert written.corrections[results[2]] > written.corrections[results[1]]


def test_a_run_that_was_killed_leaves_no_dataset_and_goes_on(
    live: LiveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [live.serve(), live.serve(), live.serve()]
    for result_id in results:
        approve(live, result_id)
    target = tmp_path / "Dataset901_Live"
    write(live, results[:1], target)

    def killed(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(live, results, target, progress=killed)
    assert not (target / "dataset.json").exists()
    (target / "imagesTr" / ".half.nii.gz").write_bytes(b"")
    assert write(live, results, target).made == 1
    assert len(open_dataset(target).cases) == 3
    assert not (target / "imagesTr" / ".half.nii.gz").exists()


def test_a_case_that_is_no_longer_wanted_leaves_with_its_files(live: LiveModel, tmp_path: Path) -> None:
    results = [live.serve(), live.serve()]
    for result_id in results:
        approve(live, result_id)
    target = tmp_path / "Dataset901_Live"
    write(live, results, target)
    written = write(live, results[1:], target)
    assert (written.made, list(written.names)) == (0, results[1:])
    assert [case.name for case in open_dataset(target).cases] == [case_name(results[1])]
    assert not any(results[0] in name for name in contents(target))


def test_what_cannot_be_a_case_is_left_out_with_the_reason(live: LiveModel, tmp_path: Path) -> None:
    good, unread, rejected, gone, tilted, foreign = (
        live.serve(tilt_deg=15.0 if index == 4 else 0.0) for index in range(6)
    )
    for result_id in (good, gone, tilted, foreign):
        approve(live, result_id)
    record_correction(live.database, live.spool, rejected, kind="rejected", by="reader", reason="motion")
    shutil.rmtree(result_source(live.database, live.spool, gone).files[0].parent)
    with live.database.session() as session:
        labels = load_labels(live.spool, session.get_one(Result, foreign)).copy()
        labels[0, 0, 0] = 9
    geometry = Geometry(shape=labels.shape, affine_lps=np.diag([2.0, 2.0, 2.0, 1.0]))
    nine = LabelManager.from_dataset_json(
        {"labels": {"background": 0, **{f"l{value}": value for value in range(1, 10)}}}
    )
    record_correction(
        live.database,
        live.spool,
        foreign,
        kind="corrected",
        by="reader",
        labels=CorrectedLabels(array=labels, geometry=geometry, labels=nine),
    )
    results = [good, unread, rejected, gone, tilted, foreign, "f" * 40]
    written = write(live, results, tmp_path / "Dataset901_Live")
    assert list(written.names) == [good]
    reasons = dict(written.left_out)
    assert set(reasons) == set(results) - {good}
    assert "nobody said which labels are right" in reasons[unread]
    assert "nobody said which labels are right" in reasons[rejected]
    assert "not in the spool" in reasons[gone]
    assert "tilted gantry" in reasons[tilted]
    assert "label 9 in 1 voxel; declared are 0 to 2" in reasons[foreign]
    assert "there is no result" in reasons["f" * 40]
    with pytest.raises(Rejected, match=r"no case to learn from can be written: .*nobody said"):
        write(live, [unread], tmp_path / "Dataset902_None")


def test_a_folder_of_others_is_not_touched_and_one_in_use_is_waited_for(live: LiveModel, tmp_path: Path) -> None:
    result_id = live.serve()
    approve(live, result_id)
    other = tmp_path / "Dataset001_Other"
    (other / "imagesTr").mkdir(parents=True)
    (other / "imagesTr" / "a_0000.nii.gz").write_bytes(b"x")
    with pytest.raises(Rejected, match="holds another dataset"):
        write(live, [result_id], other)
    assert [path.name for path in other.rglob("*") if path.is_file()] == ["a_0000.nii.gz"]
    target = tmp_path / "Dataset901_Live"
    with changing_dataset(target), pytest.raises(DatasetBusy):
        write(live, [result_id], target)
    two = dataset_json(tmp_path, channel_names={"0": "T1", "1": "T2"})
    with pytest.raises(Rejected, match="takes 2 channels"):
        write(live, [result_id], target, dataset_json=two)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_files_have_the_ending_of_the_model_s_dataset(live: LiveModel, tmp_path: Path, ending: str) -> None:
    result_id = live.serve(orientation="oblique")
    approve(live, result_id)
    target = tmp_path / "Dataset901_Live"
    write(live, [result_id], target, dataset_json=dataset_json(tmp_path, file_ending=ending, dataset={}, patients={}))
    document = json.loads((target / "dataset.json").read_text())
    assert document["file_ending"] == ending
    dataset = open_dataset(target)
    loaded = read_case(dataset.cases[0], dataset.json)
    source = result_source(live.database, live.spool, result_id)
    volume = decode(source.part()).volume
    assert volume is not None
    seen, change = volume.reoriented(ORIENTATION)
    assert np.array_equal(loaded.volume.array, seen.array)
    assert np.array_equal(loaded.labels.array, change.apply(load_labels(live.spool, source.result)))
