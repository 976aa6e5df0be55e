"""engine.sanity_phantom: the same image everywhere, placed in the patient and not in the array."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.sanity_cases import image_digest
from engine.sanity_phantom import Phantom, make_phantom

PHANTOM = Phantom(
    seed=3,
    shape=(9, 14, 12),
    spacing_mm=(3.0, 1.0, 0.75),
    orientation="LPS",
    stored_orientation="LPS",
    oblique=False,
    ranges=((-50.0, 200.0), (0.0, 1000.0)),
)

GOLDEN = "f06c1e5299c20ecef16fde49dae9637e183f4bee92e0ba3ad72a0a7c83eea08e"
"""Bundles hold seeds: another value here makes their sanity cases unreadable."""


def test_the_voxels_of_a_seed_never_change() -> None:
    assert image_digest(make_phantom(PHANTOM)) == GOLDEN
    assert image_digest(make_phantom(replace(PHANTOM, seed=4))) != GOLDEN


def test_it_has_the_shape_spacing_and_range_that_were_asked_for_and_no_zero_is_cut_off() -> None:
    volume = make_phantom(PHANTOM)
    assert volume.array.shape == (2, 9, 14, 12)
    assert volume.geometry.spacing_mm == pytest.approx(PHANTOM.spacing_mm)
    assert volume.geometry.orientation == "LPS"
    for channel, (low, high) in zip(volume.array, PHANTOM.ranges, strict=True):
        assert low <= channel.min() < channel.max() <= high
        assert channel.std() > 0.05 * (high - low)
    assert volume.array[1].min() > 0


@pytest.mark.parametrize("code", ["RAS", "ILA", "SPR"])
@pytest.mark.parametrize("oblique", [False, True])
def test_another_voxel_order_holds_the_same_voxels_at_the_same_places(code: str, oblique: bool) -> None:
    upright = make_phantom(replace(PHANTOM, oblique=oblique))
    turned = make_phantom(replace(PHANTOM, oblique=oblique, stored_orientation=code))
    assert turned.geometry.orientation == code
    back, _ = turned.reoriented("LPS")
    assert np.array_equal(back.array, upright.array)
    assert back.geometry.same_grid(upright.geometry, tolerance_mm=1e-9)


def test_an_oblique_grid_is_tilted_and_keeps_its_spacing() -> None:
    geometry = make_phantom(replace(PHANTOM, oblique=True)).geometry
    assert geometry.spacing_mm == pytest.approx(PHANTOM.spacing_mm)
    assert np.degrees(np.arccos(geometry.direction[2, 2])) == pytest.approx(16.26, abs=0.01)


@pytest.mark.parametrize(
    "change", [{"shape": (2000, 2, 2)}, {"shape": (1000, 1000, 1000)}, {"stored_orientation": "LRS"}]
)
def test_what_cannot_be_made_is_a_value_error(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"phantom|orientation"):
        make_phantom(replace(PHANTOM, **change))  # type: ignore[arg-type]
