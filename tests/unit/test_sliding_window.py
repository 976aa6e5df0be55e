from __future__ import annotations

import numpy as np
import pytest

from engine.sliding_window import gaussian_weights, mirror_combinations, window_positions


@pytest.mark.requirement("ART-14")
@pytest.mark.parametrize(
    ("size", "patch", "starts"),
    [
        (110, 64, (0, 23, 46)),
        (300, 128, (0, 57, 115, 172)),
        (129, 128, (0, 1)),
        (64, 64, (0,)),
        (96, 64, (0, 32)),
        (97, 64, (0, 16, 33)),
    ],
)
def test_windows_lie_where_nnunet_puts_them(size: int, patch: int, starts: tuple[int, ...]) -> None:
    assert window_positions(size, patch, 0.5) == starts


def test_an_axis_shorter_than_the_patch_must_be_padded_first() -> None:
    with pytest.raises(ValueError, match="pad first"):
        window_positions(10, 16, 0.5)


@pytest.mark.requirement("ART-14")
def test_weights_peak_at_10_fall_as_a_gaussian_of_an_eighth_and_never_vanish() -> None:
    weights = gaussian_weights((32, 64))
    assert weights.shape == (32, 64)
    assert weights.max() == weights[16, 32] == 10
    assert weights[16 + 4, 32] == pytest.approx(10 * np.exp(-0.5), rel=2e-3)  # one sigma = 32 / 8
    assert weights[16, 32 + 8] == pytest.approx(10 * np.exp(-0.5), rel=2e-3)  # one sigma = 64 / 8
    assert weights.min() > 0
    assert not weights.flags.writeable


def test_all_subsets_of_the_mirror_axes_are_used() -> None:
    assert mirror_combinations((0, 1, 2)) == ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))
    assert mirror_combinations((1,)) == ((1,),)
    assert mirror_combinations(()) == ()
