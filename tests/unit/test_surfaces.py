"""engine.surfaces: closed-form phantoms, and the same numbers as google-deepmind's surface-distance."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import ndimage

from engine.surfaces import BoolArray, SurfaceRuler
from tests.support.peers import require_peer

SPACING_MM = (3.0, 0.7, 1.3)


def _box(shape: tuple[int, int, int], low: tuple[int, int, int], high: tuple[int, int, int]) -> BoolArray:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def _blobs(shape: tuple[int, int, int], seed: int) -> tuple[BoolArray, BoolArray]:
    """Two irregular masks that agree for the most part."""
    rng = np.random.default_rng(seed)
    sigma = tuple(0 if size == 1 else 3 for size in shape)
    first, second = (ndimage.gaussian_filter(rng.normal(size=shape), sigma) for _ in range(2))
    return first > first.std(), first + 0.4 * second > 1.1 * first.std()


@pytest.mark.requirement("ART-10")
@pytest.mark.parametrize(("axis", "distance_mm"), [(0, 6.0), (1, 1.4), (2, 2.6)])
def test_a_shifted_box_is_as_far_as_it_was_shifted(axis: int, distance_mm: float) -> None:
    reference = _box((20, 40, 40), (4, 10, 10), (14, 30, 30))
    moved = np.roll(reference, 2, axis)
    distances = SurfaceRuler(reference.shape, SPACING_MM).measure(reference, moved)
    # Both faces across the axis have moved by two voxels, and each has more than 5 % of the area.
    assert distances.hd95_mm() == pytest.approx(distance_mm, abs=1e-12)
    assert distances.surface_dice(distance_mm) == 1.0
    assert distances.surface_dice(distance_mm - 1e-9) < 1.0


@pytest.mark.requirement("ART-10")
def test_surface_dice_is_the_share_of_area_within_the_tolerance() -> None:
    """Each voxel has four corners at either end; those in the gap are 3 mm apart, the outer ones 6 mm."""
    reference = _box((6, 5, 5), (1, 2, 2), (2, 3, 3))
    distances = SurfaceRuler(reference.shape, SPACING_MM).measure(reference, np.roll(reference, 2, 0))
    assert [distances.surface_dice(mm) for mm in (2.9, 3.0, 6.0)] == pytest.approx([0.0, 0.5, 1.0])
    assert distances.hd95_mm() == 6.0


def test_the_area_of_a_box_is_that_of_its_faces_edges_and_corners() -> None:
    """Edges and corners are cut off: a strip half a voxel wide on both faces of an edge becomes one plane."""
    box = _box((9, 12, 10), (1, 2, 3), (7, 9, 8))
    n, mm = np.array((6, 7, 5)), np.array(SPACING_MM)
    area = 0.0
    for axis in range(3):
        u, v = (other for other in range(3) if other != axis)
        area += 2 * (n[u] - 1) * (n[v] - 1) * mm[u] * mm[v]
        area += 4 * (n[axis] - 1) * mm[axis] * 0.5 * np.hypot(mm[u], mm[v])
    area += 8 / 8 * math.hypot(mm[1] * mm[2], mm[0] * mm[2], mm[0] * mm[1])
    distances = SurfaceRuler(box.shape, SPACING_MM).measure(box, box)
    assert distances.reference_area.sum() == pytest.approx(area, rel=1e-12)
    assert distances.hd95_mm() == 0.0


@pytest.mark.requirement("ART-10")
def test_concentric_balls_are_apart_by_the_difference_of_their_radii() -> None:
    shape, mm = (33, 81, 65), (2.5, 1.0, 1.25)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    radius = np.sqrt(((z - 16) * mm[0]) ** 2 + ((y - 40) * mm[1]) ** 2 + ((x - 32) * mm[2]) ** 2)
    distances = SurfaceRuler(shape, mm).measure(radius <= 30.0, radius <= 24.0)
    assert distances.hd95_mm() == pytest.approx(6.0, abs=1.5)
    assert distances.surface_dice(2.0) == 0.0
    assert distances.surface_dice(8.0) == 1.0


def test_a_volume_one_voxel_thick_is_measured_in_its_plane() -> None:
    square = _box((1, 40, 40), (0, 10, 10), (1, 30, 30))
    distances = SurfaceRuler(square.shape, (999.0, 0.5, 0.5)).measure(square, np.roll(square, 3, 2))
    assert distances.hd95_mm() == pytest.approx(1.5)
    assert distances.reference_area.sum() == pytest.approx(4 * 10.0, rel=0.05)


def test_a_crop_to_both_masks_changes_nothing() -> None:
    reference, prediction = _blobs((24, 40, 30), seed=1)
    whole = np.zeros((2, 30, 60, 50), dtype=np.bool_)
    whole[:, 3:27, 11:51, 5:35] = reference, prediction
    ruler = SurfaceRuler(whole.shape[1:], SPACING_MM)
    crop, all_of_it = ruler.measure(reference, prediction), ruler.measure(*whole)
    assert crop.hd95_mm() == all_of_it.hd95_mm()
    assert crop.surface_dice(2.0) == all_of_it.surface_dice(2.0)


@pytest.mark.requirement("ART-10")
@pytest.mark.peer("surface-distance")
@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [
        ((20, 30, 25), (1.0, 1.0, 1.0)),
        ((40, 50, 45), SPACING_MM),
        ((12, 90, 80), (5.0, 0.8, 0.8)),
        ((1, 90, 80), (999.0, 0.5, 0.7)),
    ],
    ids=["isotropic", "anisotropic", "thick slices", "one slice"],
)
@pytest.mark.parametrize("seed", range(3))
def test_hd95_and_surface_dice_are_those_of_surface_distance(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], seed: int
) -> None:
    require_peer("surface-distance")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports and calls of SciPy are old
        import surface_distance

        reference, prediction = _blobs(shape, seed)
        ours = SurfaceRuler(shape, spacing_mm).measure(reference, prediction)
        if shape[0] == 1:
            theirs = surface_distance.compute_surface_distances(reference[0], prediction[0], spacing_mm[1:])
        else:
            theirs = surface_distance.compute_surface_distances(reference, prediction, spacing_mm)
    assert ours.hd95_mm() == surface_distance.compute_robust_hausdorff(theirs, 95)
    assert ours.surface_dice(2.0) == pytest.approx(
        surface_distance.compute_surface_dice_at_tolerance(theirs, 2.0), abs=1e-12
    )


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_mask_is_refused(empty: int) -> None:
    masks = [_box((5, 5, 5), (1, 1, 1), (3, 3, 3)) for _ in range(2)]
    masks[empty][:] = False
    with pytest.raises(ValueError, match="empty"):
        SurfaceRuler((5, 5, 5), SPACING_MM).measure(*masks)
