"""The cascade from its first stage to a bundle: `seggate train` on plans with 3d_lowres and 3d_cascade_fullres."""
# ruff: noqa: E402

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch", "blosc2")

import torch

from engine.dataset import open_dataset, read_case
from engine.experiment import open_experiment
from engine.export import import_model
from engine.fold_request import FoldReport, FoldRequest
from engine.fold_training import train_fold
from engine.nifti import read_label_map
from engine.predictor import Predictor
from engine.schedule import Schedule
from engine.stage_predictions import PreviousStage, predicted_by, stage_folder
from engine.training_checkpoint import FINAL, LATEST, read_state
from engine.training_profile import TRAINING_PROFILES
from tests.support.tiny_experiment import NAME, planned, seggate, shown
from tests.support.tiny_training import same_weights

LOWRES, CASCADE = "3d_lowres", "3d_cascade_fullres"
PREFIX = "nnUNetTrainer__nnUNetPlans__"
SHORT = ("--epochs", "2", "--iterations", "3", "--precision", "float32", "--threads", "1", "--deterministic")
ONCE = ("--epochs", "1", "--iterations", "1", *SHORT[4:])
CASES = tuple(f"case_{index:02}" for index in range(6))


@pytest.fixture(scope="module", autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(root: Path, *words: str) -> Any:
    ran = seggate(root, *words, "--json")
    assert ran.exit_code == 0, ran.output
    return shown(ran)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """`train --all` of the cascade alone, and what it printed."""
    root = tmp_path_factory.mktemp("trained")
    raw = planned(root, cascade=True)
    return root, _run(root, "train", "--all", str(raw), "--configuration", CASCADE, *SHORT)


def _model(root: Path, configuration: str) -> Path:
    return root / "results" / NAME / f"{PREFIX}{configuration}"


def _predictions(root: Path) -> dict[str, Any]:
    """By case, its label map from the first stage and the fold that made it."""
    folder = stage_folder(_model(root, LOWRES), CASCADE)
    previous = PreviousStage(folder=folder, digest="")
    return {name: (predicted_by(folder, name), previous.labels(name, (10, 16, 18))) for name in CASES}


@pytest.mark.requirement("ART-05")
def test_the_first_stage_is_trained_first_and_goes_into_the_bundle(trained: tuple[Path, Any]) -> None:
    root, document = trained
    assert [(row["model"].removeprefix(PREFIX), row["fold"]) for row in document["folds"]] == [
        (LOWRES, "0"),
        (LOWRES, "1"),
        (CASCADE, "0"),
        (CASCADE, "1"),
    ]
    assert all(row["state"] == "finished" for row in document["folds"])
    assert list(document["selection"]["candidates"]) == [f"{PREFIX}{CASCADE}"]
    assert document["configurations"] == {CASCADE: ["0", "1"], LOWRES: ["0", "1"]}
    assert f"<h1>{PREFIX}{CASCADE}</h1>" in (_model(root, CASCADE) / "report.html").read_text()
    status = _run(root, "train", "status", NAME)["folds"]
    assert {row["state"] for row in status} == {"finished"}


def test_each_case_is_predicted_by_the_fold_that_validated_it(trained: tuple[Path, Any]) -> None:
    found = _predictions(trained[0])
    assert [fold for fold, _ in found.values()] == ["0", "1"] * 3
    for _, labels in found.values():
        assert labels.dtype == np.uint8
        assert labels.max() <= 2
    # The grid of the image: what the fold wrote for people is what the cascade reads.
    for name in CASES[::2]:
        written = read_label_map(_model(trained[0], LOWRES) / "fold_0" / "validation" / f"{name}.nii.gz")
        assert np.array_equal(found[name][1], written.array)
    files = {path.name for path in stage_folder(_model(trained[0], LOWRES), CASCADE).iterdir()}
    assert files == {f"{name}{suffix}" for name in CASES for suffix in (".b2nd", ".json")}


@pytest.mark.requirement("ART-13", open="a GPU")
def test_a_bundle_of_the_cascade_predicts_what_its_validation_did(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """Each of the two folds by itself, on the cases that it never saw; without post-processing."""
    root = tmp_path / "copy"
    shutil.copytree(trained[0], root)
    shutil.rmtree(_model(root, CASCADE) / "crossval_results_folds_0_1")
    dataset = open_dataset(root / NAME)
    for fold, names in (("0", CASES[::2]), ("1", CASES[1::2])):
        bundle = import_model(_model(root, CASCADE), tmp_path / fold, folds=(fold,))
        assert [c.previous_stage for c in bundle.configurations] == [LOWRES, None]
        with Predictor(bundle, device="cpu", threads=1) as predictor:
            for case in (case for case in dataset.cases if case.name in names):
                found = predictor.predict(read_case(case, dataset.json).volume).labels.array
                path = _model(root, CASCADE) / f"fold_{fold}" / "validation" / f"{case.name}.nii.gz"
                expected = read_label_map(path).array
                assert np.array_equal(found, expected)
                assert expected.any(), "a model that finds nothing proves nothing"


@pytest.mark.parametrize("kept_logits", [True, False])
def test_a_finished_fold_makes_predictions_that_are_missing_without_training(
    trained: tuple[Path, Any], tmp_path: Path, kept_logits: bool
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(trained[0], root)
    before, folder = _predictions(root), stage_folder(_model(root, LOWRES), CASCADE)
    final = _model(root, LOWRES) / "fold_1" / FINAL
    written = final.stat().st_mtime_ns
    shutil.rmtree(folder)
    if not kept_logits:
        for fold in ("fold_0", "fold_1"):
            shutil.rmtree(_model(root, LOWRES) / fold / "validation_logits")
    words = SHORT if kept_logits else (*SHORT, "--no-keep-logits")
    assert _run(root, "train", str(root / NAME), "--configuration", LOWRES, *words)["state"] == "finished"
    after = _predictions(root)
    assert final.stat().st_mtime_ns == written
    for name, (fold, labels) in before.items():
        assert after[name][0] == fold
        assert np.array_equal(after[name][1], labels)


def _request(root: Path, fold: str, **changes: Any) -> FoldRequest:
    experiment = open_experiment(root / NAME, root / "preprocessed", plans_name=None)
    request = FoldRequest(
        experiment=experiment,
        results=root / "results",
        configuration=CASCADE,
        fold=fold,
        profile=TRAINING_PROFILES["nnunet"],
        schedule=Schedule(epochs=2, iterations=3),
        seed=0,
        device=torch.device("cpu"),
        precision="float32",
        deterministic=True,
    )
    return replace(request, **changes)


def test_a_fold_that_was_stopped_anywhere_ends_as_one_that_was_not(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """In an epoch first, then between two cases of the validation."""
    root = tmp_path / "copy"
    shutil.copytree(trained[0], root)
    fold = _model(root, CASCADE) / "fold_1"
    expected = read_state(fold / FINAL)
    labels = {name: read_label_map(fold / "validation" / f"{name}.nii.gz").array for name in CASES[1::2]}
    shutil.rmtree(fold)
    asked = iter([False] * 4)
    assert not train_fold(_request(root, "1"), stop=lambda: next(asked, True))
    assert (fold / LATEST).exists()
    validated: list[int] = []
    report = FoldReport(case=lambda done, _total: validated.append(done))
    assert not train_fold(_request(root, "1"), stop=lambda: len(validated) > 1, report=report)
    assert (fold / FINAL).exists()
    assert not (fold / "validation" / "summary.json").exists()
    assert train_fold(_request(root, "1"))
    assert same_weights(read_state(fold / FINAL).weights, expected.weights)
    for name, array in labels.items():
        assert np.array_equal(read_label_map(fold / "validation" / f"{name}.nii.gz").array, array)


def test_a_first_stage_that_is_not_trained_is_named_with_fold_and_case(tmp_path: Path) -> None:
    raw = planned(tmp_path, cascade=True)
    words = ("train", str(raw), "--configuration", CASCADE, *ONCE)
    ran = seggate(tmp_path, *words, "--fold", "0")
    assert ran.exit_code == 1
    assert "3d_cascade_fullres, fold 0: 3d_lowres has no prediction of case_01 (6 such)" in ran.stderr
    assert "train 3d_lowres folds first: `seggate train --configuration 3d_lowres` (fold 1 " in ran.stderr
    _run(tmp_path, "train", str(raw), "--configuration", LOWRES, "--fold", "0", *ONCE)
    ran = seggate(tmp_path, *words, "--fold", "0")
    assert "no prediction of case_01 (3 such)" in ran.stderr


def test_predictions_of_a_first_stage_that_is_gone_or_was_trained_anew_are_not_taken(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    root = shutil.copytree(trained[0], tmp_path / "copy")
    raw, lowres = root / NAME, _model(root, LOWRES)
    learned = _model(root, CASCADE)
    shutil.move(learned / "fold_1", tmp_path / "kept")
    shutil.rmtree(lowres / "fold_0")
    ran = seggate(root, "train", str(raw), "--configuration", CASCADE, "--fold", "1", *ONCE)
    assert ran.exit_code == 1
    assert "3d_lowres has the prediction of its fold 0, which is gone or not finished, of case_00" in ran.stderr
    shutil.rmtree(learned / "fold_1", ignore_errors=True)
    shutil.move(tmp_path / "kept", learned / "fold_1")
    _run(root, "train", str(raw), "--configuration", LOWRES, "--fold", "0", *ONCE, "--seed", "77")
    named = "fold_0 learned from other predictions of 3d_lowres than those of now"
    for command in (["select", str(raw), "--configuration", CASCADE], ["export", str(raw), "--no-calibration"]):
        ran = seggate(root, *command)
        assert (ran.exit_code, named in ran.stderr) == (1, True), ran.output


def test_the_fold_all_with_regions_whose_predictions_no_other_fold_of_the_cascade_takes(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "second": [2]}
    raw = planned(tmp_path, cascade=True, labels=labels, regions_class_order=[1, 2])
    both = ("--configuration", CASCADE, "--configuration", LOWRES)
    document = _run(tmp_path, "train", str(raw), *both, "--fold", "all", *ONCE)
    assert [row["model"].removeprefix(PREFIX) for row in document["folds"]] == [LOWRES, CASCADE]
    assert {fold for fold, _ in _predictions(tmp_path).values()} == {"all"}
    weights = read_state(_model(tmp_path, CASCADE) / "fold_all" / FINAL).weights
    # One image channel, and one for each of the labels 1 and 2 that the regions are made of.
    assert weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 3
    ran = seggate(tmp_path, "train", str(raw), "--configuration", CASCADE, "--fold", "1", *ONCE)
    assert ran.exit_code == 1
    assert "3d_lowres has only its fold `all`'s prediction, of a network that was trained on the case," in ran.stderr


@pytest.mark.requirement("ART-10")
@pytest.mark.requirement("ART-11")
def test_the_profile_article_holds_out_cases_and_joins_the_cascade_instead_of_its_first_stage(tmp_path: Path) -> None:
    raw = planned(tmp_path, cascade=True, profile="article", cases=10, shape=(16, 18, 20))
    words = ("--configuration", LOWRES, "--configuration", CASCADE, "--profile", "article", *ONCE)
    document = _run(tmp_path, "train", "--all", str(raw), *words)
    assert document["selection"]["selected"] == [CASCADE]
    assert document["selection"]["notes"] == [f"{LOWRES} is the first stage of a cascade and joined through it only"]
    assert set(document["configurations"]) == {CASCADE, LOWRES}
    for fold in ("fold_0", "fold_1"):
        folder = tmp_path / "results" / NAME / f"nnUNetTrainerArticle__nnUNetArticlePlans__{CASCADE}" / fold
        request = json.loads((folder / "training.json").read_text())
        assert request["hold_out"]
        (epoch,) = (json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines())
        assert epoch["hold_out"]["dice"] is not None


def test_without_folds_that_validate_every_case_all_is_trained_but_the_cascade(tmp_path: Path) -> None:
    raw = planned(tmp_path, cascade=True, cases=4)
    splits = tmp_path / "preprocessed" / NAME / "splits_final.json"
    splits.write_text(json.dumps(json.loads(splits.read_text())[:1]))
    (raw / "splits_final.json").write_text(splits.read_text())
    document = _run(tmp_path, "train", "--all", str(raw), *ONCE)
    assert {row["model"].removeprefix(PREFIX) for row in document["folds"]} == {"2d", LOWRES, "3d_fullres"}
    assert f"{CASCADE} is not trained: no fold of the splits validates case_01 (2 such)" in document["notes"][0]
    ran = seggate(tmp_path, "train", str(raw), "--configuration", CASCADE, *ONCE)
    assert "no fold of the splits validates it, and a cascade needs folds that cover every case" in ran.stderr
