"""engine.quality_estimate: worse evidence is never worth more, and what is unlike the calibration gets no number."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from engine.quality_estimate import (
    COMPONENTS,
    ENTROPY,
    MIRROR,
    VOLUME,
    Estimate,
    Evidence,
    Line,
    Outside,
    dice_of,
    estimate,
    hd95_of,
    log_of_dice,
    log_of_hd95,
)
from tests.support.known_cases import calibrated, evidence


def number(**changes: Any) -> Estimate:
    found = estimate(calibrated(), evidence(**changes))
    assert isinstance(found, Estimate), found
    return found


def reasons(label: Any = None, **changes: Any) -> tuple[str, ...]:
    found = estimate(label or calibrated(), evidence(**changes))
    return found.reasons if isinstance(found, Outside) else ()


@pytest.mark.requirement("ART-16")
def test_an_estimate_is_a_dice_and_an_hd95_each_with_the_bound_on_its_worse_side() -> None:
    found = number()
    assert 0 < found.dice_lower < found.dice < 1
    assert found.hd95_upper_mm is not None
    assert 0 < found.hd95_mm < found.hd95_upper_mm


@pytest.mark.requirement("ART-16")
@pytest.mark.parametrize(
    ("name", "worse"),
    [
        ("mirror_dice", [0.99, 0.95, 0.9, 0.85]),
        ("border_entropy", [0.2, 0.4, 0.5, 0.6]),
        ("components", [1, 2, 3]),
        ("volume_ml", [10, 12, 15]),
        ("volume_ml", [10, 8, 7]),
        ("fold_dice", [None, 1.0, 0.8, 0.4, 0.0]),
    ],
)
def test_worse_evidence_is_never_worth_more(name: str, worse: list[Any]) -> None:
    found = [number(**{name: value}) for value in worse]
    for better, poorer in pairwise(found):
        assert poorer.dice <= better.dice
        assert poorer.dice_lower <= better.dice_lower
        assert poorer.hd95_mm >= better.hd95_mm
        assert poorer.dice_lower <= poorer.dice


def test_evidence_better_than_all_that_was_seen_counts_as_the_best_seen() -> None:
    low = calibrated().ranges[ENTROPY][0]
    assert number(border_entropy=low / 2) == number(border_entropy=low)
    assert number(mirror_dice=1.0) == number(mirror_dice=0.9999)


@pytest.mark.requirement("ART-16")
def test_folds_that_disagree_only_take_away() -> None:
    alone = number()
    assert number(fold_dice=1.0) == alone
    apart = number(fold_dice=0.4)
    assert apart.dice_lower == 0.4
    assert apart.dice == min(alone.dice, 2 / 2.6)


def test_what_two_folds_can_be_worth_in_the_mean_when_they_disagree() -> None:
    """The bound on the expected Dice, on sets drawn at random: no truth is nearer to both of them."""
    random = np.random.default_rng(4)

    def dice(first: Any, second: Any) -> float:
        return float(2 * (first & second).sum() / (first.sum() + second.sum()))

    for _ in range(300):
        one, other, truth = (random.random((3, 40)) < random.uniform(0.2, 0.9, (3, 1))) | np.eye(3, 40, dtype=bool)
        mean = (dice(one, truth) + dice(other, truth)) / 2
        assert mean <= 2 / (3 - dice(one, other)) + 1e-12
    # It is reached: a truth between the two.
    one, other = np.arange(30) < 20, np.arange(30) >= 10
    assert (dice(one, one | other) + dice(other, one | other)) / 2 <= 2 / (3 - dice(one, other))


@pytest.mark.requirement("ART-16")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mirror_dice": 0.1}, MIRROR),
        ({"mirror_dice": None}, MIRROR),
        ({"border_entropy": 1.0}, ENTROPY),
        ({"border_entropy": None}, ENTROPY),
        ({"volume_ml": 100.0}, VOLUME),
        ({"volume_ml": 1.0}, VOLUME),
        ({"volume_ml": 0.0}, VOLUME),
        ({"components": 9}, COMPONENTS),
        ({"touches_border": True}, "border"),
        ({"components": 0, "volume_ml": 0.0}, "empty"),
    ],
)
def test_evidence_unlike_all_that_was_seen_has_no_estimate_and_is_named(changes: dict[str, Any], named: str) -> None:
    assert named in reasons(**changes)
    assert reasons() == ()


def test_a_little_beyond_what_was_seen_is_estimated_still() -> None:
    label = calibrated()
    high = label.ranges[ENTROPY][1]
    assert reasons(border_entropy=high + 0.01) == ()
    assert number(border_entropy=high + 0.01).dice <= number(border_entropy=high).dice


def test_touching_the_edge_is_compared_where_enough_cases_did() -> None:
    assert reasons(calibrated(touching_border=0.049), touches_border=True) == ("border",)
    assert reasons(calibrated(touching_border=0.05), touches_border=True) == ()


def test_of_an_empty_segment_nothing_is_said_where_some_cases_rightly_had_none() -> None:
    nothing = evidence(components=0, volume_ml=0.0)
    assert estimate(calibrated(rightly_empty=1), nothing) is None
    assert estimate(calibrated(rightly_empty=18, missed=2), nothing) is None
    # Of such empty results more than a tenth were misses: somebody looks.
    for rightly_empty, missed in ((1, 12), (17, 2), (0, 3)):
        found = estimate(calibrated(rightly_empty=rightly_empty, missed=missed), nothing)
        assert found == Outside(reasons=("empty",))


def test_without_enough_cases_for_a_bound_it_is_the_worst_there_is() -> None:
    line = Line(intercept=log_of_dice(0.95), weights=MappingProxyType({}), margin=None)
    found = estimate(calibrated(dice=line, hd95=replace(line, intercept=log_of_hd95(1.0))), evidence())
    assert isinstance(found, Estimate)
    assert (found.dice_lower, found.hd95_upper_mm) == (0.0, None)
    assert found.dice == pytest.approx(0.95)
    assert found.hd95_mm == pytest.approx(1.0)
    assert found.is_doubtful(0.7, 15.0)


def test_the_bound_decides_and_not_the_estimate() -> None:
    good = Estimate(dice=0.9, dice_lower=0.7, hd95_mm=3.0, hd95_upper_mm=15.0)
    assert not good.is_doubtful(0.7, 15.0)
    assert replace(good, dice_lower=0.6999).is_doubtful(0.7, 15.0)
    assert replace(good, hd95_upper_mm=15.01).is_doubtful(0.7, 15.0)


def test_the_scales_go_there_and_back_and_never_leave_their_range() -> None:
    for value in (0.0, 0.3, 0.98, 1.0):
        assert dice_of(log_of_dice(value)) == pytest.approx(value)
    for value in (0.0, 0.3, 15.0, 800.0):
        assert hd95_of(log_of_hd95(value)) == pytest.approx(value)
    for log in (-1e9, 1e9):
        assert 0.0 <= dice_of(log) <= 1.0
        assert 0.0 <= hd95_of(log) < math.inf


def test_what_is_no_number_or_was_not_measured_is_no_evidence() -> None:
    row = {"volume_ml": 3.0, "components": 1, "touches_border": ["x-first"], "mirror_dice": math.nan, "fold_dice": None}
    found = Evidence.of(row)
    assert found == Evidence(
        volume_ml=3.0, components=1, touches_border=True, mirror_dice=None, border_entropy=None, fold_dice=None
    )
    found_with_border = estimate(calibrated(), Evidence.of(row | {"border_entropy": math.inf}))
    assert isinstance(found_with_border, Outside)
    assert set(found_with_border.reasons) == {MIRROR, ENTROPY, VOLUME, "border"}
