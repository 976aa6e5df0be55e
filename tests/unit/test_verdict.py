"""gateway.learning.verdict: each limit of a change plan broken alone is told with its figure; kept, nothing is said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from engine.version_comparison import Comparison, Figure, NewlyEmpty
from gateway.learning.verdict import NOTICEABLE_S, Reason, Verdict, broken_limits, verdict_of
from gateway.learning_settings import ChangePlan

PLAN = ChangePlan(
    max_dice_loss=0.01,
    max_dice_loss_per_label=0.03,
    max_dice_loss_per_stratum=0.02,
    max_runtime_ratio=1.5,
    max_memory_ratio=1.25,
)


def _figure(candidate: float, champion: float | None = 0.9) -> Figure:
    return Figure(candidate=candidate, champion=champion, cases=10)


SAME = Comparison(
    dice=_figure(0.9),
    old_dice=_figure(0.9),
    label_dice={"liver": _figure(0.9), "spleen": _figure(0.9)},
    label_hd95_mm={"liver": _figure(3.0, 3.0), "spleen": _figure(3.0, 3.0)},
    stratum_dice={"site a": _figure(0.9), "site b": _figure(0.9)},
    untested=(),
    newly_empty=(),
    seconds=_figure(10.0, 10.0),
    peak_bytes=_figure(2.0**30, 2.0**30),
)


@pytest.mark.requirement("ART-23")
@pytest.mark.parametrize(
    ("changed", "check", "words", "figure", "limit"),
    [
        (replace(SAME, dice=_figure(0.885)), "dice", "a loss of 0.0150, limit 0.01", 0.015, 0.01),
        (replace(SAME, old_dice=_figure(0.88)), "backward-transfer", "old test: 0.8800, 0.9000 before", 0.02, 0.01),
        (
            replace(SAME, label_dice={**SAME.label_dice, "spleen": _figure(0.86)}),
            "label-dice",
            "Dice of spleen",
            0.04,
            0.03,
        ),
        (
            replace(SAME, stratum_dice={**SAME.stratum_dice, "site b": _figure(0.87)}),
            "stratum-dice",
            "stratum site b",
            0.03,
            0.02,
        ),
        (
            replace(SAME, newly_empty=(NewlyEmpty(case="case_7", label="liver"),)),
            "newly-empty",
            "case_7: liver is empty",
            1,
            0,
        ),
        (replace(SAME, seconds=_figure(16.0, 10.0)), "runtime", "16, 10 before: 1.60 times, limit 1.5", 1.6, 1.5),
        (
            replace(SAME, peak_bytes=_figure(1.5 * 2**30, 2.0**30)),
            "memory",
            "1.54e+03, 1.02e+03 before: 1.50 times, limit 1.25",
            1.5,
            1.25,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_each_limit_broken_alone_is_the_only_reason(
    changed: Comparison, check: str, words: str, figure: float, limit: float
) -> None:
    reasons = broken_limits(changed, PLAN)
    assert [reason.check for reason in reasons] == [check]
    assert words in reasons[0].text
    assert reasons[0].figure == pytest.approx(figure)
    assert reasons[0].limit == limit
    assert verdict_of(reasons) is Verdict.REJECTED


def test_limits_that_are_kept_give_no_reason() -> None:
    kept = replace(
        SAME,
        dice=_figure(0.89),  # exactly the limit
        old_dice=_figure(0.95),
        label_dice={"liver": _figure(0.87), "spleen": _figure(0.95)},
        stratum_dice={"site a": _figure(0.88)},
        seconds=_figure(15.0, 10.0),
        peak_bytes=_figure(1.25 * 2**30, 2.0**30),
    )
    assert broken_limits(kept, PLAN) == []
    assert broken_limits(SAME, PLAN) == []
    assert verdict_of([]) is Verdict.ACCEPTED


def test_several_broken_limits_are_all_told() -> None:
    worse = replace(SAME, dice=_figure(0.5), label_dice={"liver": _figure(0.5), "spleen": _figure(0.5)})
    assert [reason.check for reason in broken_limits(worse, PLAN)] == ["dice", "label-dice", "label-dice"]


def test_a_loss_on_the_old_test_is_not_made_good_by_a_gain_on_the_new_one() -> None:
    learnt = replace(SAME, dice=_figure(0.95), old_dice=_figure(0.87))
    assert [reason.check for reason in broken_limits(learnt, PLAN)] == ["backward-transfer"]


def test_the_same_loss_is_told_once_where_every_case_is_old() -> None:
    worse = replace(SAME, dice=_figure(0.8), old_dice=_figure(0.8))
    assert [reason.check for reason in broken_limits(worse, PLAN)] == ["dice"]


def test_a_ratio_of_times_that_nobody_notices_is_no_reason() -> None:
    tiny = replace(SAME, seconds=_figure(0.03, 0.01))
    assert broken_limits(tiny, PLAN) == []
    noticed = replace(SAME, seconds=_figure(0.01 + NOTICEABLE_S, 0.01))
    assert [reason.check for reason in broken_limits(noticed, PLAN)] == ["runtime"]


def test_a_first_version_breaks_no_limit() -> None:
    alone = replace(
        SAME,
        dice=_figure(0.1, None),
        old_dice=_figure(0.1, None),
        label_dice={"liver": _figure(0.1, None)},
        stratum_dice={"site a": _figure(0.1, None)},
        seconds=_figure(1e4, None),
        peak_bytes=_figure(2.0**40, None),
    )
    assert broken_limits(alone, PLAN) == []
    assert alone.backward_transfer is None


def test_what_is_at_fault_goes_before_what_the_plan_does_not_cover() -> None:
    outside, broken = Reason(check="change", text="", outside=True), Reason(check="sanity", text="")
    assert verdict_of([outside]) is Verdict.OUTSIDE_PLAN
    assert verdict_of([outside, broken]) is Verdict.REJECTED


def test_a_plan_is_known_by_the_digest_of_its_canonical_json() -> None:
    content = json.dumps(ChangePlan().model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    assert ChangePlan().digest == hashlib.sha256(content.encode()).hexdigest()
    assert ChangePlan(max_dice_loss=0.02).digest != ChangePlan().digest
