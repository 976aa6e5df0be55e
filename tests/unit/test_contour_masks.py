"""gateway.training_data.contour_masks: contours on slices of any orientation, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread

from engine.nifti import read_label_map
from gateway.errors import Rejected
from gateway.results.series import read_series
from gateway.training_data.contour_masks import BetweenSlices, paint_contours
from gateway.training_data.label_objects import read_label_object
from gateway.training_data.label_painting import LabelPainter
from tests.support.phantoms import Order, Orientation, PhantomSeries, write_series
from tests.support.result_contents import part_of
from tests.support.structure_sets import Region, outlines, regions_of, write_structure_set


def _painted(
    phantom: PhantomSeries, regions: Sequence[Region], folder: Path, between: BetweenSlices = "refuse"
) -> tuple[NDArray[np.uint8], list[str]]:
    part = part_of(phantom.files)
    file = write_structure_set(folder / "rs.dcm", phantom, regions)
    painter = LabelPainter(part.geometry.shape, len(regions), "refuse")
    values = {number: number for number in range(1, len(regions) + 1)}
    notes = paint_contours(file, values, part.geometry, painter, between=between)
    return painter.array, notes


def _square(z: float, low: float = 3.0, high: float = 8.0) -> NDArray[np.float64]:
    return np.array([[low, low, z], [high, low, z], [high, high, z], [low, high, z]])


@pytest.mark.requirement("ART-01")
@pytest.mark.parametrize(
    ("orientation", "order"),
    [("axial", "ascending"), ("axial-mirrored", "reversed"), ("sagittal", "shuffled"), ("double-oblique", "reversed")],
)
def test_contours_of_a_mask_give_the_mask(tmp_path: Path, orientation: Orientation, order: Order) -> None:
    phantom = write_series(tmp_path / "s", orientation=orientation, order=order, instance_numbers="against")
    array, notes = _painted(phantom, regions_of(phantom.labels, {1: "left", 2: "right"}), tmp_path)
    assert np.array_equal(array, phantom.labels)
    assert notes == []


def test_a_hole_is_left_out(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    ring = np.zeros(phantom.labels.shape, bool)
    ring[4:7, 3:15, 3:15] = True
    ring[4:7, 7:11, 7:11] = False
    array, _ = _painted(phantom, [Region(name="ring", contours=outlines(ring))], tmp_path)
    assert np.array_equal(array > 0, ring)


@pytest.mark.parametrize(("thickness_mm", "apart"), [(3.0, 0.01 / 3), (30.0, 1e-3)])
def test_a_hole_is_left_out_though_its_plane_was_rounded_otherwise(
    tmp_path: Path, thickness_mm: float, apart: float
) -> None:
    """By 0.01 mm, or a thousandth of the slices' distance."""
    phantom = write_series(tmp_path / "s", spacing_mm=(thickness_mm, 2.0, 1.5))
    contours = [_square(5, 3, 12), _square(5 + apart, 6, 9), _square(6, 3, 12), _square(6 - apart, 6, 9)]
    array, notes = _painted(phantom, [Region(name="ring", contours=contours)], tmp_path)
    # The line itself belongs to the region: 10 x 10 without 2 x 2.
    assert array[5].sum() == array[6].sum() == 96
    assert notes == []


def test_a_hole_is_left_out_though_points_written_coarsely_lie_off_their_plane(tmp_path: Path) -> None:
    """On an oblique slice, coordinates in tenths of a millimetre scatter about it."""
    phantom = write_series(tmp_path / "s")
    outer, inner = _square(5.0, 3, 12).astype(float), _square(5.0, 6, 9).astype(float)
    outer[:, 2] += np.array([0.04, -0.05, 0.03, -0.01])
    inner[:, 2] += np.array([0.05, 0.0, 0.05, -0.01])
    array, notes = _painted(phantom, [Region(name="ring", contours=[outer, inner, _square(6, 3, 12)])], tmp_path)
    assert (array[5].sum(), array[6].sum()) == (96, 100)
    assert notes == []


@pytest.mark.parametrize("orientation", ["axial", "double-oblique"])
@pytest.mark.parametrize("apart", [0.005, 0.09])
def test_contours_of_other_planes_that_go_to_one_slice_are_no_holes_in_each_other(
    tmp_path: Path, orientation: Orientation, apart: float
) -> None:
    """Drawn on thinner slices, the second a little smaller: even-odd would leave a ring."""
    phantom = write_series(tmp_path / "s", orientation=orientation, order="reversed")
    contours = [_square(5, 3, 12), _square(5 + apart, 4, 11), _square(6, 3, 12), _square(6 - apart, 13, 16)]
    array, notes = _painted(phantom, [Region(name="r", contours=contours)], tmp_path)
    assert (array[5].sum(), array[6].sum()) == (100, 116)
    assert notes == ["ROI 1: on 1 slices contours of several planes were united; an inner one is no hole there"]


def test_a_contour_that_is_there_twice_is_used_once_wherever_it_starts(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    turned, reversed_ = np.roll(_square(4), 1, axis=0), _square(5)[::-1]
    contours = [_square(4), turned, _square(5), reversed_, _square(6)]
    array, notes = _painted(phantom, [Region(name="r", contours=contours)], tmp_path)
    assert array[4].sum() == array[5].sum() == array[6].sum() == 36
    assert "2 contours are there twice; one was used" in "".join(notes)


def test_a_ring_thinner_than_a_pixel_is_no_contour_twice(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    contours = [_square(4, 2.6, 8.4), _square(4, 2.9, 8.1)]
    array, notes = _painted(phantom, [Region(name="r", contours=contours)], tmp_path)
    assert array.sum() == 0
    assert notes == []


def test_contours_between_slices_are_refused_or_go_to_the_nearest(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    region = Region(name="r", contours=[_square(4.05), _square(5.3), _square(5.45)])
    with pytest.raises(Rejected, match=r"2 of 3 contours lie between slices \(up to 0.45 .*--between-slices nearest"):
        _painted(phantom, [region], tmp_path)
    array, notes = _painted(phantom, [region], tmp_path, "nearest")
    # Two planes that go to one slice are no hole in each other.
    assert np.flatnonzero(array.any(axis=(1, 2))).tolist() == [4, 5]
    assert array[5].sum() == array[4].sum() == 36
    assert "2 contours between slices were taken for the nearest" in notes[0]


def test_what_a_person_should_know_is_told(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    contours = [_square(2), _square(2), _square(5), _square(5, 6, 12), _square(6)]
    array, notes = _painted(phantom, [Region(name="r", contours=contours)], tmp_path)
    assert array[2].sum() == 36
    told = "\n".join(notes)
    assert "1 contours are there twice" in told
    assert "on 1 slices contours of one ROI cross" in told
    assert "2 slices between the first and the last contour have none" in told


def test_contours_side_by_side_that_touch_do_not_cross(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    _, notes = _painted(phantom, [Region(name="r", contours=[_square(2, 1, 4), _square(2, 4, 7)])], tmp_path)
    assert notes == []


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region(name="r", contours=[np.array([[3.0, 3, 2], [8, 3, 2], [8, 8, 3]])]), "not lie in the plane"),
        (Region(name="r", contours=[_square(-2)]), "above or below the images"),
        (Region(name="r", contours=[_square(90)]), "above or below the images"),
        (Region(name="r", contours=[_square(2), _square(2000)]), "far outside"),
        (Region(name="r", contours=[_square(2)], kind="OPEN_PLANAR"), "OPEN_PLANAR.*encloses nothing"),
    ],
)
def test_contours_that_are_not_of_these_slices_are_refused(tmp_path: Path, region: Region, message: str) -> None:
    phantom = write_series(tmp_path / "s")
    with pytest.raises(Rejected, match=message):
        _painted(phantom, [region], tmp_path)


def test_regions_of_points_are_left_out_and_empty_ones_stay(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    regions = [
        Region(name="Größe  \x07 1", contours=[_square(2)]),
        Region(name="isocentre", contours=[np.array([[1.0, 1, 1]])], kind="POINT"),
        Region(name="empty"),
    ]
    label = read_label_object(write_structure_set(tmp_path / "rs.dcm", phantom, regions))
    assert [(s.number, s.name) for s in label.structures] == [(1, "Größe 1"), (3, "empty")]
    assert label.left_out == ("isocentre",)
    assert label.series == {phantom.series_instance_uid}
    assert label.instances == {d.SOPInstanceUID for d in phantom.datasets}


@pytest.mark.requirement("ART-01")
@pytest.mark.peer("shared-data")
@pytest.mark.parametrize("modality", ["CT", "MR_T1", "PET"])
def test_contours_of_a_tumour_are_their_twin_mask_voxel_by_voxel(shared_data: Path, modality: str) -> None:
    folder = shared_data / "dicom" / "pet-ct-mr-sts-002" / modality
    (part,) = read_series(sorted((folder / "dicom" / "image").iterdir()), only_headers=True)
    painter = LabelPainter(part.geometry.shape, 1, "refuse")
    notes = paint_contours(folder / "dicom" / "mask" / "RS.dcm", {1: 1}, part.geometry, painter, between="refuse")
    twin = read_label_map(folder / "nifti" / "mask" / "mask.nii.gz")
    assert part.geometry.same_grid(twin.geometry, tolerance_mm=0.1)
    assert twin.array.any()
    assert np.array_equal(painter.array, twin.array)
    assert notes == []


def test_a_hole_in_another_item_of_the_same_region_is_a_hole(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    part = part_of(phantom.files)
    file = write_structure_set(tmp_path / "rs.dcm", phantom, [Region(name="r", contours=[_square(4, 3, 12)])])
    ds = dcmread(file)
    hole = dcmread(write_structure_set(tmp_path / "hole.dcm", phantom, [Region(name="r", contours=[_square(4, 5, 9)])]))
    ds.ROIContourSequence.append(hole.ROIContourSequence[0])
    ds.save_as(file)
    painter = LabelPainter(part.geometry.shape, 1, "refuse")
    paint_contours(file, {1: 1}, part.geometry, painter, between="refuse")
    # 10 x 10, without the 3 x 3 inside the hole's line.
    assert int(painter.array.sum()) == 91


def test_contours_beside_the_images_are_refused_and_what_reaches_beyond_their_edge_is_told(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    half = Region(name="r", contours=[_square(4, -4, 3)])
    array, notes = _painted(phantom, [half], tmp_path)
    assert array[4].sum() == 16
    assert "1 contours reach beyond the edge of the images" in notes[0]
    with pytest.raises(Rejected, match="1 of 2 contours lie beside the images"):
        _painted(phantom, [Region(name="r", contours=[_square(4), _square(5, -9, -3)])], tmp_path)
