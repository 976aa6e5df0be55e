from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from scipy import ndimage
from skimage.transform import resize

from engine.plans import ResamplingKwargs
from engine.resampling import linear_axis, resample_image, resample_labels, resampled_shape, separate_axis


def rule(
    order: int,
    *,
    is_seg: bool = False,
    order_z: int = 0,
    separate: bool | None = None,
    function: Literal["default", "torch", "none"] = "default",
) -> ResamplingKwargs:
    return ResamplingKwargs(function=function, order=order, order_z=order_z, force_separate_z=separate, is_seg=is_seg)


def noise(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("spacing", "new", "forced", "axis"),
    [
        ((5, 1, 1), (1, 1, 1), None, 0),
        ((1, 1, 5), (1, 1, 1), None, 2),
        ((3, 1, 1), (1, 1, 1), None, None),  # not more than 3
        ((3.0000001, 1, 1), (1, 1, 1), None, None),  # 3 with the noise of an affine
        ((1, 1, 1), (1, 6, 1), None, 1),  # the new spacing decides when the current one does not
        ((5, 1, 1), (1, 1, 6), None, 0),  # the current one goes first
        ((5, 5, 1), (1, 1, 1), None, None),  # a tie
        ((5, 4.9999999, 1), (1, 1, 1), None, None),  # a tie with the noise of an affine
        ((5, 1, 1), (1, 1, 1), False, None),
        ((2, 1, 1), (1, 1, 1), True, 0),
        ((1, 1, 1), (1, 1, 1), True, None),
    ],
)
def test_which_axis_is_resampled_apart(
    spacing: tuple[float, ...], new: tuple[float, ...], forced: bool | None, axis: int | None
) -> None:
    assert separate_axis(spacing, new, forced) == axis


def test_new_shape_rounds_halves_to_even_even_with_a_noisy_spacing() -> None:
    assert resampled_shape((35, 33, 20), (1, 1, 1), (2, 2, 2)) == (18, 16, 10)
    assert resampled_shape((35, 33, 20), (1 - 1e-8, 1 + 1e-8, 1), (2, 2, 2)) == (18, 16, 10)
    assert resampled_shape((1, 10, 10), (1, 1, 1), (5, 1, 1)) == (1, 10, 10)


@pytest.mark.parametrize("new_shape", [(27, 41, 18), (13, 30, 40)])
@pytest.mark.parametrize("order", [1, 3])
def test_an_image_is_resized_as_scikit_image_does(order: int, new_shape: tuple[int, int, int]) -> None:
    image = noise(2, 20, 30, 25)
    result = resample_image(image, new_shape, (2, 2, 2), (1.5, 1.5, 2.8), rule(order))
    expected = np.stack([resize(c, new_shape, order, mode="edge", anti_aliasing=False) for c in image])
    np.testing.assert_allclose(result, expected, atol=1e-6 if order == 3 else 2e-6)
    assert result.dtype == np.float32


def test_a_cubic_does_not_leave_the_range_of_the_image() -> None:
    image = np.zeros((1, 8, 8, 8), dtype=np.float32)
    image[:, 4:] = 100.0
    raw = ndimage.zoom(image[0], 2.5, order=3, mode="nearest", grid_mode=True)
    assert raw.max() > 101  # the cubic overshoots here
    result = resample_image(image, (20, 20, 20), (1, 1, 1), (0.4, 0.4, 0.4), rule(3))
    assert result.min() == 0
    assert result.max() == 100


@pytest.mark.parametrize("apart", [0, 1, 2])
def test_a_coarse_axis_repeats_slices_and_planes_are_cubic(apart: int) -> None:
    shape, new_shape, spacing = [20, 20, 20], [26, 26, 26], [1.3, 1.3, 1.3]
    shape[apart], new_shape[apart], spacing[apart] = 6, 15, 6.0
    image = noise(1, *shape)
    z, y, x = new_shape
    result = resample_image(image, (z, y, x), spacing, (1, 1, 1), rule(3))
    planes = [
        resize(np.take(image[0], index, apart), [n for i, n in enumerate(new_shape) if i != apart], 3, mode="edge",
               anti_aliasing=False)
        for index in range(6)
    ]  # fmt: skip
    nearest = [int(np.floor((i + 0.5) * 6 / 15)) for i in range(15)]
    expected = np.stack([planes[index] for index in nearest], axis=apart)
    np.testing.assert_array_equal(result[0], expected)


def test_order_z_1_interpolates_between_slices() -> None:
    image = np.repeat(np.arange(4, dtype=np.float32), 9).reshape(1, 4, 3, 3)
    result = resample_image(image, (8, 3, 3), (8, 1, 1), (4, 1, 1), rule(3, order_z=1))
    np.testing.assert_allclose(result[0, :, 1, 1], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)


def test_equal_shapes_are_returned_untouched() -> None:
    image = noise(1, 4, 5, 6)
    assert resample_image(image, (4, 5, 6), (1, 1, 1), (1.01, 1, 1), rule(3)) is image
    assert resample_image(image, (8, 5, 6), (1, 1, 1), (0.5, 1, 1), rule(3, function="none")) is image


def test_the_torch_rule_is_trilinear() -> None:
    image = noise(1, 10, 12, 14)
    result = resample_image(image, (15, 12, 21), (1, 1, 1), (0.7, 1, 0.7), rule(1, function="torch"))
    expected = resize(image[0], (15, 12, 21), 1, mode="edge", anti_aliasing=False)
    np.testing.assert_allclose(result[0], expected, atol=2e-6)


def test_the_torch_rule_takes_the_nearest_slice_along_a_coarse_axis() -> None:
    image = np.repeat(np.arange(3, dtype=np.float32), 4).reshape(1, 3, 2, 2)
    result = resample_image(image, (6, 2, 2), (10, 1, 1), (5, 1, 1), rule(1, function="torch"))
    assert result[0, :, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def reference_labels(labels: np.ndarray[Any, Any], new_shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Voxel by voxel the greatest share; among ties the nearest voxel's label if it is one of them, else the first."""
    values = np.unique(labels)
    options = {"mode": "edge", "clip": True, "anti_aliasing": False}
    shares = np.stack([resize((labels == value).astype(float), new_shape, 1, **options) for value in values])
    nearest = resize(labels.astype(float), new_shape, 0, **options)
    result = np.empty(new_shape, dtype=labels.dtype)
    for place in np.ndindex(*new_shape):
        of_place = shares[(slice(None), *place)]
        tied = values[of_place == of_place.max()]
        result[place] = nearest[place] if nearest[place] in tied else tied[0]
    return result


def test_labels_are_resampled_mask_by_mask_with_minus_one() -> None:
    labels = np.random.default_rng(2).integers(-1, 4, size=(9, 10, 11)).astype(np.int32)
    result = resample_labels(labels, (14, 10, 17), (2, 2, 2), (1.3, 2, 1.3), rule(1, is_seg=True))
    np.testing.assert_array_equal(result, reference_labels(labels, (14, 10, 17)))
    assert {-1, 0, 1, 2, 3} <= set(np.unique(result))


@pytest.mark.parametrize(
    ("shape", "new_shape"),
    [((5, 5, 3), (9, 15, 9)), ((11, 3, 7), (7, 17, 11)), ((1, 4, 7), (14, 14, 11)), ((5, 2, 13), (3, 19, 19))],
)
def test_near_ties_between_labels_are_decided_as_scipy_rounds(
    shape: tuple[int, int, int], new_shape: tuple[int, int, int]
) -> None:
    """Shares such as 0.4999 (15 nines) and 0.5, at the edges too."""
    for seed in range(10):
        labels = np.random.default_rng(seed).integers(-1, 6, size=shape).astype(np.int8)
        result = resample_labels(labels, new_shape, (1, 1, 1), (1, 1, 1), rule(1, is_seg=True))
        np.testing.assert_array_equal(result, reference_labels(labels, new_shape), err_msg=f"seed {seed}")


def test_labels_that_tie_go_to_the_nearest_voxel() -> None:
    """Half the resolution: every new voxel lies exactly between two old ones."""
    labels = np.random.default_rng(4).integers(0, 4, size=(8, 10, 12)).astype(np.int32)
    result = resample_labels(labels, (4, 10, 6), (1, 2, 1), (2, 2, 2), rule(1, is_seg=True))
    np.testing.assert_array_equal(result, reference_labels(labels, (4, 10, 6)))
    pair = np.array([[[3, 1, 0, 2]]], dtype=np.int32)
    assert resample_labels(pair, (1, 1, 2), (1, 1, 1), (1, 1, 2), rule(1, is_seg=True)).tolist() == [[[1, 2]]]


def test_labels_with_a_coarse_axis_are_resampled_plane_by_plane() -> None:
    labels = np.random.default_rng(2).integers(0, 3, size=(4, 10, 11)).astype(np.int32)
    result = resample_labels(labels, (8, 15, 17), (8, 1.5, 1.5), (4, 1, 1), rule(1, is_seg=True))
    planes = np.stack([reference_labels(plane, (15, 17)) for plane in labels])
    np.testing.assert_array_equal(result, planes[[0, 0, 1, 1, 2, 2, 3, 3]])


def test_the_torch_rule_for_labels_takes_the_largest_mask() -> None:
    labels = np.array([1, 1, 2, 3], dtype=np.int32).reshape(1, 1, 4)
    result = resample_labels(labels, (1, 1, 8), (1, 1, 1), (1, 1, 0.5), rule(1, is_seg=True, function="torch"))
    assert result.ravel().tolist() == [1, 1, 1, 1, 2, 2, 3, 3]


def test_half_pixel_centres_and_their_nearest_index() -> None:
    axis = linear_axis(4, 6)
    values = np.arange(4.0)
    sampled = values[axis.low] * (1 - axis.weight) + values[axis.high] * axis.weight
    np.testing.assert_allclose(sampled, np.clip((np.arange(6) + 0.5) * 4 / 6 - 0.5, 0, 3), atol=1e-6)
    np.testing.assert_allclose(values.astype(np.float32) @ axis.matrix(4), sampled, atol=1e-6)
    assert linear_axis(3, 2, nearest=True).low.tolist() == [0, 2]
