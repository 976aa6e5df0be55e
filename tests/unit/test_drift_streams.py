"""engine.drift_streams: distances between groups of studies are those that scipy and the definitions give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from engine.drift_streams import Categories, Groups, Histograms, Numbers, Stream, jensen_shannon, kl_divergence

NAN = math.nan


def groups_of(studies: int, *chosen: list[int]) -> Groups:
    members = np.zeros((len(chosen), studies), dtype=np.bool_)
    for row, indices in zip(members, chosen, strict=True):
        row[indices] = True
    return Groups(members=members)


def test_divergences_are_those_of_their_definitions() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    assert float(kl_divergence(p, q)) == pytest.approx(stats.entropy(p, q))
    middle = (p + q) / 2
    assert float(jensen_shannon(p, q)) == pytest.approx((stats.entropy(p, middle) + stats.entropy(q, middle)) / 2)
    assert float(jensen_shannon(p, q)) == float(jensen_shannon(q, p))
    assert float(jensen_shannon(np.array([1 - 1e-12, 1e-12]), np.array([1e-12, 1 - 1e-12]))) == pytest.approx(
        math.log(2)
    )


@pytest.mark.requirement("ART-20")
def test_histograms_weigh_each_study_alike_and_one_unseen_bin_gives_no_infinity() -> None:
    reference = Histograms(name="intensity", shares=np.tile([0.5, 0.5, 0.0], (40, 1)))
    assert reference.distance(np.tile([0.5, 0.5, 0.0], (40, 1))) == pytest.approx(0.0, abs=1e-12)
    changed = np.tile([0.5, 0.4, 0.1], (30, 1))
    assert 0 < reference.distance(changed) < math.log(2)
    assert 0 < reference.kl(changed) < 1
    # A study in which nothing was found has no histogram, and changes nothing.
    with_empty = np.vstack([changed, np.zeros((5, 3))])
    assert reference.distance(with_empty) == pytest.approx(reference.distance(changed))


@pytest.mark.parametrize("missing", [False, True])
def test_numbers_are_compared_by_kolmogorov_and_smirnov_with_ties(missing: bool) -> None:
    random = np.random.default_rng(2)
    here, there = random.normal(0, 1, 50).round(1), random.normal(0.5, 1, 30).round(1)
    expected = stats.ks_2samp(there, here).statistic * math.sqrt(50 * 30 / 80)
    if missing:
        here[:5], there[:20] = NAN, NAN
        low = [np.where(np.isnan(values), -99.0, values) for values in (there, here)]
        expected = stats.ks_2samp(*low).statistic * math.sqrt(50 * 30 / 80)
    assert Numbers(name="kvp", values=here).distance(there) == pytest.approx(expected)


def test_categories_are_compared_by_g_and_new_ones_share_a_bucket() -> None:
    reference = Categories(name="manufacturer", values=("A",) * 60 + ("B",) * 40)
    assert reference.distance(["A"] * 18 + ["B"] * 12) < 0.15  # half a study has the bucket of what was never seen
    observed, others = np.array([10, 15, 5]), np.array([60.5, 40.5, 0.5])
    expected, _ = stats.power_divergence(observed, others / others.sum() * 30, lambda_="log-likelihood")
    assert reference.distance(["A"] * 10 + ["B"] * 15 + ["C"] * 2 + ["D"] * 3) == pytest.approx(expected / 2)
    assert reference.distance(["C"] * 30) > 10 * reference.distance(["A"] * 10 + ["B"] * 20)
    # A fact that is missing is a category too.
    assert Categories(name="kernel", values=("",) * 50).distance(["x"] * 30) > 1


@pytest.mark.parametrize("kind", ["histograms", "numbers", "categories"])
def test_a_group_of_the_reference_is_as_far_as_live_studies_like_it_from_the_rest(kind: str) -> None:
    random = np.random.default_rng(3)
    shares = random.dirichlet(np.ones(8), 20)
    numbers = random.normal(size=20).round(1)
    numbers[3] = NAN
    texts = [str(value) for value in random.choice(["A", "B", "C"], 20)]
    chosen = [[0, 3, 5, 7, 9], [1, 2, 4, 6, 8]]
    rest = [[index for index in range(20) if index not in group] for group in chosen]
    groups = groups_of(20, *chosen)
    whole: Stream
    if kind == "histograms":
        whole = Histograms(name="h", shares=shares)
        expected = [
            Histograms(name="h", shares=shares[r]).distance(shares[g]) for g, r in zip(chosen, rest, strict=True)
        ]
    elif kind == "numbers":
        whole = Numbers(name="n", values=numbers)
        expected = [
            Numbers(name="n", values=numbers[r]).distance(numbers[g]) for g, r in zip(chosen, rest, strict=True)
        ]
    else:
        whole = Categories(name="c", values=tuple(texts))
        expected = [
            Categories(name="c", values=tuple(texts[i] for i in r)).distance([texts[i] for i in g])
            for g, r in zip(chosen, rest, strict=True)
        ]
    np.testing.assert_allclose(whole.of_groups(groups), expected, rtol=1e-9)


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_many_groups_at_once_are_as_far_as_each_by_itself_however_many_values_are_alike(digits: int) -> None:
    random = np.random.default_rng(4)
    values = random.normal(0, 3, 150).round(digits)
    values[:4] = NAN
    members = random.random((100, 150)) < 0.3  # of various sizes
    found = Numbers(name="n", values=values).of_groups(Groups(members=members))
    ranked = np.where(np.isnan(values), -99.0, values)
    expected = [
        stats.ks_2samp(ranked[row], ranked[~row]).statistic * math.sqrt(row.sum() * (~row).sum() / 150)
        for row in members
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_number_that_never_varies_is_the_same_in_all_groups() -> None:
    members = np.random.default_rng(5).random((70, 40)) < 0.5
    assert not Numbers(name="n", values=np.full(40, 7.0)).of_groups(Groups(members=members)).any()


def test_whole_numbers_do_not_overflow_in_a_reference_of_many_studies() -> None:
    studies = 50_000  # whose square is above 2**31
    values = np.repeat([1.0, 2.0], studies // 2)
    members = np.zeros((64, studies), dtype=np.bool_)
    members[:, : studies // 2] = True
    found = Numbers(name="n", values=values).of_groups(Groups(members=members))
    assert found == pytest.approx(math.sqrt(studies / 4))
