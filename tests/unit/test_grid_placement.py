"""gateway.training_data.grid_placement: exact where centres are shared, refused with the reason elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.volume import Geometry, reorientation
from gateway.errors import Rejected
from gateway.training_data.grid_placement import even_grid, place
from tests.support.phantoms import phantom_affine

SHAPE = (5, 6, 7)
SPACING = (3.0, 2.0, 1.5)
GRID = Geometry(shape=SHAPE, affine_lps=phantom_affine("double-oblique", spacing_mm=SPACING, shape=SHAPE))


def _moved(labels: NDArray[np.uint8], own: Geometry, target: Geometry) -> NDArray[np.uint8]:
    placement = place(
        origin_mm=own.affine_lps[:3, 3],
        steps_mm=own.affine_lps[:3, :3],
        sizes=own.shape[::-1],
        target=target,
        what="labels",
    )
    moved = np.zeros(target.shape, np.uint8)
    z, y, x = np.nonzero(labels)
    moved[placement.apply((x, y, z), target, "labels")] = labels[z, y, x]
    return moved


@pytest.mark.parametrize("code", ["LPS", "RAS", "SLP", "AIR", "PSR"])
def test_exchanged_and_reversed_axes_are_turned_back(code: str) -> None:
    labels = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    change = reorientation(GRID, code)
    assert np.array_equal(_moved(change.apply(labels), change.target, GRID), labels)


def test_a_part_of_the_grid_is_put_where_it_lies() -> None:
    affine = GRID.affine_lps.copy()
    affine[:3, 3] = (affine @ [2, 1, 3, 1])[:3]
    part = Geometry(shape=(2, 3, 4), affine_lps=affine)
    labels = np.ones(part.shape, np.uint8)
    moved = _moved(labels, part, GRID)
    assert moved.sum() == 24
    assert moved[3:5, 1:4, 2:6].all()


def test_voxels_outside_the_images_are_refused_and_empty_ones_are_not() -> None:
    affine = GRID.affine_lps.copy()
    affine[:3, 3] = (affine @ [-2, 0, 0, 1])[:3]
    wider = Geometry(shape=SHAPE, affine_lps=affine)
    labels = np.zeros(SHAPE, np.uint8)
    labels[:, :, 3] = 1
    assert _moved(labels, wider, GRID)[:, :, 1].all()
    labels[0, 0, 0] = 1
    with pytest.raises(Rejected, match="1 voxels lie outside the images"):
        _moved(labels, wider, GRID)


@pytest.mark.parametrize(("scale", "shift"), [(1.1, 0.0), (2.0, 0.0), (0.5, 0.0), (1.0, 0.3), (1.03, 0.0)])
def test_another_spacing_or_position_is_another_grid(scale: float, shift: float) -> None:
    affine = GRID.affine_lps.copy()
    affine[:3, :3] *= scale
    affine[:3, 3] += shift * GRID.affine_lps[:3, 1]
    other = Geometry(shape=SHAPE, affine_lps=affine)
    with pytest.raises(Rejected, match=r"labels: lies on another grid than its images.*resample"):
        _moved(np.ones(SHAPE, np.uint8), other, GRID)


def test_a_turned_grid_is_another_grid() -> None:
    other = Geometry(shape=SHAPE, affine_lps=phantom_affine("oblique", spacing_mm=SPACING, shape=SHAPE))
    with pytest.raises(Rejected, match="another grid"):
        _moved(np.ones(SHAPE, np.uint8), other, GRID)


def _even(tilt_deg: float = 0.0, noise_mm: float = 0.0, missing: int | None = None) -> Geometry:
    shape = (20, 6, 7)
    affine = phantom_affine("oblique", spacing_mm=SPACING, shape=shape, tilt_deg=tilt_deg)
    positions = affine[:3, 3] + np.outer(np.arange(20), affine[:3, 2])
    positions[3] += noise_mm * np.array([0.0, 0.0, 1.0])
    if missing is not None:
        positions = np.delete(positions, missing, axis=0)
        affine[:3, 2] = (positions[-1] - positions[0]) / 18
    return even_grid(affine, positions, (len(positions), 6, 7))


def test_an_even_stack_keeps_its_grid() -> None:
    shape = (20, 6, 7)
    affine = phantom_affine("oblique", spacing_mm=SPACING, shape=shape)
    assert _even().same_grid(Geometry(shape=shape, affine_lps=affine), tolerance_mm=1e-6)
    assert _even(noise_mm=0.1).shape == shape


@pytest.mark.parametrize("fault", [{"tilt_deg": 5.0}, {"noise_mm": 1.0}, {"missing": 10}, {"missing": 18}])
def test_tilted_uneven_and_incomplete_stacks_are_refused(fault: dict[str, float]) -> None:
    with pytest.raises(Rejected, match=r"mm from an even grid .*resample"):
        _even(**fault)  # type: ignore[arg-type]
