"""Rehearsal: every epoch has the stated share of old cases, to the sample."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.rehearsal import LEAST_SHARE, MOST_SHARE, SHARE, Rehearsal, RehearsalDraw
from engine.sampling import PatchSampler

OLD, NEW = (0, 2, 4), (1, 3)


def draw(share: float) -> RehearsalDraw:
    return RehearsalDraw(old=OLD, new=NEW, share=share)


def old_samples(share: float, *, batch_size: int, iterations: int, epoch: int = 0, seed: int = 3) -> list[list[int]]:
    """Of each batch the samples that are of old cases."""
    found = draw(share)
    return [
        [
            sample
            for sample in range(batch_size)
            if found.is_old(seed=seed, batch_size=batch_size, epoch=epoch, iteration=iteration, sample=sample)
        ]
        for iteration in range(iterations)
    ]


@pytest.mark.requirement("ART-21")
@pytest.mark.parametrize("share", [LEAST_SHARE, 0.3, SHARE, 0.4, MOST_SHARE])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 12])
def test_an_epoch_has_the_share_of_old_cases_to_the_sample(share: float, batch_size: int) -> None:
    batches = old_samples(share, batch_size=batch_size, iterations=250)
    total = sum(map(len, batches))
    assert abs(total - share * 250 * batch_size) <= 0.5
    # Evenly: no part of the epoch has more than its own share and one sample.
    for end in range(1, 251):
        assert abs(sum(map(len, batches[:end])) - share * end * batch_size) <= 0.5


def test_old_cases_take_every_place_of_a_batch_alike() -> None:
    """The last places are centred on foreground; were they always old cases, new foreground would not be learnt."""
    for share in (SHARE, MOST_SHARE):
        places = Counter(place for batch in old_samples(share, batch_size=2, iterations=2000) for place in batch)
        assert 0.45 < places[0] / places.total() < 0.55


def test_a_batch_is_the_same_whenever_it_is_asked_for_and_another_in_another_epoch() -> None:
    first = old_samples(SHARE, batch_size=2, iterations=100)
    assert first == old_samples(SHARE, batch_size=2, iterations=100)
    assert first != old_samples(SHARE, batch_size=2, iterations=100, epoch=1)
    assert first != old_samples(SHARE, batch_size=2, iterations=100, seed=4)


def test_the_sampler_draws_old_and_new_cases_from_their_own_side() -> None:
    sampler = PatchSampler(
        seed=3,
        stage="training",
        cases=5,
        batch_size=2,
        patch_size=(8, 8, 8),
        initial_patch_size=(8, 8, 8),
        rehearsal=draw(1 / 3),
    )
    seen: Counter[int] = Counter()
    for iteration, old in enumerate(old_samples(1 / 3, batch_size=2, iterations=300)):
        for sample in range(2):
            case = sampler.case(epoch=0, iteration=iteration, sample=sample)
            assert (case in OLD) == (sample in old)
            seen[case] += 1
    assert sum(seen[case] for case in OLD) == 200
    assert all(seen[case] > 40 for case in OLD)
    assert all(seen[case] > 150 for case in NEW)


@pytest.mark.parametrize("share", [0.0, 0.24, 0.51, 1.0])
def test_another_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"0\.25 to 0\.5"):
        Rehearsal(old=("a",), share=share)


@pytest.mark.parametrize("names", [("a", "b"), ("c",)])
def test_a_rehearsal_without_old_or_without_new_cases_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="needs both"):
        RehearsalDraw.of(Rehearsal(old=("a", "b"), share=SHARE), names)
