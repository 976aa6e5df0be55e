"""engine.calibration: bounds hold as often as they say, whatever the evidence is worth; small sets are told apart."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from engine.calibration import MIN_CASES, KnownCase, calibrate, conformal_residual, fit_label
from engine.quality_estimate import ENTROPY, LARGE, MIRROR, SMALL, TERMS, Estimate, Outside, estimate
from tests.support.known_cases import drawn, evidence


def _covered(learnt: list[KnownCase], new: list[KnownCase]) -> tuple[list[bool], list[bool], int]:
    """Whether the bound of the Dice held, that of the HD95, and how many new cases had none."""
    label = fit_label(learnt)
    dice, hd95, outside = [], [], 0
    for case in new:
        found = estimate(label, case.evidence)
        if isinstance(found, Outside):
            outside += 1
            continue
        assert found is not None
        assert case.dice is not None
        assert case.hd95_mm is not None
        assert found.hd95_upper_mm is not None
        dice.append(case.dice >= found.dice_lower)
        hd95.append(case.hd95_mm <= found.hd95_upper_mm)
    return dice, hd95, outside


@pytest.mark.requirement("ART-16")
@pytest.mark.parametrize(("count", "strength"), [(20, 1.0), (60, 1.0), (60, 0.0)])
def test_over_many_draws_nine_of_ten_new_cases_are_within_their_bound(count: int, strength: float) -> None:
    dice: list[bool] = []
    hd95: list[bool] = []
    outside = 0
    sets, new = 60, 40
    for seed in range(sets):
        found = _covered(drawn(seed, count, strength=strength), drawn(10_000 + seed, new, strength=strength))
        dice += found[0]
        hd95 += found[1]
        outside += found[2]
    # The share among one set's new cases varies between sets as a beta distribution does; three deviations of the mean.
    deviation = math.sqrt(0.09 / (count + 2) / sets + 0.09 / (sets * new))
    for held in (dice, hd95):
        assert 0.9 - 3 * deviation - 0.005 <= np.mean(held) <= 0.95
    assert outside <= 0.03 * sets * new


def test_cases_of_one_patient_count_once_and_bounds_hold_for_new_patients() -> None:
    held: list[bool] = []
    for seed in range(40):
        held += _covered(drawn(seed, 80, cases_of_patient=4), drawn(10_000 + seed, 40, cases_of_patient=4))[0]
    assert np.mean(held) >= 0.88


def test_the_residual_of_a_bound_is_the_one_of_the_conformal_rank() -> None:
    def of(count: int, confidence: float = 0.9) -> float | None:
        return conformal_residual([float(r) for r in range(count)][::-1], [str(i) for i in range(count)], confidence)

    assert of(8) is None  # ceil(0.9 * 9) = 9 of 8
    assert of(9) == 8.0
    assert of(19) == 17.0
    assert of(99) == 89.0
    assert of(3, 0.5) == 1.0
    assert of(0) is None


def test_patients_share_the_weight_of_one_case_each() -> None:
    # Nine patients; the worst residual is one of ten cases of one of them: 9/10 of weight is reached only with it.
    residuals = [float(r) for r in range(8)] + [0.5] * 9 + [100.0]
    patients = [str(i) for i in range(8)] + ["many"] * 10
    assert conformal_residual(residuals, patients, 0.9) == 100.0
    assert conformal_residual(residuals, patients, 0.85) == 7.0
    # All cases of too few patients, however many they are, are too few.
    assert conformal_residual([0.0] * 100, [str(i % 8) for i in range(100)], 0.9) is None


@pytest.mark.requirement("ART-16")
def test_a_label_with_few_cases_has_no_calibration_and_a_note_says_so() -> None:
    found = calibrate({"many": drawn(1, MIN_CASES), "few": drawn(2, MIN_CASES - 1), "none": []})
    assert list(found.labels) == ["many"]
    assert found.notes == (
        "few: 19 cases have this segment; an estimate of its quality needs 20",
        "none: 0 cases have this segment; an estimate of its quality needs 20",
    )


def test_few_patients_with_many_cases_have_an_estimate_without_a_bound() -> None:
    label = fit_label(drawn(1, 40, cases_of_patient=8))
    assert (label.cases, label.patients) == (40, 5)
    assert label.dice.margin is None
    assert label.hd95.margin is None
    one_patient = calibrate({"a": drawn(1, 40, cases_of_patient=40)}).labels["a"]
    assert one_patient.dice.margin is None
    assert one_patient.found.cases == 0


def test_what_it_reaches_on_cases_it_has_not_seen_is_measured_with_it() -> None:
    cases = drawn(7, 200)
    found = calibrate({"a": cases}).labels["a"].found
    bad = [case for case in cases if (case.dice or 0) < 0.7 or (case.hd95_mm or 0) > 15]
    assert found.cases + found.outside == 200
    assert found.bad == len(bad) > 0
    assert found.dice_coverage is not None
    assert 0.8 <= found.dice_coverage <= 0.97
    assert found.hd95_coverage is not None
    assert 0.8 <= found.hd95_coverage <= 0.97
    assert found.dice_correlation is not None
    assert found.dice_correlation > 0.5
    assert found.sensitivity is not None
    assert found.specificity is not None
    assert found.sensitivity > 0.7
    assert found.sensitivity + found.specificity > 1.2
    blind = calibrate({"a": drawn(7, 200, strength=0.0)}).labels["a"].found
    assert blind.dice_correlation is not None
    assert abs(blind.dice_correlation) < 0.3


def test_without_bad_cases_nothing_is_said_of_their_being_found() -> None:
    cases = [replace(case, dice=0.9, hd95_mm=1.0) for case in drawn(3, 30)]
    found = calibrate({"a": cases}).labels["a"].found
    assert (found.bad, found.sensitivity, found.specificity) == (0, None, 1.0)
    assert found.dice_correlation is None


def test_no_weight_is_negative_even_where_the_cases_say_so() -> None:
    upside_down = [replace(case, dice=1 - (case.dice or 0)) for case in drawn(5, 80)]
    assert all(weight >= 0 for weight in fit_label(upside_down).dice.weights.values())


def test_evidence_that_tells_gets_weight() -> None:
    weights = fit_label(drawn(5, 150)).dice.weights
    assert set(weights) == set(TERMS)
    assert weights[MIRROR] > 0
    assert weights[ENTROPY] > 0
    assert weights[SMALL] * 0.2 < 0.1
    assert weights[LARGE] * 0.2 < 0.1


def test_a_model_without_mirroring_is_calibrated_on_the_rest() -> None:
    cases = [replace(case, evidence=replace(case.evidence, mirror_dice=None)) for case in drawn(5, 60)]
    label = fit_label(cases)
    assert MIRROR not in label.ranges
    assert MIRROR not in label.dice.weights
    assert isinstance(estimate(label, evidence(mirror_dice=None)), Estimate)


def test_predictions_that_are_empty_are_counted_and_not_learnt_from() -> None:
    empty = replace(evidence(), components=0, volume_ml=0.0)
    missed = KnownCase(patient="m", evidence=empty, dice=0.0, hd95_mm=90.0)
    absent = KnownCase(patient="a", evidence=empty, dice=None, hd95_mm=None)
    label = fit_label([*drawn(5, 60), missed, absent, absent])
    assert (label.cases, label.missed, label.rightly_empty) == (60, 1, 2)
    assert label.dice == fit_label(drawn(5, 60)).dice


def test_the_order_of_the_cases_does_not_matter() -> None:
    cases = drawn(5, 60)
    forward, backward = fit_label(cases), fit_label(cases[::-1])
    assert forward.dice.margin == pytest.approx(backward.dice.margin)
    assert forward.dice.intercept == pytest.approx(backward.dice.intercept)


def test_cases_that_are_all_alike_are_taken_as_they_are() -> None:
    alike = [KnownCase(patient=str(i), evidence=evidence(), dice=0.9, hd95_mm=2.0) for i in range(30)]
    found = estimate(fit_label(alike), evidence())
    assert isinstance(found, Estimate)
    assert found.dice == pytest.approx(found.dice_lower) == pytest.approx(0.9)


def test_of_a_bound_that_too_few_patients_give_no_coverage_is_claimed() -> None:
    """24 cases of 6 patients: a 90 % bound takes 9."""
    known = [replace(case, patient=f"p{index % 6}") for index, case in enumerate(drawn(5, 24))]
    label = calibrate({"liver": known}).labels["liver"]
    assert (label.dice.margin, label.hd95.margin) == (None, None)
    assert (label.found.dice_coverage, label.found.hd95_coverage) == (None, None)
    assert (label.found.dice_lower, label.found.hd95_upper_mm) == (None, None)
    assert label.found.cases > 0


def test_a_segment_of_ignored_voxels_alone_is_neither_right_nor_wrong() -> None:
    known = drawn(3, 40)
    nowhere = [replace(case, patient=f"other {case.patient}", dice=None, hd95_mm=None) for case in drawn(4, 5)]
    found, without = calibrate({"one": [*known, *nowhere]}).labels["one"], calibrate({"one": known}).labels["one"]
    assert found == without
    assert (found.cases, found.rightly_empty, found.missed) == (40, 0, 0)


@pytest.mark.parametrize(("lacking", "cases", "learnt"), [(1, 39, "them"), (4, 36, "them"), (5, 40, "that")])
def test_evidence_that_some_cases_lack_is_told_and_does_not_cost_the_label_more_than_it_must(
    lacking: int, cases: int, learnt: str
) -> None:
    known = drawn(3, 40)
    known[:lacking] = [replace(case, evidence=replace(case.evidence, mirror_dice=None)) for case in known[:lacking]]
    found = calibrate({"one": known})
    label = found.labels["one"]
    assert found.notes == (f"one: {lacking} of 40 cases have no {MIRROR}: its quality is learnt without {learnt}",)
    assert (label.cases, MIRROR in label.ranges) == (cases, learnt == "them")


def test_cases_are_kept_where_without_them_there_were_too_few() -> None:
    known = drawn(3, MIN_CASES)
    known[0] = replace(known[0], evidence=replace(known[0].evidence, border_entropy=None))
    found = calibrate({"one": known}).labels["one"]
    assert (found.cases, ENTROPY in found.ranges) == (MIN_CASES, False)
