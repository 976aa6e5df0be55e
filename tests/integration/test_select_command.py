"""`seggate select`: what cross-validation says of models and of models joined, and what is written of it."""
# ruff: noqa: E402

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.nifti import read_label_map
from engine.result_folder import open_result
from tests.support.raw_datasets import write_array
from tests.support.tiny_experiment import NAME, planned, seggate, shown

PREFIX = "nnUNetTrainer__nnUNetPlans__"
PAIR = f"ensemble___{PREFIX}2d___{PREFIX}3d_fullres___0_1"
CASES = {f"case_{index:02}.nii.gz" for index in range(6)}
LEARNS = ("--epochs", "4", "--iterations", "10", "--precision", "float32", "--threads", "1", "--deterministic")


@pytest.fixture(scope="module", autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two configurations, two folds each."""
    root = tmp_path_factory.mktemp("trained")
    words = ["train", str(planned(root)), "--configuration", "2d", "--configuration", "3d_fullres", *LEARNS]
    ran = seggate(root, *words)
    assert ran.exit_code == 0, ran.output
    return root


@pytest.fixture(scope="module")
def selected(trained: Path) -> Any:
    ran = seggate(trained, "select", str(trained / NAME), "--json")
    assert ran.exit_code == 0, ran.output
    return shown(ran)


def _models(trained: Path) -> Path:
    return trained / "results" / NAME


def _dice(folder: Path) -> float:
    value: float = json.loads((folder / "summary.json").read_text())["foreground_mean"]["Dice"]
    return value


@pytest.mark.requirement("ART-11")
def test_the_folds_of_a_model_are_put_together_case_by_case(trained: Path, selected: Any) -> None:
    folder = _models(trained) / f"{PREFIX}3d_fullres" / "crossval_results_folds_0_1"
    assert {path.name for path in folder.glob("*.nii.gz")} == CASES
    assert {"plans.json", "dataset.json", "summary.json"} <= {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    per_case = [entry["metrics"]["1"]["Dice"] for entry in summary["metric_per_case"]]
    assert len(per_case) == 6
    assert summary["mean"]["1"]["Dice"] == pytest.approx(np.mean(per_case))
    fold = _models(trained) / f"{PREFIX}3d_fullres" / "fold_1" / "validation"
    assert (folder / "case_01.nii.gz").read_bytes() == (fold / "case_01.nii.gz").read_bytes()
    assert selected["candidates"][f"{PREFIX}3d_fullres"] == _dice(folder)


@pytest.mark.requirement("ART-11")
def test_two_models_are_joined_by_the_mean_of_their_probabilities(trained: Path, selected: Any) -> None:
    folder = _models(trained) / "ensembles" / PAIR
    assert {path.name for path in folder.glob("*.nii.gz")} == CASES
    logits = [
        np.load(_models(trained) / f"{PREFIX}{c}" / "fold_0" / "validation_logits" / "case_00.npy").astype(np.float32)
        for c in ("2d", "3d_fullres")
    ]
    both = sum(np.exp(x) / np.exp(x).sum(axis=0) for x in logits)
    # Every case has one spacing, so the networks' grid is the image's own.
    assert np.array_equal(read_label_map(folder / "case_00.nii.gz").array, np.argmax(both, axis=0))
    assert selected["candidates"][PAIR] == _dice(folder)


def test_the_highest_score_wins_and_is_written_as_nnunet_does(trained: Path, selected: Any) -> None:
    scores = selected["candidates"]
    assert len(scores) == 3
    information = json.loads((_models(trained) / "inference_information.json").read_text())
    assert information["all_results"] == scores
    assert information["folds"] == [0, 1]
    best = information["best_model_or_ensemble"]
    assert best["result_on_crossval_pre_pp"] == max(scores.values())
    assert best["result_on_crossval_post_pp"] >= best["result_on_crossval_pre_pp"]
    assert [m["configuration"] for m in best["selected_model_or_models"]] == selected["selected"]
    assert Path(best["postprocessing_file"]).exists()
    assert not math.isnan(_dice(Path(selected["folder"]) / "postprocessed"))
    assert selected["foreground_mean"]["Dice"] == _dice(Path(selected["folder"]) / "postprocessed")


def test_the_choice_is_what_an_import_of_the_datasets_folder_takes(trained: Path, selected: Any) -> None:
    with open_result(_models(trained)) as result:
        assert sorted(c.name for c in result.configurations) == sorted(selected["selected"])
        document = json.loads((Path(selected["folder"]) / "postprocessing.json").read_text())
        assert result.postprocessing is not None
        assert result.postprocessing["postprocessing_fns"] == document["postprocessing_fns"]


def test_predictions_that_are_there_are_not_joined_again(trained: Path, selected: Any) -> None:
    folder = _models(trained) / "ensembles" / PAIR
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}
    again = shown(seggate(trained, "select", str(trained / NAME), "--json"))
    assert again == selected
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")} == before


def test_without_logits_no_ensemble_is_tried_and_that_is_said(tmp_path: Path, trained: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "results" / NAME / f"{PREFIX}2d" / "fold_1" / "validation_logits")
    found = shown(seggate(copy, "select", str(copy / NAME), "--json"))
    assert set(found["candidates"]) == {f"{PREFIX}2d", f"{PREFIX}3d_fullres"}
    assert found["notes"] == ["2d kept no logits: no ensemble with it was tried"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--fold", "all"], "nothing can be chosen by it"),
        (["--profile", "article"], "no configuration has all of the folds 0, 1"),
        (["--configuration", "4d"], "no configuration '4d'"),
    ],
)
def test_what_cannot_be_chosen_is_said(trained: Path, words: list[str], named: str) -> None:
    ran = seggate(trained, "select", str(trained / NAME), *words)
    assert ran.exit_code == 1
    assert named in ran.stderr


def test_a_fold_that_is_not_validated_is_named(tmp_path: Path, trained: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "results" / NAME / f"{PREFIX}2d" / "fold_1")
    ran = seggate(copy, "select", str(copy / NAME), "--configuration", "2d")
    assert ran.exit_code == 1
    assert "fold 1 is not validated" in ran.stderr
    ran = seggate(copy, "select", str(copy / NAME))
    assert ran.exit_code == 0, ran.output
    assert "3d_fullres" in ran.stdout


def test_a_fold_that_was_trained_on_other_splits_is_named(tmp_path: Path, trained: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    splits = copy / "preprocessed" / NAME / "splits_final.json"
    old = json.loads(splits.read_text())
    names = sorted(old[0]["train"] + old[0]["val"])
    splits.write_text(json.dumps([{"train": names[3:], "val": names[:3]}, {"train": names[:3], "val": names[3:]}]))
    ran = seggate(copy, "select", str(copy / NAME), "--json")
    assert ran.exit_code == 1
    error = shown(ran)["error"]
    assert (
        "fold_0 is of other folds than those of splits_final.json (validation cases: case_01 now, case_04 then)"
        in error
    )


def test_a_network_that_is_not_the_one_that_was_validated_is_named(tmp_path: Path, trained: Path) -> None:
    """A copy put back, or a training that nnU-Net continued: its figures are nobody's."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    model = copy / "results" / NAME / f"{PREFIX}3d_fullres"
    before = (model / "fold_0" / "checkpoint_final.pth").read_bytes()
    shutil.copy(model / "fold_1" / "checkpoint_final.pth", model / "fold_0" / "checkpoint_final.pth")
    named = "fold_0/checkpoint_final.pth has changed since it was validated"
    ran = seggate(copy, "select", str(copy / NAME), "--configuration", "3d_fullres")
    assert (ran.exit_code, named in ran.stderr) == (1, True), ran.output
    ran = seggate(copy, "train", str(copy / NAME), "--configuration", "3d_fullres", *LEARNS)
    assert (ran.exit_code, named in ran.stderr) == (1, True), ran.output
    (model / "fold_0" / "checkpoint_final.pth").write_bytes(before)
    assert seggate(copy, "select", str(copy / NAME), "--configuration", "3d_fullres").exit_code == 0


def test_patients_in_training_and_validation_are_told_wherever_figures_are(tmp_path: Path, trained: Path) -> None:
    """They were stated after the folds were dealt."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    raw = copy / NAME
    document = json.loads((raw / "dataset.json").read_text())
    document["patients"] = {f"case_{index:02}": f"p{index // 2}" for index in range(6)}
    (raw / "dataset.json").write_text(json.dumps(document))
    told = "3 patient(s) are in training and validation of one fold"
    found = shown(seggate(copy, "select", str(raw), "--configuration", "3d_fullres", "--json"))
    assert told in found["notes"][0]
    exported = shown(seggate(copy, "export", str(raw), "--no-calibration", "--json"))
    assert any(told in note for note in exported["notes"])
    assert told in exported["description"]
    shutil.rmtree(copy / "results")
    words = ("--configuration", "3d_fullres", "--fold", "0", "--epochs", "1", "--iterations", "1")
    ran = seggate(copy, "train", str(raw), *words, "--precision", "float32", "--threads", "1")
    assert (ran.exit_code, told in ran.stderr.replace("\n", " ")) == (0, True), ran.output


def test_networks_of_plans_that_were_made_anew_since_are_named(tmp_path: Path, trained: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    plans = copy / "preprocessed" / NAME / "nnUNetPlans.json"
    document = json.loads(plans.read_text())
    document["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    plans.write_text(json.dumps(document))
    ran = seggate(copy, "select", str(copy / NAME), "--configuration", "3d_fullres")
    assert ran.exit_code == 1
    assert "3d_fullres was trained with another plans.json than that of now" in ran.stderr


def test_corrected_label_maps_are_measured_anew(tmp_path: Path, trained: Path, selected: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for index in range(6):
        labels = np.zeros((10, 16, 18), dtype=np.uint8)
        labels[0, 0, :2] = 1, 2
        write_array(copy / NAME / "labelsTr" / f"case_{index:02}.nii.gz", labels, (1.0, 1.0, 1.0))
    found = shown(seggate(copy, "select", str(copy / NAME), "--json"))
    assert found["candidates"].keys() == selected["candidates"].keys()
    assert all(found["candidates"][name] < 0.1 < score for name, score in selected["candidates"].items())


@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_prediction_is_named_and_made_again(tmp_path: Path, trained: Path, gone: bool) -> None:
    """As a power failure leaves it; of the one model that there is."""
    root = tmp_path / "moved"
    shutil.copytree(trained, root)
    path = root / "results" / NAME / f"{PREFIX}3d_fullres" / "fold_1" / "validation" / "case_03.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    if gone:
        path.unlink()
    words = ("select", str(root / NAME), "--configuration", "3d_fullres", "--json")
    ran = seggate(root, *words)
    assert ran.exit_code == 1
    assert str(path) in shown(ran)["error"]
    assert "--configuration 3d_fullres --fold 1` predicts it again" in shown(ran)["error"]
    path.unlink(missing_ok=True)
    ran = seggate(root, "train", str(root / NAME), "--configuration", "3d_fullres", "--fold", "1", *LEARNS)
    assert ran.exit_code == 0, ran.output
    assert path.read_bytes() == content
    assert seggate(root, *words).exit_code == 0


def test_logits_that_were_cut_short_are_none(tmp_path: Path, trained: Path) -> None:
    root = tmp_path / "moved"
    shutil.copytree(trained, root)
    path = root / "results" / NAME / f"{PREFIX}2d" / "fold_0" / "validation_logits" / "case_00.npy"
    os.truncate(path, path.stat().st_size // 2)
    ran = seggate(root, "select", str(root / NAME), "--json")
    assert ran.exit_code == 0, ran.output
    assert "2d kept no logits: no ensemble with it was tried" in shown(ran)["notes"]
