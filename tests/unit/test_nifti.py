from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from engine.errors import InputRejected
from engine.nifti import (
    is_flat,
    narrowed,
    read_geometry,
    read_label_map,
    read_nifti,
    read_spacing_mm,
    read_whole_numbers,
    write_labels_like,
    write_nifti,
)
from engine.volume import Geometry, LabelMap
from tests.unit.test_volume import oblique


def write_image(path: Path, array: NDArray[Any], spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return path


def test_channels_are_stacked_in_order_with_the_grid_of_the_file(tmp_path: Path) -> None:
    first = write_image(tmp_path / "a.nii.gz", np.full((2, 3, 4), 7, dtype=np.int16), (0.5, 0.6, 2.0))
    second = write_image(tmp_path / "b.nii.gz", np.full((2, 3, 4), 9, dtype=np.float64), (0.5, 0.6, 2.0))
    volume = read_nifti([first, second])
    assert volume.array.shape == (2, 2, 3, 4)
    assert volume.array[:, 0, 0, 0].tolist() == [7.0, 9.0]
    assert volume.geometry.spacing_mm == pytest.approx((2.0, 0.6, 0.5))


def test_an_oblique_label_map_comes_back_as_it_was_written(tmp_path: Path) -> None:
    labels = LabelMap(array=np.arange(60, dtype=np.uint16).reshape(3, 4, 5) * 10, geometry=oblique())
    write_nifti(labels, tmp_path / "labels.nii.gz")
    back = read_label_map(tmp_path / "labels.nii.gz")
    assert back.array.dtype == np.uint16
    np.testing.assert_array_equal(back.array, labels.array)
    assert back.geometry.same_grid(labels.geometry)


def test_a_channel_on_another_grid_is_refused(tmp_path: Path) -> None:
    first = write_image(tmp_path / "a.nii.gz", np.zeros((2, 3, 4), dtype=np.float32))
    second = write_image(tmp_path / "b.nii.gz", np.zeros((2, 3, 4), dtype=np.float32), (1.0, 1.0, 1.5))
    with pytest.raises(InputRejected, match=r"b\.nii\.gz: lies on another grid"):
        read_nifti([first, second])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: type, name: str) -> None:
    array: NDArray[Any] = np.zeros((2, 3, 4), dtype=dtype)
    array[1, 1, 1] = value
    with pytest.raises(InputRejected, match="NaN or infinity"):
        read_nifti([write_image(tmp_path / name, array)])


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputRejected, match=r"a\.nii\.gz: not readable"):
        read_nifti([tmp_path / "a.nii.gz"])


def test_a_label_map_with_fractions_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii.gz", np.full((2, 3, 4), 0.5, dtype=np.float32))
    with pytest.raises(InputRejected, match="whole numbers"):
        read_label_map(path)


def test_a_sheared_grid_is_not_written_as_if_it_were_straight(tmp_path: Path) -> None:
    labels = LabelMap(array=np.zeros((3, 4, 5), dtype=np.uint8), geometry=oblique(shear=1.5))
    with pytest.raises(ValueError, match="sheared"):
        write_nifti(labels, tmp_path / "labels.nii.gz")


def test_a_single_2d_image_is_one_slice(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.ones((3, 4), dtype=np.float32))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    volume = read_nifti([tmp_path / "a.mha"])
    assert volume.array.shape == (1, 1, 3, 4)
    assert isinstance(volume.geometry, Geometry)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_that_ends_before_its_last_voxel_is_refused(tmp_path: Path, ending: str) -> None:
    path = write_image(tmp_path / f"short{ending}", np.ones((4, 5, 6), dtype=np.int16))
    content = path.read_bytes()
    path.write_bytes(
        gzip.compress(gzip.decompress(content)[:-100]) if ending == ".nii.gz" else content[:-100],
    )
    with pytest.raises(InputRejected, match=r"short\.nii"):
        read_nifti([path])
    with pytest.raises(InputRejected, match=r"short\.nii"):
        read_label_map(path)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", ["u1", "i1", "<i2", ">i2", "<u2", "<i4", "<u4", "<i8", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_type_is_read_as_itk_reads_it(tmp_path: Path, kind: str, ending: str, scaled: bool) -> None:
    """Plain voxels are taken from the file, others from ITK."""
    array = np.random.default_rng(1).integers(0, 100, size=(3, 4, 5)).astype(np.dtype(kind).newbyteorder("="))
    content = bytearray(write_image(tmp_path / "made.nii", array, (0.5, 0.6, 2.0)).read_bytes())
    order = ">" if kind.startswith(">") else "<"
    if order == ">":  # sizes of the header's fields: nifti1.h
        fields = [(0, 1, 4), (40, 8, 2), (68, 4, 2), (76, 11, 4), (120, 1, 2), (252, 2, 2), (256, 18, 4)]
        for offset, count, size in [*fields, (352, array.size, array.itemsize)]:
            part = np.frombuffer(content, f"<i{size}", count, offset).byteswap()
            content[offset : offset + part.nbytes] = part.tobytes()
    if scaled:
        content[112:120] = np.array([2.0, 3.0], f"{order}f4").tobytes()
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    image = sitk.ReadImage(str(path))
    volume = read_nifti([path])
    expected = array.astype(np.float32) * (2 if scaled else 1) + (3 if scaled else 0)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), expected)
    np.testing.assert_array_equal(volume.array[0], expected)
    assert volume.geometry.spacing_mm == pytest.approx(image.GetSpacing()[::-1])
    assert volume.geometry.origin_mm == pytest.approx(image.GetOrigin())
    np.testing.assert_array_equal(read_label_map(path).array, expected)


def test_a_flat_nifti_file_is_one_slice(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii.gz", np.arange(12, dtype=np.int16).reshape(3, 4), (0.5, 0.6))
    volume = read_nifti([path])
    assert volume.array[0, 0].tolist() == np.arange(12).reshape(3, 4).tolist()
    # As far from its neighbours as nnU-Net takes it to be.
    assert volume.geometry.spacing_mm == pytest.approx((999 * 0.6, 0.6, 0.5))
    assert read_spacing_mm(path) == pytest.approx(volume.geometry.spacing_mm)
    assert is_flat(path)


def test_a_compressed_file_that_was_damaged_is_refused(tmp_path: Path) -> None:
    """One bit of the voxels: only the checksum at the end of the file tells."""
    path = write_image(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), dtype=np.int16))
    stored = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    stored[-40] ^= 1
    path.write_bytes(stored)
    with pytest.raises(InputRejected, match=r"a\.nii\.gz: not readable"):
        read_nifti([path])


def test_a_header_that_promises_more_than_a_file_can_hold_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii", np.zeros((4, 5, 6), dtype=np.int16))
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([3000, 3000, 3000], "<i2").tobytes()
    path.write_bytes(content)
    with pytest.raises(InputRejected, match=r"a\.nii: ends before its last voxel"):
        read_nifti([path])


def test_spacing_comes_from_the_header_to_the_last_bit(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii.gz", np.ones((4, 5, 6), dtype=np.int16), (0.9, 0.7, 3.3))
    assert read_spacing_mm(path) == tuple(float(np.float32(v)) for v in (3.3, 0.7, 0.9))
    (tmp_path / "b.nii.gz").write_bytes(b"nothing")
    with pytest.raises(InputRejected, match=r"b\.nii\.gz"):
        read_spacing_mm(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float64])
@pytest.mark.parametrize("value", [-1, 300, 40000, 65536, 2**31 - 1])
def test_whole_numbers_are_read_as_they_are_and_labels_only_within_16_bits(
    tmp_path: Path, dtype: type, value: int
) -> None:
    array: NDArray[Any] = np.zeros((2, 3, 4), dtype=dtype)
    array[1, 1, 1] = value
    path = write_image(tmp_path / "a.nii.gz", array)
    found = read_whole_numbers(path)
    np.testing.assert_array_equal(found.array, array)
    if 0 <= value <= 65535:
        np.testing.assert_array_equal(narrowed(found).array, array)
        np.testing.assert_array_equal(read_label_map(path).array, array)
    else:
        with pytest.raises(InputRejected, match=f"{min(0, value)} to {max(0, value)}"):
            read_label_map(path)


def test_numbers_that_no_integer_holds_are_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii.gz", np.full((2, 3, 4), 1e30))
    with pytest.raises(InputRejected, match="1e\\+30"):
        read_whole_numbers(path)


def test_several_slices_are_not_written_with_two_axes(tmp_path: Path) -> None:
    labels = LabelMap(array=np.zeros((3, 4, 5), dtype=np.uint8), geometry=oblique())
    with pytest.raises(ValueError, match="3 slices"):
        write_nifti(labels, tmp_path / "labels.nii.gz", flat=True)


def as_nnunet_writes(array: NDArray[Any], like: Path, path: Path) -> Path:
    """The steps of nnU-Net's SimpleITKIO: what ITK read of the image, given to the label map."""
    image = sitk.ReadImage(str(like))
    labels = sitk.GetImageFromArray(array)
    labels.SetSpacing(image.GetSpacing())
    labels.SetOrigin(image.GetOrigin())
    labels.SetDirection(image.GetDirection())
    sitk.WriteImage(labels, str(path), True)
    return path


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_label_map_on_the_grid_of_another_file_is_the_file_that_nnunet_writes(tmp_path: Path, ending: str) -> None:
    """Spacings and directions that no affine gives back to the last bit."""
    image = sitk.GetImageFromArray(np.zeros((3, 4, 5), dtype=np.float32))
    image.SetSpacing((0.7, 0.1 + 0.2, 1 / 3))
    image.SetOrigin((-12.3, 4.56, 789.1))
    image.SetDirection(oblique().direction.ravel().tolist())
    like = tmp_path / f"image{ending}"
    sitk.WriteImage(image, str(like))
    array = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    labels = LabelMap(array=array, geometry=read_geometry(like))
    write_labels_like(labels, like, tmp_path / f"labels{ending}")
    wanted = as_nnunet_writes(array.astype(np.uint8), like, tmp_path / f"wanted{ending}")
    assert (tmp_path / f"labels{ending}").read_bytes() == wanted.read_bytes()


def test_labels_like_a_flat_file_are_flat_and_255_takes_two_bytes(tmp_path: Path) -> None:
    like = write_image(tmp_path / "image.nii.gz", np.zeros((4, 5), dtype=np.float32), (0.5, 0.75))
    geometry = read_geometry(like)
    assert geometry.shape == (1, 4, 5)
    write_labels_like(LabelMap(array=np.full((1, 4, 5), 255), geometry=geometry), like, tmp_path / "labels.nii.gz")
    back = sitk.ReadImage(str(tmp_path / "labels.nii.gz"))
    assert (back.GetDimension(), back.GetSpacing(), back.GetPixelID()) == (2, (0.5, 0.75), sitk.sitkUInt16)
