"""engine.sampling and engine.random_state: nnU-Net's patch bounds, and draws that depend on their place alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from engine.random_state import Purpose, random_generator
from engine.sampling import Bounds, ClassLocations, PatchSampler, central_bounds, read_patch

HIPPOCAMPUS = PatchSampler(
    seed=1,
    stage="training",
    cases=10,
    batch_size=9,
    patch_size=(40, 56, 40),
    initial_patch_size=(73, 80, 64),
)
NOWHERE: dict[int | tuple[int, ...], list[tuple[int, ...]]] = {1: [], 2: []}


def _sampler(patch: tuple[int, ...], initial: tuple[int, ...], *, ignore: bool = False) -> PatchSampler:
    return PatchSampler(
        seed=3,
        stage="training",
        cases=4,
        batch_size=2,
        patch_size=patch,
        initial_patch_size=initial,
        has_ignore_label=ignore,
    )


def _starts(sampler: PatchSampler, shape: tuple[int, ...], sample: int, count: int = 2000) -> list[tuple[int, ...]]:
    drawn = (sampler.bounds(shape, NOWHERE, epoch=0, iteration=i, sample=sample) for i in range(count))
    return [tuple(low for low, _ in bounds) for bounds in drawn]


@pytest.mark.parametrize(
    ("shape", "lowest", "highest"),
    [
        # need = (33, 24, 24); low = floor(-need / 2), high = shape + need // 2 + need % 2 - patch.
        ((100, 100, 100), (-17, -12, -12), (44, 32, 48)),
        # The first axis is smaller than the patch by more than 33: need = 43.
        ((30, 80, 64), (-22, -12, -12), (-21, 12, 12)),
    ],
)
def test_random_patches_reach_from_the_first_to_the_last_start_of_nnunet(
    shape: tuple[int, ...], lowest: tuple[int, ...], highest: tuple[int, ...]
) -> None:
    starts = np.array(_starts(HIPPOCAMPUS, shape, sample=0))
    assert tuple(starts.min(axis=0)) == lowest
    assert tuple(starts.max(axis=0)) == highest
    # Uniform: the mean is within four standard errors of the middle.
    spread = (np.array(highest) - lowest + 1) / np.sqrt(12 * len(starts))
    assert (abs(starts.mean(axis=0) - (np.array(highest) + lowest) / 2) < 4 * spread + 1e-9).all()


def test_every_patch_has_the_initial_size() -> None:
    bounds = HIPPOCAMPUS.bounds((36, 50, 35), NOWHERE, epoch=0, iteration=0, sample=8)
    assert tuple(high - low for low, high in bounds) == (73, 80, 64)


@pytest.mark.parametrize(("batch_size", "forced"), [(2, 1), (9, 3), (12, 4), (1, 0)])
def test_the_last_third_of_a_batch_is_forced_to_foreground(batch_size: int, forced: int) -> None:
    sampler = PatchSampler(
        seed=0, stage="training", cases=1, batch_size=batch_size, patch_size=(8, 8), initial_patch_size=(8, 8)
    )
    chosen = [sampler.is_foreground_forced(sample) for sample in range(batch_size)]
    assert chosen == [False] * (batch_size - forced) + [True] * forced


def test_forced_patches_are_centred_and_kept_from_starting_too_early_only() -> None:
    sampler = _sampler((8, 8, 8), (11, 11, 11))
    bounds = sampler.bounds((20, 20, 20), {1: [(0, 0, 19, 10)]}, epoch=0, iteration=0, sample=1)
    # The voxel less half a patch is (-5, 14, 5). Random starts are from -2 to 11: the first is raised, the second not
    # lowered.
    assert [low for low, _ in bounds] == [-2, 14, 5]


def test_forced_patches_take_each_class_alike_and_each_of_its_voxels_alike() -> None:
    sampler = _sampler((8, 8, 8), (8, 8, 8))
    locations: ClassLocations = {1: [(0, 10, 10, 10)], 2: [(0, 12, 12, 12), (0, 14, 14, 14)], 3: []}
    drawn = (sampler.bounds((30, 30, 30), locations, epoch=1, iteration=i, sample=1) for i in range(4000))
    counts = Counter(bounds[0][0] + 4 for bounds in drawn)
    assert set(counts) == {10, 12, 14}
    assert abs(counts[10] - 2000) < 4 * np.sqrt(4000 * 0.25)
    assert abs(counts[12] - 1000) < 4 * np.sqrt(4000 * 0.1875)


def test_with_an_ignore_label_the_others_are_centred_on_annotated_voxels() -> None:
    annotated = (-1, 0, 1, 2)
    locations: ClassLocations = {1: [(0, 9, 9, 9)], annotated: [(0, 15, 15, 15)]}
    bounds = {
        ignore: [
            _sampler((8, 8, 8), (8, 8, 8), ignore=ignore).bounds(
                (30, 30, 30), locations, epoch=0, iteration=i, sample=sample
            )
            for i, sample in ((0, 0), (1, 0), (2, 1))
        ]
        for ignore in (True, False)
    }
    at_15: Bounds = ((11, 19),) * 3
    at_9: Bounds = ((5, 13),) * 3
    assert bounds[True] == [at_15, at_15, at_9]
    # Without one, the annotated voxels are no class: only the forced sample is centred.
    assert at_15 not in bounds[False]
    assert bounds[False][2] == at_9


def test_annotated_voxels_are_used_when_a_case_has_no_class() -> None:
    sampler = _sampler((8, 8, 8), (8, 8, 8), ignore=True)
    locations: ClassLocations = {1: [], (-1, 0, 1): [(0, 15, 15, 15)]}
    assert sampler.bounds((30, 30, 30), locations, epoch=0, iteration=0, sample=1) == ((11, 19),) * 3


def test_2d_patches_are_slices_and_forced_ones_the_slice_of_the_voxel() -> None:
    sampler = _sampler((8, 8), (10, 10))
    starts = np.array(_starts(sampler, (5, 30, 30), sample=0))
    assert set(starts[:, 0]) == {0, 1, 2, 3, 4}
    assert (starts[:, 1].min(), starts[:, 1].max()) == (-1, 21)
    forced = sampler.bounds((5, 30, 30), {1: [(0, 3, 20, 10)]}, epoch=0, iteration=0, sample=1)
    assert forced == ((3, 4), (15, 25), (5, 15))


def test_cases_are_drawn_uniformly_with_replacement() -> None:
    counts = Counter(
        HIPPOCAMPUS.case(epoch=e, iteration=i, sample=s) for e in range(5) for i in range(100) for s in range(9)
    )
    assert set(counts) == set(range(10))
    assert max(abs(n - 450) for n in counts.values()) < 4 * np.sqrt(4500 * 0.09)


def test_a_sample_depends_on_its_place_alone() -> None:
    def draw(seed: int, stage: str, epoch: int, iteration: int, sample: int) -> tuple[int, Bounds]:
        sampler = PatchSampler(
            seed=seed,
            stage=stage,  # type: ignore[arg-type]
            cases=1000,
            batch_size=9,
            patch_size=(40, 56, 40),
            initial_patch_size=(73, 80, 64),
        )
        place = {"epoch": epoch, "iteration": iteration, "sample": sample}
        return sampler.case(**place), sampler.bounds((500, 500, 500), NOWHERE, **place)

    first = draw(1, "training", 2, 3, 4)
    others = [
        draw(2, "training", 2, 3, 4),
        draw(1, "validation", 2, 3, 4),
        draw(1, "training", 3, 3, 4),
        draw(1, "training", 2, 4, 4),
        draw(1, "training", 2, 3, 5),
    ]
    assert draw(1, "training", 2, 3, 4) == first
    assert len({first, *others}) == 6


def test_random_numbers_of_a_place_never_change() -> None:
    """A seed written down today must mean the same tomorrow."""
    rng = random_generator(12345, Purpose.AUGMENTATION, epoch=7, iteration=11, sample=3)
    assert rng.random(3) == pytest.approx([0.535425753, 0.660962603, 0.924116309])


def test_a_patch_beyond_the_array_is_filled() -> None:
    array = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    patch = read_patch(array, ((-1, 2), (1, 3), (3, 7)), -1)
    assert patch.shape == (2, 3, 2, 4)
    assert (patch[:, 0] == -1).all()
    assert (patch[..., 2:] == -1).all()
    assert np.array_equal(patch[:, 1:, :, :2], array[:, 0:2, 1:3, 3:5])
    assert (read_patch(array, ((5, 8), (0, 2), (0, 2)), -1) == -1).all()


def test_the_middle_of_a_patch_is_where_a_crop_of_the_patch_would_be() -> None:
    array = np.random.default_rng(0).random((1, 30, 30, 30)).astype(np.float32)
    bounds = ((-4, 9), (3, 15), (20, 36))
    middle = central_bounds(bounds, (8, 7, 6))
    whole = read_patch(array, bounds, 0.0)
    assert np.array_equal(read_patch(array, middle, 0.0), whole[:, 2:10, 3:10, 5:11])
    assert central_bounds(((4, 5), (0, 10), (0, 10)), (6, 6)) == ((4, 5), (2, 8), (2, 8))


def test_patches_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="2 or 3 sizes"):
        _sampler((8, 8, 8), (10, 10))
