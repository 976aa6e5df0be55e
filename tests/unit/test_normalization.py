from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InputRejected
from engine.normalization import normalize
from engine.plans import IntensityProperties

CT = IntensityProperties(mean=50.0, std=20.0, percentile_00_5=-100.0, percentile_99_5=200.0)


def channel(*values: float) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    return np.array(values, dtype=np.float32).reshape(1, 1, -1)


def test_zscore_uses_the_population_deviation_of_the_whole_image() -> None:
    array = channel(0, 2, 4, 6)
    normalize(array, "zscore")
    np.testing.assert_allclose(array.ravel(), np.array([-3, -1, 1, 3]) / np.sqrt(5), rtol=1e-6)


def test_masked_zscore_takes_statistics_inside_and_leaves_the_outside_alone() -> None:
    array = channel(0, 0, 10, 20, 30)
    normalize(array, "zscore", inside=array > 0)
    np.testing.assert_allclose(array.ravel(), [0, 0, -np.sqrt(1.5), 0, np.sqrt(1.5)], atol=1e-6)


def test_a_constant_image_does_not_divide_by_zero() -> None:
    array = channel(5, 5, 5)
    normalize(array, "zscore")
    assert array.ravel().tolist() == [0, 0, 0]


def test_ct_clips_before_it_scales_and_ignores_the_mask() -> None:
    array = channel(-1000, 50, 90, 3000)
    normalize(array, "ct", inside=array > 0, properties=CT)
    np.testing.assert_allclose(array.ravel(), [-7.5, 0, 2, 7.5])


def test_ct_without_properties_is_an_error() -> None:
    with pytest.raises(ValueError, match="intensity properties"):
        normalize(channel(1), "ct")


def test_rescale_uses_the_range_of_the_image() -> None:
    array = channel(-10, 0, 10)
    normalize(array, "rescale_to_0_1")
    np.testing.assert_allclose(array.ravel(), [0, 0.5, 1])


def test_rgb_refuses_what_is_not_8_bit() -> None:
    array = channel(0, 51, 255)
    normalize(array, "rgb_to_0_1")
    np.testing.assert_allclose(array.ravel(), [0, 0.2, 1])
    with pytest.raises(InputRejected, match="256"):
        normalize(channel(0, 256), "rgb_to_0_1")


def test_no_normalisation_changes_nothing() -> None:
    array = channel(-3, 7)
    normalize(array, "nonorm")
    assert array.ravel().tolist() == [-3, 7]
