"""The demo model's figures are those of the weights that it ships: its cross-validation, run again with the bundle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.bundle import Bundle, load_bundle
from engine.dataset import open_dataset, read_case
from engine.metrics import CaseMetrics, composite_score, evaluated_regions, measure_case
from engine.predictor import Predictor
from engine.splits import SPLITS_JSON, read_splits
from gateway.demo.make_model import CONFIGURATION, MODEL

FIVE_FOLDS = ["0", "1", "2", "3", "4"]
MOST_BYTES = 8 * 2**20
LEAST_DICE = 0.87


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(MODEL)


def test_it_ships_the_five_folds_of_its_cross_validation_in_eight_mebibytes(bundle: Bundle) -> None:
    assert {c.name: [fold.fold for fold in c.folds] for c in bundle.configurations} == {CONFIGURATION: FIVE_FOLDS}
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= MOST_BYTES


def test_its_card_says_what_its_figures_may_hide(bundle: Bundle) -> None:
    assert "left and right crops of one person may be separate cases" in bundle.origin
    assert "names no patients" in bundle.origin
    assert "not for diagnosis" in bundle.description


@pytest.mark.requirement("ART-11")
@pytest.mark.requirement("ART-27", open="CT abdomen, MR pelvis, CT and MR together; the article's hardware")
@pytest.mark.peer("shared-data")
def test_each_case_by_the_fold_that_never_saw_it_reaches_what_the_card_says(bundle: Bundle, shared_root: Path) -> None:
    dataset = open_dataset(shared_root / "data" / "Dataset004_Hippocampus")
    cases = {case.name: case for case in dataset.cases}
    splits = read_splits(shared_root / "reference" / "plans" / "hippocampus_004" / SPLITS_JSON, list(cases))
    measured: list[CaseMetrics] = []
    with Predictor(bundle, threads=2) as predictor:
        for fold, split in zip(FIVE_FOLDS, splits, strict=True):
            for name in split.val:
                case = read_case(cases[name], dataset.json)
                predicted = predictor.predict(case.volume, folds=[fold])
                measured.append(
                    measure_case(
                        case.labels.array,
                        predicted.labels.array,
                        case.volume.geometry.spacing_mm,
                        evaluated_regions(dataset.json.labels),
                        surfaces=False,
                    )
                )
    assert len(measured) == 200
    dice = composite_score(measured).dice
    said = re.search(r"mean foreground Dice (\d\.\d{4})", bundle.description)
    assert dice is not None
    assert said is not None
    # The card's figure was measured with torch; a voxel or two per case may differ.
    assert dice == pytest.approx(float(said[1]), abs=2e-4)
    assert dice >= LEAST_DICE
