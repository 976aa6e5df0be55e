"""engine.case_selection: which cases are learnt from."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from engine.case_selection import Candidate, Choice, select_cases

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def case(index: int, confidence: float | None = None, **changes: Any) -> Candidate:
    """By default the surer the higher its number, each of a patient of its own."""
    values: dict[str, Any] = {
        "id": f"r{index:04}",
        "confidence": index / 10_000 if confidence is None else confidence,
        "at": NOW - timedelta(hours=index),
        "scanner": "ACME One",
        "patient": f"p{index}",
    }
    return Candidate(**(values | changes))


def chosen(candidates: Sequence[Candidate], *, most: int = 10, random_share: float = 0.0, seed: str = "m 1.0.0") -> Any:
    return select_cases(candidates, most=most, random_share=random_share, seed=seed)


def ids(choices: Sequence[Choice], why: str = "uncertain") -> list[str]:
    return [choice.id for choice in choices if choice.why == why]


@pytest.mark.requirement("ART-21")
def test_of_cases_that_are_alike_the_least_sure_are_taken_in_their_order() -> None:
    assert ids(chosen([case(i) for i in range(100)], most=10)) == [f"r{i:04}" for i in range(10)]


@pytest.mark.requirement("ART-21")
def test_near_duplicates_give_way_to_different_cases_but_never_to_sure_ones() -> None:
    """The 20 least sure are one case 20 times; the next 20 differ; the surer half is never looked at."""
    alike = [case(i, features={"volume": 1.0, "noise": 1.0}) for i in range(20)]
    other = [case(i, features={"volume": 1.0 + i, "noise": float(i % 7)}) for i in range(20, 40)]
    sure = [case(i, features={"volume": 500.0 + i, "noise": 90.0}) for i in range(40, 100)]
    found = ids(chosen([*alike, *other, *sure], most=20))
    assert len(found) == 20
    assert len(set(found) & {c.id for c in alike}) == 1
    assert set(found).isdisjoint(c.id for c in sure)


def test_with_hardly_more_cases_than_are_wanted_confidence_decides_alone() -> None:
    cases = [case(i, features={"volume": float(i**2)}) for i in range(25)]
    assert ids(chosen(cases, most=20)) == [f"r{i:04}" for i in range(20)]


def test_every_scanner_among_the_unsure_is_there() -> None:
    cases = [case(i, scanner=f"ACME {max(0, i - 15)}") for i in range(80)]
    found = set(ids(chosen(cases, most=10)))
    assert {f"r{i:04}" for i in range(16, 20)} <= found  # four scanners with one unsure case each


def test_one_odd_value_does_not_decide_for_all() -> None:
    """A feature that one case has 1e6 times larger would make all others alike."""
    cases = [case(i, features={"volume": float(i % 2), "kvp": 1e6 if i == 3 else 0.0}) for i in range(40)]
    found = ids(chosen(cases, most=4))
    assert {int(name[1:]) % 2 for name in found if name != "r0003"} == {0, 1}


@pytest.mark.requirement("ART-21")
def test_the_same_cases_give_the_same_selection_in_any_order() -> None:
    cases = [case(i, features={"volume": float(i % 11), "size": float(i % 5)}) for i in range(300)]
    expected = chosen(cases, most=50, random_share=0.1)
    shuffled = cases.copy()
    random.Random(7).shuffle(shuffled)
    assert chosen(shuffled, most=50, random_share=0.1) == expected


@pytest.mark.requirement("ART-21")
def test_a_tenth_is_drawn_by_chance_beside_what_is_learnt() -> None:
    found = chosen([case(i) for i in range(2000)], most=90, random_share=0.1)
    assert Counter(choice.why for choice in found) == {"uncertain": 90, "random": 10}


@pytest.mark.requirement("ART-21")
def test_the_draw_knows_nothing_of_confidence() -> None:
    """With all confidences reversed the same cases are drawn; the unsure ones are others."""
    cases = [case(i) for i in range(1000)]
    reversed_ = [case(i, confidence=1.0 - i / 10_000) for i in range(1000)]
    before, after = (chosen(c, most=50, random_share=0.1) for c in (cases, reversed_))
    assert ids(before, "random") == ids(after, "random")
    assert set(ids(before)).isdisjoint(ids(after))
    # And it is spread over all of them: of even draws some lie in each quarter.
    drawn = {int(name[1:]) // 250 for name in ids(chosen(cases, most=500, random_share=0.1), "random")}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.requirement("ART-21")
def test_who_is_drawn_is_never_learnt_from_however_many_come_later() -> None:
    cases = [case(i) for i in range(400)]
    early = chosen(cases[:200], most=90, random_share=0.1)
    late = chosen(cases, most=300, random_share=0.1)
    assert set(ids(early, "random")).isdisjoint(ids(late))
    assert set(ids(late, "random")).isdisjoint(ids(early))


def test_another_version_draws_others() -> None:
    cases = [case(i) for i in range(500)]
    first, second = (ids(chosen(cases, random_share=0.1, most=100, seed=s), "random") for s in ("m 1.0.0", "m 1.1.0"))
    assert first != second


def test_all_cases_of_a_patient_are_on_one_side() -> None:
    cases = [case(i, patient=f"p{i % 40}") for i in range(200)]
    found = chosen(cases, most=100, random_share=0.3)
    sides = {why: {int(name[1:]) % 40 for name in ids(found, why)} for why in ("uncertain", "random")}
    assert sides["random"]
    assert sides["random"].isdisjoint(sides["uncertain"])


def test_a_patient_who_was_learnt_from_measures_nothing() -> None:
    cases = [case(i) for i in range(100)]
    drawn = set(ids(chosen(cases, most=90, random_share=0.3), "random"))
    known = [case(i, is_known=f"r{i:04}" in drawn) for i in range(100)]
    found = chosen(known, most=100, random_share=0.3)
    assert drawn.isdisjoint(ids(found, "random"))
    assert drawn <= set(ids(found))


def test_required_cases_come_first_and_count_among_the_most() -> None:
    cases = [case(i, is_required=i >= 95) for i in range(100)]
    found = chosen(cases, most=10)
    assert ids(found, "corrected") == [f"r{i:04}" for i in range(95, 100)]
    assert ids(found) == [f"r{i:04}" for i in range(5)]
    everybody = chosen([case(i, is_required=True) for i in range(100)], most=10)
    assert (len(ids(everybody, "corrected")), ids(everybody)) == (10, [])


def test_labels_that_are_there_are_used_before_a_reader_is_asked_again() -> None:
    """Of the unsure half alone: a sure case with labels teaches little."""
    cases = [case(i, is_labelled=i in (7, 13, 70), features={"volume": float(i % 9)}) for i in range(100)]
    found = set(ids(chosen(cases, most=8)))
    assert {"r0007", "r0013"} <= found
    assert "r0070" not in found


def test_a_case_of_unknown_confidence_is_drawn_or_required_and_never_counts_as_unsure() -> None:
    def unknown(index: int, *, is_required: bool = False) -> Candidate:
        return replace(case(index, is_required=is_required), confidence=None)

    cases = [unknown(i) for i in range(100)]
    assert ids(chosen(cases, most=50, random_share=0.2)) == []
    assert ids(chosen(cases, most=50, random_share=0.2), "random") != []
    assert ids(chosen([unknown(1, is_required=True)]), "corrected") == ["r0001"]


def test_features_that_some_cases_lack_do_not_set_them_apart() -> None:
    cases = [case(i, features={} if i % 2 else {"volume": float(i % 3)}) for i in range(40)]
    assert len(ids(chosen(cases, most=10))) == 10
    assert chosen([], most=10, random_share=0.1) == ()
