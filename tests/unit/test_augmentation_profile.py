"""engine.augmentation_profile: patch sizes, probabilities and ranges of both profiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from engine.augmentation_profile import (
    ARTICLE,
    NNUNET,
    AugmentationPlan,
    AugmentationProfile,
    SampleDraw,
    draw_sample,
    initial_patch_size,
    rotation_limit_degrees,
)
from engine.random_state import Purpose, random_generator

DRAWS = 4000
CHANNELS = 2


def _plan(profile: AugmentationProfile, patch: tuple[int, ...] = (40, 56, 40), **more: object) -> AugmentationPlan:
    fields = {"spacing_mm": (1.0, 2.0, 0.5)[-len(patch) :], "mirror_axes": tuple(range(len(patch)))} | more
    return AugmentationPlan(profile=profile, patch_size=patch, **fields)  # type: ignore[arg-type]


def _draws(plan: AugmentationPlan, count: int = DRAWS) -> list[SampleDraw]:
    return [
        draw_sample(plan, CHANNELS, random_generator(5, Purpose.AUGMENTATION, epoch=0, iteration=i))
        for i in range(count)
    ]


NNUNET_DRAWS = _draws(_plan(NNUNET))
ARTICLE_DRAWS = _draws(_plan(ARTICLE))


def _near(hits: Iterable[object], probability: float) -> bool:
    """Within four standard deviations of a binomial count."""
    found = list(hits)
    allowed = 4 * math.sqrt(len(found) * probability * (1 - probability))
    return abs(sum(map(bool, found)) - len(found) * probability) <= allowed


@pytest.mark.requirement("ART-09")
@pytest.mark.parametrize(
    ("name", "nnunet", "article"),
    [
        ("angles_rad", 0.2, 0.2),
        ("scales", 0.2, 0.2),
        ("control_points", 0.0, 0.2),
        ("noise_sigma", 0.1, 0.1),
        ("blur_sigmas", 0.2, 0.25),
        ("brightness", 0.15, 0.15),
        ("contrast", 0.15, 0.15),
        ("zooms", 0.25, 0.0),
        ("inverted_gamma", 0.1, 0.0),
        ("gamma", 0.3, 0.3),
    ],
)
def test_each_transform_is_drawn_as_often_as_its_profile_says(name: str, nnunet: float, article: float) -> None:
    for draws, probability in ((NNUNET_DRAWS, nnunet), (ARTICLE_DRAWS, article)):
        values = [getattr(draw, name) for draw in draws]
        assert _near(
            (value is not None and not (isinstance(value, tuple) and not value) for value in values), probability
        )


@pytest.mark.requirement("ART-09")
@pytest.mark.parametrize("draws", [NNUNET_DRAWS, ARTICLE_DRAWS], ids=["nnunet", "article"])
def test_each_allowed_axis_is_mirrored_half_the_time_and_no_other(draws: list[SampleDraw]) -> None:
    for axis in range(3):
        assert _near((axis in draw.mirrored_axes for draw in draws), 0.5)
    assert {axis for draw in _draws(_plan(NNUNET, mirror_axes=(1,)), 200) for axis in draw.mirrored_axes} == {1}


_RANGES: dict[str, Callable[[SampleDraw], Iterable[float]]] = {
    "rotation": lambda d: [math.degrees(angle) for angle in d.angles_rad or ()],
    "scaling": lambda d: d.scales or (),
    "noise": lambda d: () if d.noise_sigma is None else (d.noise_sigma,),
    "blur along axis 1": lambda d: [sigmas[1] for sigmas in d.blur_sigmas if sigmas is not None],
    "brightness": lambda d: d.brightness,
    "contrast": lambda d: d.contrast,
    "zoom": lambda d: [zoom for zoom in d.zooms if zoom is not None],
    "gamma": lambda d: (*d.gamma, *d.inverted_gamma),
}


@pytest.mark.requirement("ART-09")
@pytest.mark.parametrize(
    ("name", "nnunet", "article"),
    [
        ("rotation", (-30.0, 30.0), (-15.0, 15.0)),
        ("scaling", (0.7, 1.4), (0.9, 1.1)),
        ("noise", (0.0, 0.1), (0.01, 0.01)),
        # 1 mm is half a voxel along this axis.
        ("blur along axis 1", (0.5, 1.0), (0.5, 0.5)),
        ("brightness", (0.75, 1.25), (0.95, 1.05)),
        ("contrast", (0.75, 1.25), (0.9, 1.1)),
        ("zoom", (0.5, 1.0), None),
        ("gamma", (0.7, 1.5), (0.8, 1.2)),
    ],
)
def test_draws_fill_the_range_of_their_profile(
    name: str, nnunet: tuple[float, float], article: tuple[float, float] | None
) -> None:
    for draws, limits in ((NNUNET_DRAWS, nnunet), (ARTICLE_DRAWS, article)):
        values = np.array([value for draw in draws for value in _RANGES[name](draw)])
        if limits is None:
            assert values.size == 0
            continue
        low, high = limits
        reach = 0.02 * (high - low)
        assert low <= values.min() <= low + reach
        assert high - reach <= values.max() <= high


def test_factors_are_drawn_below_and_above_one_alike_often() -> None:
    gammas = [gamma for draw in NNUNET_DRAWS for gamma in draw.gamma]
    assert _near((gamma < 1 for gamma in gammas), 0.5)
    above = [gamma for gamma in gammas if gamma > 1]
    assert np.mean(above) == pytest.approx(1.25, abs=4 * 0.5 / math.sqrt(12 * len(above)))


def test_scaling_is_one_factor_in_nnunet_and_one_per_axis_in_the_article() -> None:
    assert all(len(set(draw.scales)) == 1 for draw in NNUNET_DRAWS if draw.scales)
    assert all(len(set(draw.scales)) == 3 for draw in ARTICLE_DRAWS if draw.scales)


def test_channels_are_blurred_and_coarsened_apart_from_each_other() -> None:
    assert _near((sigmas is not None for draw in NNUNET_DRAWS for sigmas in draw.blur_sigmas), 0.5)
    assert _near((zoom is not None for draw in NNUNET_DRAWS for zoom in draw.zooms), 0.5)
    assert all(draw.gamma[0] != draw.gamma[1] for draw in NNUNET_DRAWS if draw.gamma)


@pytest.mark.requirement("ART-09")
def test_control_points_are_30_mm_apart_and_move_by_less_than_they_could_fold() -> None:
    fields = [draw.control_points for draw in ARTICLE_DRAWS if draw.control_points is not None]
    # 39 mm, 110 mm and 19.5 mm of patch: 1, 3 and 0 whole steps of 30 mm, and four points for the last one.
    assert {field.shape for field in fields} == {(3, 5, 7, 4)}
    in_mm = np.stack(fields) * np.array((1.0, 2.0, 0.5))[:, None, None, None]
    sigmas = in_mm.std(axis=(1, 2, 3, 4))
    assert sigmas.max() == pytest.approx(3.0, rel=0.1)
    assert sigmas.min() < 0.2
    assert sigmas.mean() == pytest.approx(1.5, rel=0.1)


@pytest.mark.requirement("ART-09")
@pytest.mark.parametrize(
    ("patch", "degrees", "expected"),
    [
        ((128, 128, 128), 30.0, (205, 205, 205)),
        ((40, 56, 40), 30.0, (73, 80, 64)),
        ((512, 512), 180.0, (602, 602)),
        ((56, 40), 180.0, (65, 65)),
        ((320, 200), 15.0, (424, 235)),
    ],
)
def test_the_initial_patch_is_that_of_nnunet(patch: tuple[int, ...], degrees: float, expected: tuple[int, ...]) -> None:
    assert rotation_limit_degrees(patch) == degrees
    assert initial_patch_size(patch, degrees) == expected
    assert _plan(NNUNET, patch).initial_patch_size == expected


def test_a_flat_patch_is_turned_in_its_plane_only() -> None:
    plan = _plan(NNUNET, (20, 320, 256))
    assert plan.is_dummy_2d
    assert plan.initial_patch_size == (20, 376, 376)
    turned = [draw for draw in _draws(plan, 200) if draw.angles_rad is not None]
    assert {len(draw.angles_rad or ()) for draw in turned} == {1}
    assert max(abs(draw.angles_rad[0]) for draw in turned if draw.angles_rad) > math.radians(100)
    assert {len(draw.scales) for draw in _draws(plan, 200) if draw.scales} == {2}


def test_previous_stage_labels_are_spoilt_as_often_as_in_nnunet() -> None:
    draws = [draw.previous_stage for draw in _draws(_plan(NNUNET, previous_labels=(1, 2, 3)))]
    # At least one of three labels, each with one half: 7 in 8.
    assert _near((draw.morphology for draw in draws), 0.4 * 7 / 8)
    assert _near((draw.removals for draw in draws), 0.2 * 7 / 8)
    changes = [change for draw in draws for change in draw.morphology]
    assert {label for label, _, _ in changes} == {0, 1, 2}
    for operator in ("dilate", "erode", "close", "open"):
        assert _near((change[1] == operator for change in changes), 0.25)
    radii = [radius for _, _, radius in changes]
    assert 1.0 <= min(radii) < 1.1
    assert 7.9 < max(radii) <= 8.0
    assert not NNUNET_DRAWS[0].previous_stage.morphology


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mirror_axes": (0, 3)}, "axes 0 to 2"),
        ({"paired_labels": ((1, 2),)}, "lateral axis"),
        ({"spacing_mm": (1.0, 1.0)}, "2 or 3 entries"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan(NNUNET, **more)
