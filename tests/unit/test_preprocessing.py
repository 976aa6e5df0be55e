from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import InputRejected
from engine.plans import Plans, read_plans
from engine.preprocessing import crop_to_nonzero, network_shape, network_spacing_mm, preprocess
from engine.volume import Geometry, Volume
from tests.support.tiny_models import configuration_json, plans_json

GEOMETRY = Geometry(shape=(6, 8, 10), affine_lps=np.diag([0.5, 2.0, 3.0, 1.0]))  # spacing (3, 2, 0.5)


def plans(*, transpose: tuple[int, int, int] = (0, 1, 2), spacing: tuple[float, ...] = (3.0, 2.0, 0.5)) -> Plans:
    patch = (4,) * len(spacing)
    return read_plans(plans_json({"one": configuration_json(patch, spacing)}, transpose_forward=transpose))


def image(*, channels: int = 1) -> np.ndarray[tuple[int, int, int, int], np.dtype[np.float32]]:
    """Zero but for a box at z 1..4, y 2..7, x 3..9; the last channel is nonzero elsewhere too."""
    array = np.zeros((channels, 6, 8, 10), dtype=np.float32)
    array[0, 1:4, 2:7, 3:9] = np.arange(90).reshape(3, 5, 6) + 1
    return array


def test_the_crop_is_the_box_of_what_is_nonzero_in_any_channel() -> None:
    array = image(channels=2)
    array[1, 5, 3, 3] = -4.0
    cropped = crop_to_nonzero(Volume(array=array, geometry=GEOMETRY), plans())
    assert cropped.box == (slice(1, 6), slice(2, 7), slice(3, 9))
    assert cropped.shape == (5, 5, 6)
    assert cropped.full_shape == (6, 8, 10)
    assert cropped.spacing_mm == pytest.approx((3.0, 2.0, 0.5))


def test_the_crop_is_in_network_axes() -> None:
    cropped = crop_to_nonzero(Volume(array=image(), geometry=GEOMETRY), plans(transpose=(2, 0, 1)))
    assert cropped.full_shape == (10, 6, 8)
    assert cropped.box == (slice(3, 9), slice(1, 4), slice(2, 7))
    assert cropped.spacing_mm == pytest.approx((0.5, 3.0, 2.0))
    assert cropped.image[0, 5, 2, 4] == 90


def test_an_image_of_zeros_is_refused() -> None:
    with pytest.raises(InputRejected, match="every voxel of the image is 0"):
        crop_to_nonzero(Volume(array=np.zeros_like(image()), geometry=GEOMETRY), plans())


def test_the_source_is_not_changed_by_normalisation() -> None:
    document = plans_json({"one": configuration_json((4, 4, 4), (3.0, 2.0, 0.5), schemes=["ZScoreNormalization"])})
    array = image()
    before = array.copy()
    read = read_plans(document)
    cropped = crop_to_nonzero(Volume(array=array, geometry=GEOMETRY), read)
    result = preprocess(cropped, read, read.configurations["one"])
    np.testing.assert_array_equal(array, before)
    assert result.shape == (1, 3, 5, 6)
    assert result.mean() == pytest.approx(0, abs=1e-6)
    assert result.std() == pytest.approx(1, abs=1e-6)


def test_a_2d_network_keeps_the_spacing_of_its_slices() -> None:
    configuration = plans(spacing=(1.0, 1.0)).configurations["one"]
    assert network_spacing_mm((3.0, 2.0, 0.5), configuration) == (3.0, 1.0, 1.0)
    assert network_shape((6, 8, 10), (3.0, 2.0, 0.5), configuration) == (6, 16, 5)


def test_a_masked_zscore_fills_holes_before_it_decides_what_is_inside() -> None:
    read = plans()
    configuration = replace(read.configurations["one"], normalization_schemes=("zscore",), use_mask_for_norm=(True,))
    array = np.zeros((1, 6, 8, 10), dtype=np.float32)
    array[0, 1:6, 1:6, 1:6] = 10.0
    array[0, 3, 3, 3] = 0.0  # a hole: inside
    array[0, 1, 1, 1] = 0.0  # a corner: outside
    cropped = crop_to_nonzero(Volume(array=array, geometry=GEOMETRY), read)
    result = preprocess(cropped, read, configuration)
    values = np.full(124, 10.0)
    values[0] = 0.0
    assert result[0, 2, 2, 2] == pytest.approx(-values.mean() / values.std(), rel=1e-5)
    assert result[0, 0, 0, 0] == 0.0


def test_the_previous_stage_is_stacked_as_one_channel_per_label() -> None:
    read = plans(transpose=(1, 0, 2))
    cropped = crop_to_nonzero(Volume(array=image(), geometry=GEOMETRY), read)
    previous = np.zeros((8, 6, 10), dtype=np.uint8)
    previous[2, 1, 3] = 2  # the corner of the crop
    previous[6, 3, 8] = 1
    previous[0, 0, 0] = 1  # outside the crop
    # The plans' spacing is that of the axes before the transpose: same grid only along the last axis.
    configuration = replace(read.configurations["one"], spacing_mm=(2.0, 3.0, 0.5))
    result = preprocess(cropped, read, configuration, previous_labels=previous, previous_foreground=(1, 2))
    assert result.shape == (3, 5, 3, 6)
    assert np.argwhere(result[1]).tolist() == [[4, 2, 5]]
    assert np.argwhere(result[2]).tolist() == [[0, 0, 0]]


def test_another_number_of_channels_is_refused_with_both_numbers() -> None:
    cropped = crop_to_nonzero(Volume(array=image(channels=2), geometry=GEOMETRY), plans())
    with pytest.raises(InputRejected, match=r"2 channel\(s\), the model takes 1"):
        preprocess(cropped, plans(), plans().configurations["one"])
