"""engine.version_comparison: means over the same cases for both, and an invented label is a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from engine.case_figures import CaseFigures
from engine.dataset import Case
from engine.labels import Label
from engine.locked_cases import LockedCase, is_new
from engine.metrics import Region, RegionMetrics
from engine.regression_suite import SuiteFigures, Timing
from engine.version_comparison import NewlyEmpty, compare_versions

LIVER, SPLEEN = Label(name="liver", value=1, region=(1,)), Label(name="spleen", value=2, region=(2,))
Counts = tuple[int, int, int]
"""True positives, false positives, false negatives."""
PERFECT, HALF, NEITHER, INVENTED, MISSED = (10, 0, 0), (5, 0, 10), (0, 0, 0), (0, 7, 0), (0, 0, 10)


def _figures(counts: Mapping[Region, Counts], seconds: float = 1.0, peak_bytes: int = 100) -> CaseFigures:
    metrics = {
        region: RegionMetrics(
            true_positives=both,
            false_positives=only_found,
            false_negatives=only_there,
            true_negatives=100,
            hd95_mm=None if (both, only_found, only_there) == NEITHER else 4.0,
            surface_dice=None,
        )
        for region, (both, only_found, only_there) in counts.items()
    }
    return CaseFigures(metrics=metrics, seconds=seconds, peak_bytes=peak_bytes)


def _case(name: str, stratum: str | None = None) -> LockedCase:
    case = Case(name=name, channels={}, label=Path(name))
    return LockedCase(case=case, stratum=stratum, digest=name, image_digest=name, voxels=1)


def _suite(rows: Sequence[tuple[str | None, Counts, Counts | None]], timing: Timing | None = None) -> SuiteFigures:
    """(stratum, candidate, champion) of each case; only the liver is measured, the spleen is nowhere."""
    champions = [None if theirs is None else _figures({(1,): theirs, (2,): NEITHER}) for _, _, theirs in rows]
    known = [champion for champion in champions if champion is not None]
    return SuiteFigures(
        cases=tuple(_case(f"case_{index}", stratum) for index, (stratum, _, _) in enumerate(rows)),
        candidate=tuple(_figures({(1,): own, (2,): NEITHER}) for _, own, _ in rows),
        champion=tuple(known) if known else None,
        timing=timing or (Timing(cases=("case_0",), candidate_s=(3.0,), champion_s=(2.0,)) if known else None),
        known=0,
    )


def test_a_label_that_no_case_has_is_untested_and_in_no_mean() -> None:
    found = compare_versions(_suite([(None, PERFECT, PERFECT)]), [LIVER, SPLEEN])
    assert found.untested == ("spleen",)
    assert list(found.label_dice) == ["liver"]
    assert found.dice is not None
    assert (found.dice.candidate, found.dice.loss) == (1.0, 0.0)


def test_a_label_invented_where_there_is_none_is_a_loss_for_who_invents_it() -> None:
    found = compare_versions(_suite([(None, PERFECT, PERFECT), (None, INVENTED, NEITHER)]), [LIVER])
    assert (found.label_dice["liver"].candidate, found.label_dice["liver"].champion) == (0.5, 1.0)
    assert found.label_dice["liver"].cases == 2
    other = compare_versions(_suite([(None, PERFECT, PERFECT), (None, NEITHER, INVENTED)]), [LIVER])
    assert other.label_dice["liver"].loss == -0.5
    neither = compare_versions(_suite([(None, PERFECT, PERFECT), (None, NEITHER, NEITHER)]), [LIVER])
    assert neither.label_dice["liver"].cases == 1


@pytest.mark.requirement("ART-23")
def test_strata_are_compared_apart_and_the_old_test_leaves_out_what_is_new() -> None:
    rows = [("site a", HALF, PERFECT), ("site a", PERFECT, PERFECT), ("new/site b", PERFECT, HALF)]
    found = compare_versions(_suite(rows), [LIVER])
    assert found.stratum_dice["site a"].loss == pytest.approx(0.25)
    assert found.stratum_dice["new/site b"].loss == pytest.approx(-0.5)
    assert found.backward_transfer == pytest.approx(-0.25)
    assert found.dice is not None
    assert found.dice.loss == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("stratum", "new"), [("new", True), ("new/site b", True), ("new york", False), ("old", False), (None, False)]
)
def test_new_is_what_is_called_new(stratum: str | None, new: bool) -> None:
    assert is_new(stratum) is new


def test_where_every_case_is_new_there_is_no_old_test() -> None:
    found = compare_versions(_suite([("new", PERFECT, PERFECT)]), [LIVER])
    assert (found.old_dice, found.backward_transfer) == (None, None)


def test_newly_empty_is_what_is_there_was_found_and_is_found_no_more() -> None:
    rows = [
        (None, MISSED, PERFECT),
        (None, MISSED, MISSED),  # as before
        (None, NEITHER, INVENTED),  # it is not there
        (None, HALF, PERFECT),
        (None, MISSED, (0, 5, 10)),  # the champion found it elsewhere only
    ]
    assert compare_versions(_suite(rows), [LIVER]).newly_empty == (NewlyEmpty(case="case_0", label="liver"),)


def test_times_are_of_the_cases_that_both_ran_and_memory_of_all() -> None:
    timing = Timing(cases=("case_0", "case_1"), candidate_s=(3.0, 5.0), champion_s=(2.0, 2.0))
    found = compare_versions(_suite([(None, PERFECT, PERFECT)] * 3, timing), [LIVER])
    assert (found.seconds.candidate, found.seconds.champion, found.seconds.ratio) == (4.0, 2.0, 2.0)
    assert (found.peak_bytes.candidate, found.peak_bytes.ratio) == (100, 1.0)


def test_a_first_version_has_figures_and_no_losses() -> None:
    found = compare_versions(_suite([(None, HALF, None), (None, PERFECT, None)]), [LIVER])
    assert found.dice is not None
    assert (found.dice.candidate, found.dice.champion, found.dice.loss) == (0.75, None, None)
    assert (found.seconds.candidate, found.seconds.champion, found.seconds.ratio) == (1.0, None, None)
    assert (found.peak_bytes.champion, found.newly_empty) == (None, ())


def test_hd95_of_a_label_that_both_rightly_leave_out_counts_nowhere() -> None:
    found = compare_versions(_suite([(None, PERFECT, PERFECT), (None, NEITHER, NEITHER)]), [LIVER])
    assert found.label_hd95_mm["liver"].candidate == 4.0
