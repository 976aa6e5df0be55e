"""engine.case_exposure: which folds and bundles know a case, from what lies in the result folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.case_exposure import bundles_trained_on, folds_that_know
from engine.errors import DatasetInvalid
from engine.splits import Split

MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def _fold(results: Path, model: str, fold: str, request: dict[str, object] | None, *, finished: bool = True) -> None:
    folder = results / model / f"fold_{fold}"
    folder.mkdir(parents=True)
    if request is not None:
        (folder / "training.json").write_text(json.dumps(request))
    (folder / ("checkpoint_final.pth" if finished else "checkpoint_latest.pth")).touch()


def _bundle(
    results: Path, semver: str, *, folds: str, origin: str = "", plans: str = "nnUNetPlans", name: str = "3d_fullres"
) -> None:
    folder = results / "bundles" / semver
    folder.mkdir(parents=True)
    manifest = {
        "name": "liver",
        "semver": semver,
        "origin": origin,
        "configurations": [{"name": name, "folds": [{"fold": fold, "file": "x.onnx"} for fold in folds]}],
    }
    (folder / "bundle.json").write_text(json.dumps(manifest))
    (folder / "plans.json").write_text(json.dumps({"plans_name": plans}))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    _fold(tmp_path, MODEL, "0", {"train": ["b", "c"], "hold_out": [], "val": ["a"]})
    _fold(tmp_path, MODEL, "1", {"train": ["a", "c"], "hold_out": [], "val": ["b"]}, finished=False)
    _fold(tmp_path, MODEL, "2", {"train": ["b"], "hold_out": ["a"], "val": ["c"]})
    _fold(tmp_path, MODEL, "3", {"train": ["b"], "hold_out": ["d"], "val": ["c"]})
    _fold(tmp_path, MODEL, "all", {"train": ["a", "b", "c"], "val": ["a", "b", "c"]})
    (tmp_path / MODEL / "crossval_results_folds_0_1").mkdir()
    return tmp_path


def test_each_fold_says_how_it_knows_the_case(results: Path) -> None:
    found = folds_that_know(results, "a")
    assert [(f.model, f.fold, f.roles, f.trained_on, f.finished) for f in found] == [
        (MODEL, "0", ("validation",), False, True),
        (MODEL, "1", ("train",), True, False),
        (MODEL, "2", ("hold-out",), False, True),
        (MODEL, "all", ("train", "validation"), True, True),
    ]
    assert folds_that_know(results, "nobody") == ()
    assert folds_that_know(results / "gone", "a") == ()


def test_folds_that_nnunet_trained_are_answered_by_the_splits(tmp_path: Path) -> None:
    for fold in ("0", "1", "2", "all"):
        _fold(tmp_path, MODEL, fold, None)
    (tmp_path / MODEL / "fold_9").mkdir()
    splits = (Split(train=("a",), val=("b",)), Split(train=("b",), val=("a",)))
    found = {f.fold: f.roles for f in folds_that_know(tmp_path, "a", splits=splits)}
    assert found == {"0": ("train",), "1": ("validation",), "2": ("unknown",), "all": ("train", "validation")}


def test_a_bundle_is_traced_by_plans_configuration_fold_and_trainer(results: Path) -> None:
    other = MODEL.replace("nnUNetTrainer_", "nnUNetTrainerArticle_")
    _fold(results, other, "0", {"train": ["a"], "val": ["b"]})
    _bundle(results, "1.0.0", folds="01")
    _bundle(results, "1.1.0", folds="0", origin="trained by seggate (nnUNetTrainer: 3d_fullres, folds 0) on 3 cases")
    _bundle(results, "1.2.0", folds="0", origin="trained by seggate (nnUNetTrainerArticle: 3d_fullres, folds 0)")
    _bundle(results, "1.3.0", folds="1", plans="otherPlans")
    _bundle(results, "1.4.0", folds="1", name="2d")
    found = bundles_trained_on(results, "a", folds_that_know(results, "a"))
    assert [(b.semver, b.folds) for b in found] == [
        ("1.0.0", (f"{other}/fold_0", f"{MODEL}/fold_1")),
        ("1.2.0", (f"{other}/fold_0",)),
    ]


def test_a_bundle_that_cannot_be_read_is_named_and_stops_nothing(results: Path) -> None:
    _bundle(results, "1.0.0", folds="1")
    _bundle(results, "2.0.0", folds="1")
    (results / "bundles" / "2.0.0" / "bundle.json").write_text("{")
    found = bundles_trained_on(results, "a", folds_that_know(results, "a"))
    assert [(b.folder.name, bool(b.folds), b.untraced is None) for b in found] == [
        ("1.0.0", True, True),
        ("2.0.0", False, False),
    ]


def test_a_training_json_that_cannot_be_read_is_an_error_with_its_place(results: Path) -> None:
    (results / MODEL / "fold_0" / "training.json").write_text('{"train": "a"}')
    with pytest.raises(DatasetInvalid, match=r"fold_0/training.json: train"):
        folds_that_know(results, "a")
