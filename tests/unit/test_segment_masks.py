"""gateway.training_data.segment_masks: SEG of ours and of others, voxel by voxel on the grid of their images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pack_bits

from engine.volume import Geometry
from gateway.errors import Rejected
from gateway.results.content import Encoding
from gateway.results.segmentation import encode_segmentation
from gateway.results.series import SeriesPart, read_series
from gateway.training_data.label_objects import read_label_object
from gateway.training_data.label_painting import LabelPainter
from gateway.training_data.segment_masks import paint_segments
from tests.support.phantoms import Order, Orientation, write_series
from tests.support.result_contents import content_of, part_of

OWN = {1: 1, 2: 2}


def _painted(
    file: Path, geometry: Geometry, values: dict[int, int] | None = None, *, threshold: float = 0.5
) -> LabelPainter:
    painter = LabelPainter(geometry.shape, 255, "refuse")
    paint_segments(file, OWN if values is None else values, geometry, painter, threshold=threshold)
    return painter


def _written(part: SeriesPart, labels: NDArray[Any], path: Path, encoding: Encoding = "BINARY", **content: Any) -> Path:
    path.write_bytes(encode_segmentation(content_of(part, labels, **content), encoding=encoding).data)
    return path


def _edited(path: Path, edit: Callable[[Dataset], None]) -> Path:
    ds = pydicom.dcmread(path)
    edit(ds)
    ds.save_as(path)
    return path


@pytest.mark.requirement("ART-01")
@pytest.mark.parametrize("encoding", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize(
    ("orientation", "order"),
    [
        ("axial", "ascending"),
        ("axial-mirrored", "reversed"),
        ("sagittal", "shuffled"),
        ("coronal", "reversed"),
        ("double-oblique", "shuffled"),
    ],
)
def test_our_own_segmentation_comes_back_voxel_by_voxel(
    tmp_path: Path, orientation: Orientation, order: Order, encoding: Encoding
) -> None:
    phantom = write_series(tmp_path / "s", orientation=orientation, order=order, instance_numbers="against")
    part = part_of(phantom.files)
    file = _written(part, phantom.labels, tmp_path / "seg.dcm", encoding)
    assert np.array_equal(_painted(file, part.geometry).array, phantom.labels)


@pytest.mark.parametrize("columns", range(16, 24))
def test_frames_that_do_not_begin_at_a_byte_are_read(tmp_path: Path, columns: int) -> None:
    phantom = write_series(tmp_path / "s", shape=(9, 13, columns))
    part = part_of(phantom.files)
    file = _written(part, phantom.labels, tmp_path / "seg.dcm")
    assert np.array_equal(_painted(file, part.geometry).array, phantom.labels)


def test_frames_of_a_large_object_are_read_alike_and_its_end_is_looked_for(tmp_path: Path) -> None:
    """Pixels of more than some kilobytes are left in the file until they are needed."""
    phantom = write_series(tmp_path / "s", shape=(9, 101, 103))
    part = part_of(phantom.files)
    file = _written(part, phantom.labels, tmp_path / "seg.dcm")
    assert np.array_equal(_painted(file, part.geometry).array, phantom.labels)

    def shorten(ds: Dataset) -> None:
        ds.PixelData = ds.PixelData[:-200]

    with pytest.raises(Rejected, match=r"PixelData \(7FE0,0010\) is truncated"):
        _painted(_edited(file, shorten), part.geometry)


def test_the_images_of_an_enhanced_object_are_matched_too(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s", orientation="oblique", order="shuffled", enhanced=True, modality="MR")
    part = part_of(phantom.files)
    file = _written(part, phantom.labels, tmp_path / "seg.dcm")
    assert np.array_equal(_painted(file, part.geometry).array, phantom.labels)


def test_overlapping_segments_are_counted(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    part = part_of(phantom.files)
    file = _written(part, phantom.labels, tmp_path / "seg.dcm", regions=((1, 2), (2,)))
    painter = _painted(file, part.geometry)
    assert painter.overlaps == {(1, 2): int((phantom.labels == 2).sum())}
    assert painter.painted == {1, 2}


def test_frames_in_any_order_and_groups_that_are_not_shared_are_read(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s", orientation="double-oblique")
    part = part_of(phantom.files)
    file = _written(part, phantom.labels, tmp_path / "seg.dcm")

    def shuffle(ds: Dataset) -> None:
        count = int(ds.NumberOfFrames)
        order = np.random.default_rng(2).permutation(count)
        frames = np.unpackbits(np.frombuffer(ds.PixelData, np.uint8), bitorder="little")
        frames = frames[: count * ds.Rows * ds.Columns].reshape(count, -1)[order]
        ds.PixelData = np.packbits(frames.ravel(), bitorder="little").tobytes().ljust(len(ds.PixelData), b"\0")
        shared = ds.SharedFunctionalGroupsSequence[0]
        groups = [ds.PerFrameFunctionalGroupsSequence[int(index)] for index in order]
        for keyword in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            for group in groups:
                setattr(group, keyword, getattr(shared, keyword))
            delattr(shared, keyword)
        ds.PerFrameFunctionalGroupsSequence = groups

    assert np.array_equal(_painted(_edited(file, shuffle), part.geometry).array, phantom.labels)


def _decoded(path: Path) -> Dataset:
    ds = pydicom.dcmread(path)
    if ds.file_meta.TransferSyntaxUID.is_compressed:
        ds.decompress()
    return ds


def _join(path: Path, first: Dataset, second: Dataset) -> Path:
    """An object with the frames of both."""
    frames = np.concatenate([ds.pixel_array.reshape(-1, ds.Rows, ds.Columns) for ds in (first, second)])
    groups = [*first.PerFrameFunctionalGroupsSequence, *second.PerFrameFunctionalGroupsSequence]
    first.PerFrameFunctionalGroupsSequence, first.NumberOfFrames = copy.deepcopy(groups), len(frames)
    content = pack_bits(frames.ravel()) if first.BitsAllocated == 1 else frames.tobytes()
    first.PixelData = content + b"\0" * (len(content) % 2)
    first.save_as(path)
    return path


def _turn_rows(ds: Dataset) -> None:
    """The same voxels, with rows that run the other way."""
    shared = ds.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    length_mm = float(shared.PixelMeasuresSequence[0].PixelSpacing[1]) * (ds.Columns - 1)
    for group in ds.PerFrameFunctionalGroupsSequence:
        group.PlaneOrientationSequence = copy.deepcopy(shared.PlaneOrientationSequence)
        group.PlaneOrientationSequence[0].ImageOrientationPatient = [*-cosines[:3], *cosines[3:]]
        place = group.PlanePositionSequence[0]
        place.ImagePositionPatient = list(np.array(place.ImagePositionPatient) + cosines[:3] * length_mm)
    ds.PixelData = pack_bits(ds.pixel_array[..., ::-1].ravel())


@pytest.mark.parametrize("encoding", ["BINARY", "LABELMAP"])
def test_frames_of_one_segment_at_one_position_are_refused_unless_they_are_the_same(
    tmp_path: Path, encoding: Encoding
) -> None:
    """Two points in time, between which only the first segment moves: which is meant?"""
    phantom = write_series(tmp_path / "s", shape=(6, 10, 14))
    part = part_of(phantom.files)
    labels = np.zeros((6, 10, 14), np.uint8)
    labels[1:4, 2:5, 2:5], labels[2:5, 6:8, 6:8] = 1, 2
    moved = np.where(labels == 1, 0, labels)
    moved[1:4, 2:5, 3:6] = 1
    now = _decoded(_written(part, labels, tmp_path / "now.dcm", encoding))
    later = _decoded(_written(part, moved, tmp_path / "later.dcm", encoding))
    both = _join(tmp_path / "both.dcm", copy.deepcopy(now), later)
    with pytest.raises(Rejected, match=r"frames at one position that differ, of segment 1 at 3 position\(s\) \(time"):
        _painted(both, part.geometry)
    assert np.array_equal(_painted(both, part.geometry, {2: 2}).array, np.where(labels == 2, 2, 0))
    twice = _join(tmp_path / "twice.dcm", copy.deepcopy(now), now)
    assert np.array_equal(_painted(twice, part.geometry).array, labels)


def test_a_position_is_the_same_whichever_way_the_rows_run(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s", shape=(6, 10, 14), orientation="oblique")
    part = part_of(phantom.files)
    labels = np.zeros((6, 10, 14), np.uint8)
    labels[1:4, 2:5, 2:5] = 1
    now, turned = (_decoded(_written(part, labels, tmp_path / "now.dcm")) for _ in range(2))
    _turn_rows(turned)
    turned.save_as(tmp_path / "turned.dcm")
    assert np.array_equal(_painted(tmp_path / "turned.dcm", part.geometry).array, labels)
    for group in now.PerFrameFunctionalGroupsSequence:
        group.PlaneOrientationSequence = now.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    del now.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    with pytest.raises(Rejected, match=r"segment 1 at 3 position\(s\)"):
        _painted(_join(tmp_path / "both.dcm", now, turned), part.geometry)


def _move(ds: Dataset) -> None:
    for frame in ds.PerFrameFunctionalGroupsSequence:
        x, y, z = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.PlanePositionSequence[0].ImagePositionPatient = [float(x) + 0.5, y, z]


def _scale(ds: Dataset) -> None:
    ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [3.0, 3.0]


def _leave(ds: Dataset) -> None:
    for frame in ds.PerFrameFunctionalGroupsSequence:
        x, y, z = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.PlanePositionSequence[0].ImagePositionPatient = [x, y, float(z) + 300.0]


def _no_position(ds: Dataset) -> None:
    del ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence


def _no_segment(ds: Dataset) -> None:
    for frame in ds.PerFrameFunctionalGroupsSequence:
        del frame.SegmentIdentificationSequence


def _short(ds: Dataset) -> None:
    ds.PixelData = ds.PixelData[:20]


def _few_items(ds: Dataset) -> None:
    del ds.PerFrameFunctionalGroupsSequence[0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_move, "another grid"),
        (_scale, r"another grid.*spacing 3 x 3 mm, the images' 1.5 x 2 x 3 mm"),
        (_leave, "outside the images"),
        (_no_position, "ImagePositionPatient"),
        (_no_segment, "ReferencedSegmentNumber"),
        (_short, "PixelData"),
        (_few_items, "PerFrameFunctionalGroupsSequence"),
    ],
)
def test_what_does_not_lie_on_the_grid_or_cannot_be_read_is_refused(
    tmp_path: Path, fault: Callable[[Dataset], None], message: str
) -> None:
    phantom = write_series(tmp_path / "s")
    part = part_of(phantom.files)
    file = _edited(_written(part, phantom.labels, tmp_path / "seg.dcm"), fault)
    with pytest.raises(Rejected, match=message):
        _painted(file, part.geometry)


def test_names_numbers_and_references_are_read(tmp_path: Path) -> None:
    phantom = write_series(tmp_path / "s")
    label = read_label_object(_written(part_of(phantom.files), phantom.labels, tmp_path / "seg.dcm"))
    assert [(s.number, s.name) for s in label.structures] == [(1, "left structure"), (2, "right structure")]
    assert label.series == {phantom.series_instance_uid}
    assert label.instances == {d.SOPInstanceUID for d in phantom.datasets}
    assert label.frames_of_reference == {phantom.frame_of_reference_uid}


@pytest.mark.peer("shared-data")
def test_fractional_segments_count_from_the_threshold_on(shared_data: Path) -> None:
    """Compared with what highdicom makes of the object."""
    foreign = shared_data / "dicom" / "foreign-results" / "highdicom"
    images = shared_data / "dicom" / "pydicom" / "test_files" / "dicomdirtests" / "77654033" / "CT2"
    geometry = _geometry(sorted(images.iterdir())[1:])  # the first lies 20 cm away
    file = foreign / "seg_image_ct_true_fractional.dcm"
    expected = _by_highdicom(file, geometry, 1)
    assert 0 < expected.max() < 1
    for threshold in (0.25, 0.5, 0.51, 1.0):
        found = _painted(file, geometry, {1: 1}, threshold=threshold).array
        assert np.array_equal(found > 0, expected >= threshold), threshold


@pytest.mark.peer("shared-data")
@pytest.mark.parametrize("name", ["seg_image_ct_binary.dcm", "seg_image_ct_binary_fractional.dcm"])
def test_segments_of_others_are_what_highdicom_says(shared_data: Path, name: str) -> None:
    images = shared_data / "dicom" / "pydicom" / "test_files" / "dicomdirtests" / "77654033" / "CT2"
    geometry = _geometry(sorted(images.iterdir())[1:])  # the first lies 20 cm away
    file = shared_data / "dicom" / "foreign-results" / "highdicom" / name
    for segment in read_label_object(file).structures:
        found = _painted(file, geometry, {segment.number: 1}).array
        assert found.any()
        assert np.array_equal(found > 0, _by_highdicom(file, geometry, segment.number) > 0)


@pytest.mark.peer("shared-data")
@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("liver.dcm", 1, "liver_seg.nrrd"),
        ("partial_overlaps.dcm", 1, "partial_overlaps-1.nrrd"),
    ],
)
def test_segments_by_dcmqi_are_their_twins(shared_data: Path, name: str, number: int, expected: str) -> None:
    folder = shared_data / "dicom" / "foreign-results" / "dcmqi" / "segmentations"
    geometry = _geometry(sorted((folder / "ct-3slice").iterdir()))
    twin = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / expected)))
    assert np.array_equal(_painted(folder / name, geometry, {number: 1}).array > 0, twin == twin[twin > 0].min())


@pytest.mark.peer("shared-data")
@pytest.mark.parametrize("name", ["noppv", "ppv5"])
def test_sparse_label_maps_are_their_twins(shared_data: Path, name: str) -> None:
    folder = shared_data / "dicom" / "foreign-results" / "dcmqi" / "segmentations"
    geometry = _geometry(sorted((folder / "24x38x3" / "image").iterdir()))
    twin = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"sparse_labelmap_{name}_seg.nrrd")))
    found = _painted(folder / f"sparse-labelmap-{name}.dcm", geometry, {1: 1}).array
    assert found.any()
    assert np.array_equal(found, twin == 1)


@pytest.mark.peer("shared-data")
@pytest.mark.parametrize("name", ["liver_expb.dcm", "liver_j2k.dcm", "liver_nonbyte_aligned.dcm", "liver_rle.dcm"])
def test_every_encoding_is_read_alike_or_refused_by_name(shared_data: Path, name: str) -> None:
    """One-bit RLE has no decoder (PS3.5 8.2.2 does not foresee it)."""
    folder = shared_data / "dicom"
    images = folder / "foreign-results" / "dcmqi" / "segmentations" / "ct-3slice"
    geometry = _geometry(sorted(images.iterdir()))
    whole = _painted(folder / "pydicom-data" / "liver.dcm", geometry, {1: 1}).array
    file = folder / "pydicom-data" / name
    if "rle" in name:
        with pytest.raises(Rejected, match=r"PixelData \(7FE0,0010\) cannot be decoded"):
            _painted(file, geometry, {1: 1})
        return
    found = _painted(file, geometry, {1: 1}).array
    rows, columns = (510, 510) if "nonbyte" in name else (512, 512)
    assert found.any()
    assert np.array_equal(found[:, :rows, :columns], whole[:, :rows, :columns])


def _geometry(files: list[Path]) -> Geometry:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (part,) = read_series(files, only_headers=True)
    return part.geometry


def _by_highdicom(file: Path, geometry: Geometry, segment: int) -> NDArray[np.float64]:
    """Values 0 to 1 of one segment on the images' grid, slices put by their positions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volume = highdicom.seg.segread(file).get_volume(segment_numbers=[segment])
    placed = np.zeros(geometry.shape)
    inverse = np.linalg.inv(geometry.affine_lps)
    for k, plane in enumerate(volume.array[..., 0]):
        # highdicom counts (slice, row, column).
        corner = inverse @ volume.affine @ np.array([k, 0, 0, 1.0])
        assert np.allclose(corner[:2], 0, atol=1e-3)
        placed[round(corner[2])] = plane
    return placed
