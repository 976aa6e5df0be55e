"""engine.intensity_baseline: one histogram for a study, however it is stored, and a distance that is never infinite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.errors import BundleInvalid
from engine.intensity_baseline import (
    ALPHA,
    BINS,
    GRID,
    SHARES,
    ChannelBins,
    IntensityBaseline,
    StudySummary,
    baseline_text,
    choose_bins,
    kl_divergence,
    label_volumes_ml,
    make_baseline,
    pool,
    read_baseline,
    summarize_study,
)
from engine.volume import Geometry, LabelMap, Volume
from tests.support.invented_study import invented_study

MR = choose_bins(["T1"], ["zscore"], [(10.0, 500.0)])
CT = choose_bins(["CT"], ["ct"], [(-50.0, 200.0)])
REGIONS = [(1,), (2,)]


def _summary(study: tuple[Volume, LabelMap], bins: tuple[ChannelBins, ...] = MR, **options: Any) -> StudySummary:
    """On every voxel: an invented study has few."""
    return summarize_study(*study, bins, label_volumes_ml(study[1], REGIONS), **{"grid": (1, 1, 1), **options})


@pytest.mark.requirement("ART-20", open="the monitoring itself, its window and threshold")
@pytest.mark.parametrize("code", ["RAS", "PIR", "SLA", "ARI"])
def test_the_voxel_order_changes_nothing(code: str) -> None:
    volume, labels = invented_study()
    turned = (volume.reoriented(code)[0], labels.reoriented(code)[0])
    assert not np.array_equal(turned[0].array.ravel(), volume.array.ravel())
    for grid in ((1, 1, 1), (4, 2, 2), (2, 3, 5)):
        assert _summary(turned, grid=grid) == _summary((volume, labels), grid=grid)


def test_spacing_and_size_run_superior_posterior_left_and_leave_the_zeros_out() -> None:
    found = _summary(invented_study())
    assert found.spacing_mm == pytest.approx((2.0, 0.75, 0.5), rel=1e-5)
    assert found.size == (5, 6, 7)
    assert found.volumes_ml == pytest.approx((24 * 0.75e-3, 4 * 0.75e-3), rel=1e-5)


def test_a_histogram_is_what_counting_gives() -> None:
    volume, labels = invented_study()
    channel = _summary((volume, labels), CT).channels[0]
    inside = volume.array[0, 1:-1, 2:-1, 1:-3]
    for counts, edges, values in (
        (channel.whole, CT[0].whole_edges, inside.ravel()),
        (channel.foreground, CT[0].foreground_edges, volume.array[0][labels.array > 0]),
    ):
        assert counts is not None
        expected = np.histogram(values, [-math.inf, *edges, math.inf])[0] * SHARES / values.size
        assert np.abs(np.array(counts) - expected).max() <= 1
        assert sum(counts) == SHARES


def test_mr_has_no_unit_and_ct_has() -> None:
    assert (MR[0].scale, CT[0].scale) == ("percentile", "image")
    plain, brighter = invented_study(), invented_study(scale=4.0)
    assert _summary(plain).channels[0].whole == _summary(brighter).channels[0].whole
    assert _summary(brighter).channels[0].percentiles[1] == 4 * _summary(plain).channels[0].percentiles[1]
    assert _summary(plain, CT).channels[0].whole != _summary(brighter, CT).channels[0].whole


@pytest.mark.parametrize(
    ("name", "scheme", "scale", "whole"),
    [
        ("CT", "ct", "image", (-1024.0, 3071.0)),
        ("PET", "zscore", "image", (-55.0, 325.0)),
        ("anything", "nonorm", "image", (-55.0, 325.0)),
        ("R", "rgb_to_0_1", "image", (-55.0, 325.0)),
        ("FLAIR", "zscore", "percentile", (-0.1, 1.4)),
        ("T2", "rescale_to_0_1", "percentile", (-0.1, 1.4)),
    ],
)
def test_edges_follow_the_modality(name: str, scheme: Any, scale: str, whole: tuple[float, float]) -> None:
    chosen = choose_bins([name], [scheme], [(40.0, 230.0)])[0]
    assert chosen.scale == scale
    assert (chosen.whole_edges[0], chosen.whole_edges[-1]) == pytest.approx(whole)
    assert len(chosen.whole_edges) == len(chosen.foreground_edges) == BINS - 1


def test_a_channel_of_one_value_gets_edges_all_the_same() -> None:
    edges = choose_bins(["PET"], ["zscore"], [(3.0, 3.0)])[0].foreground_edges
    assert (edges[0], edges[-1]) == (2.5, 3.5)
    volume, labels = invented_study()
    flat = Volume(array=np.full_like(volume.array, 7.0), geometry=volume.geometry)
    assert sum(_summary((flat, labels)).channels[0].whole) == SHARES


def test_no_foreground_is_no_histogram_and_ignored_voxels_are_no_foreground() -> None:
    volume, labels = invented_study()
    nothing = LabelMap(array=np.zeros_like(labels.array), geometry=labels.geometry)
    assert _summary((volume, nothing)).channels[0].foreground is None
    assert _summary((volume, nothing)).volumes_ml == (0.0, 0.0)
    ignored = LabelMap(array=np.where(labels.array == 0, 3, labels.array), geometry=labels.geometry)
    assert _summary((volume, ignored), ignore_label=3) == _summary((volume, labels))


def test_what_does_not_fit_together_is_an_error() -> None:
    volume, labels = invented_study()
    with pytest.raises(ValueError, match="do not fit"):
        summarize_study(volume, labels, (*MR, *CT), (0.0, 0.0))


def test_the_divergence_is_0_for_equals_finite_for_strangers_and_the_textbooks_else() -> None:
    left, right = [0] * BINS, [0] * BINS
    left[0] = right[-1] = SHARES
    assert kl_divergence(left, left) == 0.0
    total = SHARES + ALPHA * BINS
    p, q = (SHARES + ALPHA) / total, ALPHA / total
    assert kl_divergence(left, right) == pytest.approx(p * math.log(p / q) + q * math.log(q / p))
    with pytest.raises(ValueError, match="bins"):
        kl_divergence(left, left[:-1])


def test_a_changed_contrast_is_further_from_the_pool_than_the_studies_themselves() -> None:
    studies = [_summary(invented_study(seed)) for seed in range(12)]
    baseline = make_baseline(MR, ["first", "second"], studies)
    own = [kl_divergence(study.channels[0].whole, baseline.pooled[0].whole) for study in studies]
    volume, labels = invented_study(99)
    darker = Volume(array=((volume.array / 1000) ** 2 * 1000).astype(np.float32), geometry=volume.geometry)
    assert kl_divergence(_summary((darker, labels)).channels[0].whole, baseline.pooled[0].whole) > max(own)


def test_the_pool_weighs_studies_alike() -> None:
    assert pool([[SHARES, 0], [0, SHARES], [0, SHARES]]) == (3333.3333, 6666.6667)


@pytest.fixture(scope="module")
def baseline() -> IntensityBaseline:
    return make_baseline((*MR, *CT), ["first", "second"], [_two_channels(seed) for seed in range(3)])


def _two_channels(seed: int) -> StudySummary:
    volume, labels = invented_study(seed)
    both = Volume(array=np.concatenate([volume.array, volume.array - 500]), geometry=volume.geometry)
    if seed == 1:
        labels = LabelMap(array=np.zeros_like(labels.array), geometry=labels.geometry)
    return _summary((both, labels), (*MR, *CT))


def test_what_is_written_is_what_is_read(baseline: IntensityBaseline) -> None:
    assert read_baseline(json.loads(baseline_text(baseline)), error=BundleInvalid) == baseline


def test_a_baseline_of_format_1_is_of_every_voxel_and_knows_no_noise(baseline: IntensityBaseline) -> None:
    document = json.loads(baseline_text(baseline))
    document["format"] = 1
    del document["grid"]
    for study in document["studies"]:
        del study["foreground_share"]
        for channel in study["channels"]:
            del channel["noise"]
    found = read_baseline(document, error=BundleInvalid)
    assert found.grid == (1, 1, 1)
    assert (found.studies[0].foreground_share, found.studies[0].channels[0].noise) == (None, None)
    assert found.pooled == baseline.pooled
    assert json.loads(baseline_text(found)) == document


def test_the_grid_takes_a_sixteenth_of_the_voxels_and_says_the_same_of_a_large_study() -> None:
    """Smooth shapes with noise: what is usual for a study of thousands of voxels."""
    study = _large(sigma=10.0)
    whole, thin = _summary(study, CT), _summary(study, CT, grid=GRID)
    assert thin.size == (10, 24, 32)
    assert (whole.size, whole.volumes_ml) == ((40, 48, 64), thin.volumes_ml)
    assert kl_divergence(thin.channels[0].whole, whole.channels[0].whole) < 0.01
    assert thin.foreground_share == pytest.approx(whole.foreground_share, rel=0.1)


@pytest.mark.parametrize("sigma", [5.0, 20.0])
def test_the_noise_is_that_of_the_image_whatever_its_gain(sigma: float) -> None:
    for gain in (1.0, 7.0):
        found = _summary(_large(sigma=sigma, gain=gain), grid=GRID).channels[0]
        low, _, high = found.percentiles
        assert found.noise == pytest.approx(gain * sigma / (high - low), rel=0.1)
    flat = _large(sigma=sigma)[0]
    thin = Volume(array=flat.array[:, :2], geometry=replace(flat.geometry, shape=(2, 48, 64)))
    labels = LabelMap(array=np.zeros((2, 48, 64), dtype=np.uint8), geometry=thin.geometry)
    assert _summary((thin, labels)).channels[0].noise is None


def _large(*, sigma: float, gain: float = 1.0) -> tuple[Volume, LabelMap]:
    z, y, x = np.mgrid[:40, :48, :64]
    inside = (z - 20) ** 2 / 200 + (y - 24) ** 2 / 250 + (x - 32) ** 2 / 500 < 1
    noise = np.random.default_rng(1).normal(0, sigma, inside.shape)
    array = ((200 + 150 * inside + 40 * np.sin(z / 9) + noise) * gain).astype(np.float32)[None]
    geometry = Geometry(shape=(40, 48, 64), affine_lps=np.diag([1.0, 1.0, 2.0, 1.0]))
    return Volume(array=array, geometry=geometry), LabelMap(array=inside.astype(np.uint8), geometry=geometry)


def test_very_many_studies_are_pooled_and_an_even_choice_is_kept() -> None:
    studies = [_summary(invented_study())] * 2500
    found = make_baseline(MR, ["first", "second"], studies)
    assert (found.cases, len(found.studies)) == (2500, 1000)
    assert len(baseline_text(found)) < 1_000_000


def _at(*path: str | int, value: object) -> Callable[[Any], None]:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_at("format", value=3), "format"),
        (_at("grid", value=[4, 2]), "grid"),
        (_at("grid", 0, value=0), "grid"),
        (_at("studies", 0, "foreground_share", value=2.0), "foreground_share"),
        (_at("studies", 0, "channels", 0, "noise", value=-1.0), "noise"),
        (_at("alpha", value=0), "alpha"),
        (_at("channels", 0, "scale", value="raw"), "scale"),
        (_at("channels", 0, "whole_edges", value=[0.0] * (BINS - 1)), "must ascend"),
        (_at("channels", 0, "whole_edges", value=[0.0]), "whole_edges"),
        (_at("studies", 0, "channels", 0, "whole", 0, value=-1), "whole"),
        (_at("studies", 0, "channels", 0, "whole", value=[SHARES] * BINS), "adds up"),
        (_at("studies", 0, "channels", value=[]), "channels"),
        (_at("studies", 0, "volumes_ml", value=[1.0]), "volumes_ml"),
        (_at("studies", 0, "spacing_mm", value=[0, 1, 1]), "spacing_mm"),
        (_at("studies", value=[]), "studies"),
        (_at("pooled", 0, "whole", 0, value=1e9), "whole"),
        (_at("pooled", 0, "whole", value=[0.0] * BINS), "adds up"),
        (_at("cases", value=1), "cases"),
        (_at("labels", value=[]), "labels"),
    ],
)
def test_a_value_of_wrong_type_or_range_is_refused_with_its_key(
    baseline: IntensityBaseline, edit: Callable[[Any], None], named: str
) -> None:
    document = json.loads(baseline_text(baseline))
    edit(document)
    with pytest.raises(BundleInvalid, match=named):
        read_baseline(document, error=BundleInvalid)
