from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from engine.errors import InputRejected
from engine.volume import Geometry, LabelMap, Volume, nonzero_box, reorientation

CODES = ["".join(code) for order in permutations(["LR", "PA", "SI"]) for code in product(*order)]


def oblique(*, shear: float = 0.0) -> Geometry:
    """A (3, 4, 5) grid, turned by 20 and 10 degrees, anisotropic; optionally sheared as by a tilted gantry."""
    a, b = np.deg2rad((20.0, 10.0))
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[0.8, 0, 0], [0, 1.2, shear], [0, 0, 3.0]])
    affine[:3, 3] = (-40.0, 12.5, 300.0)
    return Geometry(shape=(3, 4, 5), affine_lps=affine)


def world_values(volume: Volume) -> dict[tuple[float, ...], float]:
    """Position in the patient → value, for every voxel."""
    z, y, x = volume.geometry.shape
    return {
        tuple(np.round(volume.geometry.affine_lps @ (i, j, k, 1), 6)): float(volume.array[0, k, j, i])
        for i in range(x)
        for j in range(y)
        for k in range(z)
    }


def test_there_are_48_orientations() -> None:
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("code", CODES)
def test_each_orientation_keeps_every_voxel_where_it_is_in_the_patient(code: str) -> None:
    geometry = oblique()
    volume = Volume(array=np.arange(60, dtype=np.float32).reshape(1, 3, 4, 5), geometry=geometry)
    turned, _ = volume.reoriented(code)
    assert turned.geometry.orientation == code
    assert turned.array.flags.c_contiguous
    assert world_values(turned) == world_values(volume)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("start", ["LPS", "IRA", "PSL"])
def test_the_way_back_is_exact_from_and_to_each_orientation(start: str, code: str) -> None:
    source, _ = LabelMap(array=np.arange(60, dtype=np.uint8).reshape(3, 4, 5), geometry=oblique()).reoriented(start)
    turned, change = source.reoriented(code)
    back = change.restore_labels(turned)
    assert back.geometry is source.geometry
    assert back.array.dtype == np.uint8
    np.testing.assert_array_equal(back.array, source.array)


def test_as_stored_changes_nothing() -> None:
    volume = Volume(array=np.zeros((2, 3, 4, 5), dtype=np.float32), geometry=oblique())
    turned, change = volume.reoriented("as-stored")
    assert turned.geometry is volume.geometry
    assert change.axes == (0, 1, 2)
    assert change.reversed_axes == ()


def test_orientation_of_an_axial_dicom_grid_is_lps_and_of_an_itk_ras_grid_is_ras() -> None:
    assert Geometry(shape=(2, 2, 2), affine_lps=np.eye(4)).orientation == "LPS"
    assert Geometry(shape=(2, 2, 2), affine_lps=np.diag([-1.0, -1.0, 1.0, 1.0])).orientation == "RAS"


def test_an_axis_at_45_degrees_still_gives_three_different_letters() -> None:
    half = np.sqrt(0.5)
    affine = np.eye(4)
    affine[:2, :2] = [[half, -half], [half, half]]
    assert sorted(Geometry(shape=(2, 2, 2), affine_lps=affine).orientation) in (["L", "P", "S"], ["L", "A", "S"])


def test_spacing_is_in_array_order_and_volume_comes_from_the_determinant() -> None:
    straight, sheared = oblique(), oblique(shear=1.5)
    assert straight.spacing_mm == pytest.approx((3.0, 1.2, 0.8))
    assert straight.voxel_volume_ml == pytest.approx(0.8 * 1.2 * 3.0 / 1000)
    assert sheared.spacing_mm[0] == pytest.approx(np.hypot(3.0, 1.5))
    assert sheared.voxel_volume_ml == pytest.approx(straight.voxel_volume_ml)


def test_same_grid_looks_at_the_far_corner() -> None:
    geometry = oblique()
    slightly = np.array(geometry.affine_lps)
    slightly[:3, 0] *= 1.01  # 0.03 mm at the fifth voxel, nothing at the first
    assert geometry.same_grid(Geometry(shape=(3, 4, 5), affine_lps=np.array(geometry.affine_lps)))
    assert not geometry.same_grid(Geometry(shape=(3, 4, 5), affine_lps=slightly))
    assert not geometry.same_grid(Geometry(shape=(3, 4, 6), affine_lps=np.array(geometry.affine_lps)))


@pytest.mark.parametrize(
    "affine",
    [np.diag([1.0, 1.0, 0.0, 1.0]), np.full((4, 4), np.nan), np.eye(3), np.array([[1, 1, 0, 0]] * 3 + [[0, 0, 0, 1]])],
)
def test_an_affine_that_spans_no_volume_is_refused(affine: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> None:
    with pytest.raises(InputRejected, match="affine"):
        Geometry(shape=(2, 2, 2), affine_lps=affine)


@pytest.mark.parametrize("code", ["LPX", "LLS", "LP", "lps", ""])
def test_a_wrong_code_is_an_error(code: str) -> None:
    with pytest.raises(ValueError, match="orientation"):
        reorientation(oblique(), code)


def test_labels_of_another_grid_are_not_taken_back() -> None:
    _, change = LabelMap(array=np.zeros((3, 4, 5), dtype=np.uint8), geometry=oblique()).reoriented("SPL")
    wrong = LabelMap(array=np.zeros((3, 4, 5), dtype=np.uint8), geometry=oblique())
    with pytest.raises(ValueError, match="not on the grid"):
        change.restore_labels(wrong)


def test_the_nonzero_box_is_of_all_channels() -> None:
    array = np.zeros((2, 5, 6, 7), dtype=np.float32)
    assert nonzero_box(array) is None
    array[0, 1, 2, 3] = -1.0
    assert nonzero_box(array) == (slice(1, 2), slice(2, 3), slice(3, 4))
    array[1, 4, 0, 3:6] = 2.0
    assert nonzero_box(array) == (slice(1, 5), slice(0, 3), slice(3, 6))
    assert nonzero_box(array.transpose(0, 3, 1, 2)) == (slice(3, 6), slice(1, 5), slice(0, 3))
