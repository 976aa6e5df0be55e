"""The QA module: each check at its limits, and what the checks make of a result together."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import gateway
from engine.bundle import Bundle, load_bundle
from engine.manifest import Code, LabelSpec, QualityThresholds
from engine.quality_estimate import Calibration, LabelCalibration, Line, log_of_dice, log_of_hd95
from gateway.results import quality
from gateway.results.quality import CHECKS, Check, Verdict, source_doubts, worst
from tests.support.known_cases import calibrated, of_labels

MODEL = Path(gateway.__file__).parent / "demo" / "model"
KIDNEY = Code(scheme="SCT", value="64033007", meaning="Kidney")
PASS, REVIEW, HOLD = Verdict.PASS, Verdict.REVIEW, Verdict.HOLD


def label(value: int, name: str, **changes: Any) -> LabelSpec:
    spec = LabelSpec(
        value=value,
        name=name,
        region=(value,),
        category=KIDNEY,
        type=KIDNEY,
        laterality=None,
        pair=None,
        colour=(1, 2, 3),
        volume_range_ml=(1.0, 6.0),
    )
    return dataclasses.replace(spec, **changes)


def worth(dice: float, hd95_mm: float, *, lower: float | None = 0.8, upper_mm: float | None = 5.0) -> LabelCalibration:
    """A calibration by which every segment of `measured` has these estimates and bounds, whatever its evidence."""

    def line(log: Callable[[float], float], value: float, bound: float | None) -> Line:
        return Line(
            intercept=log(value),
            weights=MappingProxyType({}),
            margin=None if bound is None else log(bound) - log(value),
        )

    return calibrated(
        volume_centre=math.log(3.0),
        dice=line(log_of_dice, dice, lower),
        hd95=line(log_of_hd95, hd95_mm, upper_mm),
    )


LEFT = label(1, "left kidney", laterality="left", pair="right kidney")
RIGHT = label(2, "right kidney", laterality="right", pair="left kidney")


def bundle(
    *labels: LabelSpec, components: dict[str, int] | None = None, calibration: Calibration | None = None
) -> Bundle:
    return dataclasses.replace(
        load_bundle(MODEL, verify=False),
        labels=labels,
        calibration=calibration,
        quality=QualityThresholds(
            min_confidence=0.8, min_fold_dice=0.7, min_mirror_dice=0.7, max_components=components or {}
        ),
    )


def measured(name: str = "organ", **changes: Any) -> dict[str, Any]:
    row = {
        "name": name,
        "voxels": 3000,
        "volume_ml": 3.0,
        "touches_border": [],
        "components": 1,
        "confidence": 0.95,
        "fold_dice": 0.9,
        "mirror_dice": 0.9,
        "border_entropy": 0.4,
        "centroid_lps_mm": [0.0, 0.0, 0.0],
    }
    return row | changes


def empty(name: str = "organ") -> dict[str, Any]:
    return measured(
        name, voxels=0, volume_ml=0.0, components=0, confidence=None, fold_dice=None, mirror_dice=None,
        centroid_lps_mm=None,
    )  # fmt: skip


def judge(
    rows: Sequence[dict[str, Any]], *, mean_confidence: float | None, bundle: Bundle, disabled: Collection[str] = ()
) -> tuple[Verdict, tuple[Check, ...]]:
    """The QA module on a study of which nothing spoke against being whole."""
    return quality.judge(rows, mean_confidence=mean_confidence, bundle=bundle, doubts=(), disabled=disabled)


def verdict_of(check: str, *rows: dict[str, Any], of: Bundle, mean_confidence: float | None = 0.95) -> Verdict | None:
    """The worst verdict among the checks of this name; None where there is none."""
    found = [c for c in judge(rows, mean_confidence=mean_confidence, bundle=of)[1] if c.name == check]
    return worst(found) if found else None


@pytest.mark.requirement("CARD-02")
def test_a_good_result_passes_every_check_and_each_has_name_value_limit_and_verdict() -> None:
    of = bundle(
        LEFT,
        RIGHT,
        components={"left kidney": 1, "right kidney": 1},
        calibration=of_labels(**{"left kidney": worth(0.9, 3.0), "right kidney": worth(0.9, 3.0)}),
    )
    rows = [
        measured("left kidney", centroid_lps_mm=[40.0, 0.0, 0.0]),
        measured("right kidney", centroid_lps_mm=[-40.0, 0.0, 0.0]),
    ]
    verdict, checks = judge(rows, mean_confidence=0.95, bundle=of)
    assert verdict is PASS
    assert {c.name for c in checks} == set(CHECKS)
    for check in checks:
        assert check.limit
        assert check.value not in ("", None)
        assert check.verdict is PASS
        assert json.loads(json.dumps(check.to_json()))["verdict"] == "pass"


@pytest.mark.requirement("CARD-02")
def test_the_verdict_of_a_result_is_its_worst_check() -> None:
    def check(verdict: Verdict) -> Check:
        return Check(name="volume", segment=None, value=1.0, limit="", verdict=verdict)

    assert worst([check(PASS), check(HOLD), check(REVIEW)]) is HOLD
    assert worst([check(PASS), check(REVIEW)]) is REVIEW
    assert worst([]) is PASS


@pytest.mark.requirement("CARD-02")
def test_all_segments_empty_hold_and_one_expected_segment_empty_is_reviewed() -> None:
    of = bundle(label(1, "organ"), label(2, "other"))
    assert verdict_of("empty", empty(), empty("other"), of=of) is HOLD
    assert verdict_of("empty", empty(), measured("other"), of=of) is REVIEW
    assert verdict_of("empty", measured(), measured("other"), of=of) is PASS


@pytest.mark.requirement("CARD-02")
def test_a_result_without_any_statistics_is_held() -> None:
    assert judge([], mean_confidence=None, bundle=bundle(label(1, "organ")))[0] is HOLD


def test_a_segment_that_may_be_absent_is_not_expected() -> None:
    of = bundle(label(1, "organ"), label(2, "tumour", volume_range_ml=(0.0, 500.0)))
    assert judge([measured(), empty("tumour")], mean_confidence=0.9, bundle=of)[0] is PASS
    without_range = bundle(label(1, "organ"), label(2, "other", volume_range_ml=None))
    assert verdict_of("empty", measured(), empty("other"), of=without_range) is REVIEW


@pytest.mark.requirement("CARD-02")
@pytest.mark.parametrize(
    ("volume_ml", "expected"),
    [
        (0.49, HOLD), (0.5, REVIEW), (0.99, REVIEW), (1.0, PASS),
        (6.0, PASS), (6.01, REVIEW), (12.0, REVIEW), (12.01, HOLD),
    ],
)  # fmt: skip
def test_volume_against_the_population_range(volume_ml: float, expected: Verdict) -> None:
    assert verdict_of("volume", measured(volume_ml=volume_ml), of=bundle(label(1, "organ"))) is expected


def test_without_a_population_range_no_volume_is_judged() -> None:
    assert verdict_of("volume", measured(), of=bundle(label(1, "organ", volume_range_ml=None))) is None


@pytest.mark.requirement("CARD-02")
def test_a_segment_at_the_edge_of_the_volume_is_reviewed_and_the_sides_are_named() -> None:
    of = bundle(label(1, "organ"))
    assert verdict_of("border", measured(), of=of) is PASS
    assert verdict_of("border", measured(touches_border=["L", "S"]), of=of) is REVIEW
    checks = judge([measured(touches_border=["L", "S"])], mean_confidence=0.9, bundle=of)[1]
    assert next(c for c in checks if c.name == "border").value == "L, S"


@pytest.mark.requirement("CARD-02")
def test_more_components_than_the_model_allows_are_reviewed() -> None:
    of = bundle(label(1, "organ"), components={"organ": 2})
    assert verdict_of("components", measured(components=2), of=of) is PASS
    assert verdict_of("components", measured(components=3), of=of) is REVIEW
    assert verdict_of("components", measured(components=99), of=bundle(label(1, "organ"))) is None


@pytest.mark.requirement("CARD-02")
def test_left_and_right_swapped_hold() -> None:
    """LPS: x grows towards the patient's left, so the left organ has the greater x."""
    left, right = (
        measured("left kidney", centroid_lps_mm=[40.0, 0.0, 0.0]),
        measured("right kidney", centroid_lps_mm=[-40.0, 0.0, 0.0]),
    )
    of = bundle(LEFT, RIGHT)
    assert verdict_of("laterality", left, right, of=of) is PASS
    swapped = left | {"centroid_lps_mm": [-40.0, 0.0, 0.0]}, right | {"centroid_lps_mm": [40.0, 0.0, 0.0]}
    assert verdict_of("laterality", *swapped, of=of) is HOLD
    same_place = left | {"centroid_lps_mm": [-40.0, 0.0, 0.0]}, right
    assert verdict_of("laterality", *same_place, of=of) is HOLD


@pytest.mark.requirement("CARD-02")
def test_one_side_of_a_pair_alone_is_reviewed_and_named() -> None:
    of = bundle(LEFT, RIGHT)
    for rows, present in (
        ((measured("left kidney"), empty("right kidney")), "left kidney"),
        ((empty("left kidney"), measured("right kidney")), "right kidney"),
    ):
        check = next(c for c in judge(rows, mean_confidence=0.9, bundle=of)[1] if c.name == "pair")
        assert (check.verdict, check.value) == (REVIEW, f"only {present}")
        assert verdict_of("laterality", *rows, of=of) is None


@pytest.mark.requirement("CARD-02")
@pytest.mark.requirement("ART-16")
@pytest.mark.parametrize(
    ("check", "key", "minimum"),
    [
        ("confidence", "confidence", 0.8),
        ("fold-agreement", "fold_dice", 0.7),
        ("mirror-agreement", "mirror_dice", 0.7),
    ],
)
def test_an_estimate_below_its_minimum_is_reviewed_and_below_half_of_it_held(
    check: str, key: str, minimum: float
) -> None:
    of = bundle(label(1, "organ"))
    for value, expected in (
        (minimum, PASS),
        (minimum - 0.001, REVIEW),
        (minimum / 2, REVIEW),
        (minimum / 2 - 0.001, HOLD),
        (math.nan, HOLD),
        (None, None),
    ):
        assert verdict_of(check, measured() | {key: value}, of=of, mean_confidence=None) is expected, value


def estimated(**changes: Any) -> dict[str, Check]:
    """The checks of a calibrated organ by name; `changes` are those of `worth` and of its row."""
    of_worth = {"dice": 0.9, "hd95_mm": 3.0} | {k: changes.pop(k) for k in list(changes) if k in _OF_WORTH}
    of = bundle(label(1, "organ"), calibration=of_labels(organ=worth(**of_worth)))
    row = measured(**changes) if changes.get("voxels", 1) else empty()
    return {c.name: c for c in judge([row], mean_confidence=None, bundle=of)[1]}


_OF_WORTH = {"dice", "hd95_mm", "lower", "upper_mm"}


@pytest.mark.requirement("ART-16")
@pytest.mark.parametrize(
    ("lower", "upper_mm", "flagged"),
    [
        (0.7001, 14.999, set()),
        (0.6999, 14.999, {"estimated-dice"}),
        (0.7001, 15.001, {"estimated-hd95"}),
        (0.2, 80.0, {"estimated-dice", "estimated-hd95"}),
        (None, 5.0, {"estimated-dice"}),
        (0.8, None, {"estimated-hd95"}),
    ],
)
def test_a_case_is_reviewed_for_the_bound_of_its_estimate_and_not_for_the_estimate(
    lower: float | None, upper_mm: float | None, flagged: set[str]
) -> None:
    checks = estimated(lower=lower, upper_mm=upper_mm)
    dice, hd95 = checks["estimated-dice"], checks["estimated-hd95"]
    assert (dice.value, hd95.value) == (0.9, 3.0)
    assert dice.bound == pytest.approx(lower or 0.0, abs=1e-4)
    assert hd95.bound == pytest.approx(upper_mm, abs=1e-4)
    assert {c.name for c in checks.values() if c.verdict is REVIEW} == flagged
    assert dice.limit == "lower 90 % bound at least 0.7"
    assert hd95.limit.startswith("upper 90 % bound at most 15 mm")
    assert ("unknown from so few cases" in hd95.limit) == (upper_mm is None)
    assert dice.to_json()["bound"] == dice.bound
    assert ("bound" in hd95.to_json()) == (upper_mm is not None)


@pytest.mark.requirement("ART-16")
def test_folds_that_disagree_pull_the_bound_below_its_limit() -> None:
    assert estimated(fold_dice=0.71)["estimated-dice"].verdict is PASS
    check = estimated(fold_dice=0.69)["estimated-dice"]
    assert (check.bound, check.verdict) == (0.69, REVIEW)


@pytest.mark.requirement("ART-16")
@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"volume_ml": 200.0}, "outside: volume"),
        ({"border_entropy": None}, "outside: border-entropy"),
        ({"touches_border": ["z-first"], "components": 50}, "outside: components, border"),
        ({"voxels": 0}, "outside: empty"),
    ],
)
def test_a_segment_unlike_those_of_the_calibration_is_reviewed_for_that_and_gets_no_estimate(
    changes: dict[str, Any], value: str
) -> None:
    checks = estimated(**changes)
    assert (checks["calibrated-range"].value, checks["calibrated-range"].verdict) == (value, REVIEW)
    assert not {"estimated-dice", "estimated-hd95"} & checks.keys()
    assert (estimated()["calibrated-range"].value, estimated()["calibrated-range"].verdict) == ("inside", PASS)


def test_a_row_of_an_older_release_is_judged_without_the_entropy_it_does_not_have() -> None:
    row = measured()
    del row["border_entropy"]
    of = bundle(label(1, "organ"), calibration=of_labels(organ=worth(0.9, 3.0)))
    verdict, checks = judge([row], mean_confidence=None, bundle=of)
    assert verdict is REVIEW
    assert [c.name for c in checks if c.verdict is REVIEW] == ["calibrated-range"]


def test_without_a_calibration_of_the_label_nothing_is_estimated() -> None:
    names = {"estimated-dice", "estimated-hd95", "calibrated-range"}
    for calibration in (None, of_labels(other=worth(0.9, 3.0))):
        of = bundle(label(1, "organ"), calibration=calibration)
        assert not names & {c.name for c in judge([measured()], mean_confidence=None, bundle=of)[1]}


@pytest.mark.requirement("CARD-02")
def test_the_lowest_organ_is_found_behind_a_good_mean() -> None:
    of = bundle(label(1, "organ"), label(2, "other"))
    verdict, checks = judge([measured(), measured("other", confidence=0.5)], mean_confidence=0.93, bundle=of)
    assert verdict is REVIEW
    assert [(c.name, c.segment) for c in checks if c.verdict is not PASS] == [("confidence", "other")]
    assert [c.verdict for c in checks if c.name == "confidence" and c.segment is None] == [PASS]


def test_a_mean_confidence_below_the_minimum_is_reviewed() -> None:
    of = bundle(label(1, "organ"))
    assert judge([measured()], mean_confidence=0.79, bundle=of)[0] is REVIEW


def test_a_disabled_check_is_absent_and_never_called_passed() -> None:
    of = bundle(label(1, "organ"))
    verdict, checks = judge([measured(volume_ml=99.0)], mean_confidence=0.9, bundle=of, disabled=("volume",))
    assert verdict is PASS
    assert "volume" not in {c.name for c in checks}


@pytest.mark.requirement("CARD-02")
@pytest.mark.parametrize(("left_names", "right_names"), [(True, True), (True, False), (False, True)])
def test_a_pair_is_judged_once_from_whichever_side_it_is_stated(left_names: bool, right_names: bool) -> None:
    of = bundle(
        dataclasses.replace(RIGHT, pair=LEFT.name if right_names else None),
        dataclasses.replace(LEFT, pair=RIGHT.name if left_names else None),
    )
    left = measured("left kidney", centroid_lps_mm=[-40.0, 0.0, 0.0])
    right = measured("right kidney", centroid_lps_mm=[40.0, 0.0, 0.0])
    checks = judge([right, left], mean_confidence=0.9, bundle=of)[1]
    found = [(c.name, c.segment, c.verdict) for c in checks if c.name in {"pair", "laterality"}]
    assert found == [("pair", "left kidney", PASS), ("laterality", "left kidney", HOLD)]


WHOLE = {
    "objects": 10,
    "own_results": 0,
    "quarantined": 0,
    "released": True,
    "interrupted": False,
    "expected": {"count": 10},
    "gaps": [],
}
GAP = {"series_instance_uid": "1.2.3", "after_mm": 1.0, "before_mm": 4.0, "missing": 2}


def doubts(rule: str = "quiet-after-release", *, missing_slices: int = 0, **evidence: Any) -> tuple[str, ...]:
    return source_doubts(rule, WHOLE | evidence, series_instance_uid="1.2.3", missing_slices=missing_slices)


@pytest.mark.requirement("CMP-15")
def test_evidence_against_the_study_being_whole_is_named() -> None:
    assert doubts() == doubts("operator") == doubts("expected-count") == ()
    assert doubts(expected=None) == doubts(expected={"count": None}) == ()
    assert doubts("give-up", objects=8, own_results=1) == (
        "9 of 10 expected objects, the wait for more was given up",
    )  # fmt: skip
    assert doubts("operator", objects=8) == ("8 of 10 expected objects, declared whole by rule operator",)
    assert doubts("quiet-open", released=False, interrupted=True) == ("an association broke off",)
    assert doubts("operator", released=False) == ("an operator did not wait for the end of the association",)
    assert doubts(quarantined=3) == ("3 objects quarantined",)
    assert doubts(conflicting=1) == ("1 objects left out: another series or study holds their UIDs",)


@pytest.mark.requirement("CMP-16")
def test_missing_slices_count_in_the_series_of_the_result_only() -> None:
    assert doubts(gaps=[GAP]) == ("2 slices missing",)
    assert doubts(gaps=[GAP | {"series_instance_uid": "1.2.4"}]) == ()
    assert doubts(missing_slices=2) == doubts(missing_slices=2, gaps=[GAP]) == ("2 slices missing",)


@pytest.mark.requirement("CARD-02")
def test_a_result_from_a_study_in_doubt_is_reviewed_and_says_why() -> None:
    of = bundle(label(1, "organ"))
    verdict, checks = quality.judge([measured()], mean_confidence=0.9, bundle=of, doubts=("a", "b"))
    assert verdict is REVIEW
    source = next(c for c in checks if c.name == "source")
    assert (source.segment, source.value, source.verdict) == (None, "a; b", REVIEW)
    _, checks = quality.judge([measured()], mean_confidence=0.9, bundle=of, doubts=())
    assert [(c.value, c.verdict) for c in checks if c.name == "source"] == [("none", PASS)]
