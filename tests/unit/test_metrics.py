"""engine.metrics: counts, empty sides, the composite score and summary.json."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.labels import LabelManager
from engine.metrics import composite_score, evaluated_regions, measure_case, summary, write_summary
from engine.surfaces import SurfaceRuler

SPACING_MM = (3.0, 0.7, 1.3)
LABELS = ((1,), (2,))
Labels = NDArray[np.uint8]


def _labels(seed: int, shape: tuple[int, int, int] = (9, 20, 15)) -> Labels:
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)


def test_counts_are_those_of_counting_voxels_one_region_at_a_time() -> None:
    reference, prediction = _labels(0), _labels(1)
    reference[2:4] = 3
    found = measure_case(reference, prediction, SPACING_MM, [(1,), (1, 2)], ignore_label=3, surfaces=False)
    use = reference != 3
    for region, metrics in found.items():
        ours, theirs = np.isin(reference, region)[use], np.isin(prediction, region)[use]
        assert metrics.true_positives == (ours & theirs).sum()
        assert metrics.false_positives == (~ours & theirs).sum()
        assert metrics.false_negatives == (ours & ~theirs).sum()
        assert metrics.true_negatives == (~ours & ~theirs).sum()
        assert metrics.dice == pytest.approx(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))
        assert metrics.iou == pytest.approx((ours & theirs).sum() / (ours | theirs).sum())
        assert metrics.hd95_mm is None


@pytest.mark.requirement("ART-10")
def test_surfaces_of_all_labels_are_those_of_the_whole_volume_masks() -> None:
    reference = np.zeros((12, 30, 30), dtype=np.uint16)
    reference[2:6, 3:12, 4:20] = 1
    reference[6:10, 15:25, 10:28] = 2
    prediction = np.roll(reference, (1, 2), (0, 2))
    found = measure_case(reference, prediction, SPACING_MM, [(1,), (2,), (1, 2)])
    ruler = SurfaceRuler(reference.shape, SPACING_MM)
    for region, metrics in found.items():
        whole = ruler.measure(np.isin(reference, region), np.isin(prediction, region))
        assert metrics.hd95_mm == whole.hd95_mm()
        assert metrics.surface_dice == whole.surface_dice(2.0)


@pytest.mark.requirement("ART-10")
def test_one_empty_side_is_dice_0_and_the_diagonal_and_two_are_no_value() -> None:
    reference = np.zeros((4, 6, 8), dtype=np.uint8)
    reference[1:3, 1:3, 1:3] = 1
    found = measure_case(reference, np.zeros_like(reference), SPACING_MM, LABELS)
    assert (found[1,].dice, found[1,].surface_dice) == (0.0, 0.0)
    assert found[1,].hd95_mm == pytest.approx(math.sqrt(12.0**2 + 4.2**2 + 10.4**2))
    assert (found[2,].dice, found[2,].iou, found[2,].hd95_mm, found[2,].surface_dice) == (None, None, None, None)


@pytest.mark.requirement("ART-10")
def test_the_composite_score_is_a_mean_over_cases_and_then_labels() -> None:
    shape = (4, 6, 8)
    full, empty = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.uint8)
    full[1:3, 1:3, 1:3] = 1
    both = full.copy()
    both[3, 4:, 4:] = 2
    cases = [measure_case(a, b, (1.0, 1.0, 1.0), LABELS) for a, b in ((full, full), (full, empty), (both, both))]
    score = composite_score(cases)
    diagonal = math.sqrt(16 + 36 + 64)
    # Label 1: Dice 1, 0, 1. Label 2: absent from both sides of two cases, and right in the third.
    assert score.dice == pytest.approx((2 / 3 + 1) / 2)
    assert score.hd95_mm == pytest.approx((diagonal / 3 + 0) / 2)
    assert score.value == pytest.approx(0.7 * (1 - 5 / 6) + 0.3 * diagonal / 60)


@pytest.mark.requirement("ART-10")
def test_the_composite_score_of_nothing_is_none() -> None:
    empty = np.zeros((3, 3, 3), dtype=np.uint8)
    score = composite_score([measure_case(empty, empty, SPACING_MM, LABELS)])
    assert (score.dice, score.hd95_mm, score.value) == (None, None, None)


def test_labels_are_evaluated_without_background_and_regions_as_declared() -> None:
    labels = LabelManager.from_dataset_json({"labels": {"background": 0, "b": 2, "a": 1, "ignore": 3}})
    assert evaluated_regions(labels) == ((1,), (2,))
    regions = LabelManager.from_dataset_json(
        {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    )
    assert evaluated_regions(regions) == ((1, 2), (2,))


def test_summary_has_the_keys_and_means_of_nnunet(tmp_path: Path) -> None:
    reference, prediction = np.zeros((2, 3, 4), dtype=np.uint8), np.zeros((2, 3, 4), dtype=np.uint8)
    reference[0, 0, :3], prediction[0, 0, 1:] = 1, 1
    first = measure_case(reference, prediction, SPACING_MM, [(1,), (1, 2)], surfaces=False)
    second = measure_case(reference * 0, prediction * 0, SPACING_MM, [(1,), (1, 2)], surfaces=False)
    write_summary(
        tmp_path / "summary.json", [("r/a.nii.gz", "p/a.nii.gz", first), ("r/b.nii.gz", "p/b.nii.gz", second)]
    )
    written = json.loads((tmp_path / "summary.json").read_text())
    assert set(written) == {"foreground_mean", "mean", "metric_per_case"}
    assert set(written["mean"]) == {"1", "(1, 2)"}
    case = written["metric_per_case"][0]
    assert (case["reference_file"], case["prediction_file"]) == ("r/a.nii.gz", "p/a.nii.gz")
    expected = {"Dice": 2 / 3, "IoU": 0.5, "FP": 1, "TP": 2, "FN": 1, "TN": 20, "n_pred": 3, "n_ref": 3}
    assert case["metrics"]["1"] == pytest.approx(expected)
    assert math.isnan(written["metric_per_case"][1]["metrics"]["1"]["Dice"])
    # The empty case counts in the means of counts, not of Dice.
    assert written["mean"]["1"]["Dice"] == pytest.approx(2 / 3)
    assert written["mean"]["1"]["n_ref"] == pytest.approx(1.5)
    assert written["foreground_mean"]["TP"] == pytest.approx(1.0)


def test_a_label_that_is_nowhere_makes_the_foreground_mean_nan_as_in_nnunet() -> None:
    reference = np.zeros((2, 3, 4), dtype=np.uint8)
    reference[0, 0, 0] = 1
    found = summary([("r", "p", measure_case(reference, reference, SPACING_MM, LABELS, surfaces=False))])
    assert found["mean"]["1"]["Dice"] == 1.0
    assert math.isnan(found["mean"]["2"]["Dice"])
    assert math.isnan(found["foreground_mean"]["Dice"])


def test_measured_surfaces_stand_beside_the_values_of_nnunet() -> None:
    reference = np.zeros((2, 3, 4), dtype=np.uint8)
    reference[0, 0, 0] = 1
    found = summary([("r", "p", measure_case(reference, reference, SPACING_MM, LABELS))])
    assert (found["mean"]["1"]["HD95"], found["mean"]["1"]["SurfaceDice"]) == (0.0, 1.0)
    assert math.isnan(found["mean"]["2"]["HD95"])


def test_maps_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="two alike"):
        measure_case(_labels(0), _labels(0)[:4], SPACING_MM, LABELS)


@pytest.mark.parametrize("value", [3, 255, 65535, 2**31, -1, -(2**31)])
def test_a_value_of_no_region_counts_as_none_of_them_and_costs_no_memory(value: int) -> None:
    reference = np.zeros((4, 8, 8), dtype=np.int64)
    reference[1, 2:4, 2:4] = 1
    prediction = reference.copy()
    prediction[0, 0, :3] = value
    prediction[1, 2, 2] = value
    as_background = measure_case(reference, np.where(prediction == value, 0, prediction), SPACING_MM, LABELS)
    tracemalloc.start()
    try:
        found = measure_case(reference, prediction, SPACING_MM, LABELS)
        assert measure_case(prediction, reference, SPACING_MM, LABELS)[1,].false_positives == 1
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert dict(found) == dict(as_background)
    assert (found[1,].true_positives, found[1,].false_negatives, found[1,].true_negatives) == (3, 1, 252)


def test_the_diagonal_of_one_slice_is_that_of_its_plane() -> None:
    reference = np.zeros((1, 30, 40), dtype=np.uint8)
    reference[0, 2:9, 3:9] = 1
    found = measure_case(reference, np.zeros_like(reference), (999.0, 1.0, 1.0), [(1,)])
    assert found[1,].hd95_mm == pytest.approx(50.0)
