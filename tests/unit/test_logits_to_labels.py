from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.transform import resize

from engine.errors import BundleInvalid
from engine.labels import LabelManager
from engine.logit_source import NetworkLogits
from engine.logits_to_labels import check_rule, segment, winning_labels
from engine.plans import ResamplingKwargs
from tests.unit.test_resampling import noise, rule

PLAIN = LabelManager.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2, "c": 3}})
REGIONS = LabelManager.from_dataset_json(
    {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
)


def logits(shape: tuple[int, int, int], heads: int = 4, *, seed: int = 3) -> NDArray[np.float16]:
    return (np.random.default_rng(seed).normal(size=(heads, *shape)) * 3).astype(np.float16)


def resized(array: NDArray[np.float16], shape: tuple[int, ...]) -> NDArray[np.float16]:
    """What nnU-Net computes: each head in float64, stored in half precision."""
    return np.stack(
        [resize(head.astype(np.float64), shape, 1, mode="edge", anti_aliasing=False) for head in array]
    ).astype(np.float16)


def network(array: NDArray[np.float16], spacing: tuple[float, float, float], how: ResamplingKwargs) -> NetworkLogits:
    return NetworkLogits(logits=array, spacing_mm=spacing, rule=how)


def softmax(array: NDArray[np.float16]) -> NDArray[np.float32]:
    raised = np.exp(array.astype(np.float32) - array.astype(np.float32).max(axis=0))
    result: NDArray[np.float32] = raised / raised.sum(axis=0)
    return result


@pytest.mark.parametrize("shape", [(30, 33, 41), (7, 50, 12), (20, 21, 22)])
def test_labels_equal_those_of_resizing_everything_and_taking_the_maximum(shape: tuple[int, int, int]) -> None:
    source = logits((20, 21, 22))
    result = segment([network(source, (2, 2, 2), rule(1))], shape, (1.5, 1.5, 1.5), PLAIN)
    expected = resized(source, shape) if shape != (20, 21, 22) else source
    np.testing.assert_array_equal(result.labels, expected.argmax(axis=0))
    assert result.labels.dtype == np.uint8


@pytest.mark.parametrize("shape", [(9, 70, 12), (6, 70, 13), (9, 70, 13), (9, 71, 12)])
def test_an_axis_that_keeps_its_size_is_left_alone_in_every_slab(shape: tuple[int, int, int]) -> None:
    source = logits((6, 70, 12))
    result = segment([network(source, (2, 2, 2), rule(1))], shape, (1.5, 1.9, 1.9), PLAIN)
    np.testing.assert_array_equal(result.labels, resized(source, shape).argmax(axis=0))


def test_the_probability_is_that_of_the_winner_and_0_in_the_background() -> None:
    source = logits((6, 7, 8))
    result = segment([network(source, (2, 2, 2), rule(1))], (9, 10, 12), (1.4, 1.4, 1.4), PLAIN)
    expected = softmax(resized(source, (9, 10, 12)))
    expected = np.where(expected.argmax(axis=0) == 0, 0, expected.max(axis=0))
    assert result.probabilities.shape == (1, 9, 10, 12)
    np.testing.assert_allclose(result.probabilities[0], expected, atol=1e-3)


@pytest.mark.parametrize("apart", [0, 1, 2])
def test_along_a_coarse_axis_the_nearest_plane_is_taken(apart: int) -> None:
    shape, new, spacing = [12, 12, 12], [15, 15, 15], [1.3, 1.3, 1.3]
    shape[apart], new[apart], spacing[apart] = 5, 12, 8.0
    source = logits((shape[0], shape[1], shape[2]))
    result = segment(
        [network(source, (spacing[0], spacing[1], spacing[2]), rule(1))], (new[0], new[1], new[2]), (1, 1, 1), PLAIN
    )
    nearest = [int(np.floor((i + 0.5) * 5 / 12)) for i in range(12)]
    flat = tuple(size for axis, size in enumerate(new) if axis != apart)
    planes = [resized(np.take(source, index, axis=1 + apart), flat) for index in nearest]
    np.testing.assert_array_equal(result.labels, np.stack(planes, axis=1 + apart).argmax(axis=0))


def test_rows_in_several_slabs_give_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    source = logits((6, 11, 8))
    whole = segment([network(source, (2, 2, 2), rule(1))], (9, 17, 12), (1.4, 1.4, 1.4), PLAIN)
    monkeypatch.setattr("engine.logits_to_labels._ROWS", 3)
    slabs = segment([network(source, (2, 2, 2), rule(1))], (9, 17, 12), (1.4, 1.4, 1.4), PLAIN)
    np.testing.assert_array_equal(whole.labels, slabs.labels)
    np.testing.assert_array_equal(whole.probabilities, slabs.probabilities)


def test_regions_are_thresholded_and_later_ones_overwrite() -> None:
    source = logits((6, 7, 8), heads=2)
    result = segment([network(source, (2, 2, 2), rule(1))], (9, 10, 12), (1.4, 1.4, 1.4), REGIONS)
    whole, core = resized(source, (9, 10, 12))
    np.testing.assert_array_equal(result.labels, np.where(core > 0, 2, np.where(whole > 0, 1, 0)))
    np.testing.assert_allclose(result.probabilities[1], 1 / (1 + np.exp(-core.astype(np.float32))), atol=1e-3)


def test_an_ensemble_is_the_mean_of_probabilities_from_grids_of_their_own() -> None:
    fine, coarse = logits((12, 12, 12)), logits((6, 7, 8), seed=4)
    shape = (12, 12, 12)
    result = segment([network(fine, (1, 1, 1), rule(1)), network(coarse, (2, 2, 2), rule(1))], shape, (1, 1, 1), PLAIN)
    mean = (softmax(fine) + softmax(resized(coarse, shape))) / 2
    np.testing.assert_array_equal(result.labels, mean.argmax(axis=0))
    foreground = result.labels > 0
    np.testing.assert_allclose(result.probabilities[0][foreground], mean.max(axis=0)[foreground], atol=1e-3)


def test_an_ensemble_of_regions_is_thresholded_at_a_half() -> None:
    first, second = logits((5, 5, 5), heads=2), logits((5, 5, 5), heads=2, seed=9)
    result = segment(
        [network(first, (1, 1, 1), rule(1)), network(second, (1, 1, 1), rule(1))], (5, 5, 5), (1, 1, 1), REGIONS
    )
    whole, core = (1 / (1 + np.exp(-first.astype(float))) + 1 / (1 + np.exp(-second.astype(float)))) / 2
    np.testing.assert_array_equal(result.labels, np.where(core > 0.5, 2, np.where(whole > 0.5, 1, 0)))


def test_the_torch_rule_compares_without_rounding_to_half_precision() -> None:
    # A quarter of the way head 0 has lost less than half precision can tell.
    source = np.ones((2, 1, 1, 2), dtype=np.float16)
    source[0, 0, 0, 1] = np.nextafter(np.float16(1.0), np.float16(0))
    two = LabelManager.from_dataset_json({"labels": {"background": 0, "a": 1}})
    halved = segment([network(source, (1, 1, 1), rule(1))], (1, 1, 4), (1, 1, 0.5), two).labels
    exact = segment([network(source, (1, 1, 1), rule(1, function="torch"))], (1, 1, 4), (1, 1, 0.5), two).labels
    assert halved.ravel().tolist() == [0, 0, 1, 1]
    assert exact.ravel().tolist() == [0, 1, 1, 1]


def test_the_lowest_head_wins_a_tie() -> None:
    same = np.ones((4, 2, 2, 2), dtype=np.float32)
    same[0] = 0
    np.testing.assert_array_equal(winning_labels(same, PLAIN), 1)
    np.testing.assert_array_equal(winning_labels(noise(4, 3, 3, 3), PLAIN), noise(4, 3, 3, 3).argmax(axis=0))


def test_a_rule_that_nnunet_never_writes_is_refused() -> None:
    check_rule(rule(1))
    check_rule(rule(1, order_z=1))
    with pytest.raises(BundleInvalid, match="order 3"):
        check_rule(rule(3))
