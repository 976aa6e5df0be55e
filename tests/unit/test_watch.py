"""When the first studies of a new champion ask for a rollback, and when they have passed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from gateway.learning.rollback import withdrawn_since_promotion
from gateway.learning.watch import Rate, Watched, is_watched
from storage.learning_records import ServingPeriod
from storage.records import utc_now


def watched(studies: int, *, failed: int = 0, held: int = 0, empty: int = 0, least: int = 3) -> Watched:
    counts = {"failed": (failed, 0.2), "held": (held, 0.5), "empty": (empty, 0.3)}
    rates = tuple(Rate(what=what, studies=n, limit=limit) for what, (n, limit) in counts.items())
    return Watched(studies=studies, wanted=30, least=least, rates=rates)


@pytest.mark.requirement("ART-23")
@pytest.mark.parametrize(
    ("seen", "what"),
    [
        (watched(2, failed=2), None),  # too few studies say nothing
        (watched(3, failed=1), None),  # one odd study says nothing
        (watched(3, failed=2), "failed"),
        (watched(10, failed=2), None),  # at the limit is within it
        (watched(9, failed=2), "failed"),
        (watched(4, held=2), None),
        (watched(3, held=2), "held"),
        (watched(10, empty=4), "empty"),
        (watched(1, failed=1, least=1), "failed"),
        (watched(30), None),
    ],
)
def test_a_rate_above_its_limit_asks_for_a_rollback(seen: Watched, what: str | None) -> None:
    beyond = seen.beyond()
    assert (beyond.what if beyond else None) == what


@pytest.mark.requirement("ART-23")
@pytest.mark.parametrize(
    ("seen", "passed"), [(watched(29), False), (watched(30, failed=6), True), (watched(30, failed=7), False)]
)
def test_a_version_has_passed_after_enough_studies_within_the_limits(seen: Watched, passed: bool) -> None:
    assert seen.is_passed is passed


def test_by_chance_alone_a_good_version_is_rarely_rolled_back() -> None:
    # Exact: the counts after each study, of a version that fails in 1 of 100; docs/learning.md quotes it.
    assert _rolled_back(0.01) == pytest.approx(0.0035, abs=1e-4)
    assert _rolled_back(0.5) > 0.999


def _rolled_back(rate: float) -> float:
    alive, gone = {0: 1.0}, 0.0
    for studies in range(1, 31):
        after: dict[int, float] = {}
        for failed, chance in alive.items():
            after[failed] = after.get(failed, 0.0) + chance * (1 - rate)
            after[failed + 1] = after.get(failed + 1, 0.0) + chance * rate
        gone += sum(chance for failed, chance in after.items() if watched(studies, failed=failed).beyond())
        alive = {failed: chance for failed, chance in after.items() if not watched(studies, failed=failed).beyond()}
    return gone


def period(version: str, **columns: Any) -> ServingPeriod:
    return ServingPeriod(
        model_name="m", model_version=version, rolled_back=columns.pop("rolled_back", False), **columns
    )


ENDED = utc_now() - timedelta(days=1)


@pytest.mark.parametrize(
    ("periods", "expected"),
    [
        ([], False),
        ([period("1.0.0")], False),  # nothing to go back to
        ([period("2.0.0", previous_version="1.0.0")], True),
        ([period("2.0.0", previous_version="1.0.0", watched_until=ENDED)], False),
        ([period("2.0.0", previous_version="1.0.0", ended_at=ENDED)], False),
        # A rollback began it: it would go back to what was just withdrawn.
        (
            [
                period("1.0.0", previous_version="2.0.0"),
                period("2.0.0", ended_at=ENDED, rolled_back=True),
            ],
            False,
        ),
    ],
)
def test_only_a_new_version_with_one_before_it_is_watched(periods: list[ServingPeriod], expected: bool) -> None:
    assert is_watched(periods) is expected


def test_what_was_rolled_back_before_the_last_promotion_is_settled() -> None:
    old = [period("1.0.0", ended_at=ENDED), period("0.9.0", ended_at=ENDED, rolled_back=True)]
    assert withdrawn_since_promotion([period("2.0.0"), *old]) == []
    both = [period("3.0.0", ended_at=ENDED, rolled_back=True), period("2.0.0", ended_at=ENDED, rolled_back=True)]
    assert [p.model_version for p in withdrawn_since_promotion([period("1.0.0"), *both, *old])] == ["3.0.0", "2.0.0"]
