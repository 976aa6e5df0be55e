"""Series of phantoms in every orientation and order, real series against other readers, and files known to be bad."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from engine.volume import Volume
from gateway.errors import Rejected
from gateway.results.attributes import AttributeRejected
from gateway.results.series import SeriesPart, decode, read_series, rescale_values
from tests.support.phantoms import (
    BLOB_VALUES,
    CENTRE_MM,
    LEFT,
    RIGHT,
    InstanceNumbers,
    Order,
    Orientation,
    asymmetric_labels,
    world_positions_mm,
    write_series,
)

ORIENTATIONS: tuple[Orientation, ...] = (
    "axial",
    "axial-prone",
    "axial-mirrored",
    "sagittal",
    "coronal",
    "oblique",
    "double-oblique",
)
# Isotropic and cubic, so that every orientation shows the same part of the same content.
CUBE = {"spacing_mm": (2.0, 2.0, 2.0), "shape": (20, 20, 20)}


def only(parts: Sequence[SeriesPart]) -> tuple[SeriesPart, Volume]:
    (part,) = parts
    assert part.volume is not None
    return part, part.volume


def blob_centre_mm(volume: Volume, name: str) -> NDArray[np.float64]:
    """Centre of gravity, in patient coordinates, of the structure with this brightness."""
    brightness = {"left": (290, 480), "right": (590, 780), "anterior": (890, 1080), "superior": (1190, 1400)}[name]
    assert brightness[0] < BLOB_VALUES[name] < brightness[1]
    inside = (volume.array[0] > brightness[0]) & (volume.array[0] < brightness[1])
    assert inside.sum() > 10
    positions = world_positions_mm(volume.geometry.affine_lps, volume.geometry.shape)
    return np.asarray(positions[inside].mean(axis=0) - CENTRE_MM)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("order", "instance_numbers"),
    [("ascending", "with"), ("reversed", "with"), ("shuffled", "against"), ("shuffled", "absent")],
)
@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
def test_the_same_patient_in_every_orientation_and_order(
    tmp_path: Path, orientation: Orientation, order: Order, instance_numbers: InstanceNumbers
) -> None:
    series = write_series(tmp_path, orientation=orientation, order=order, instance_numbers=instance_numbers, **CUBE)  # type: ignore[arg-type]
    part, volume = only(read_series(series.files))

    np.testing.assert_array_equal(volume.array[0], series.array)
    np.testing.assert_allclose(volume.geometry.affine_lps, series.affine_lps, atol=1e-6)
    assert [f.sop_instance_uid for f in part.frames] == [ds.SOPInstanceUID for ds in series.datasets]
    left, right = blob_centre_mm(volume, "left"), blob_centre_mm(volume, "right")
    assert left[0] > 5 > -5 > right[0]  # LPS: x grows to the patient's left
    assert blob_centre_mm(volume, "anterior")[1] < -8
    assert blob_centre_mm(volume, "superior")[2] > 8
    np.testing.assert_allclose(left, [9.0, 1.0, 0.0], atol=0.6)
    np.testing.assert_allclose(right, [-10.0, 1.0, 0.0], atol=0.8)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_model_order_brings_every_orientation_to_the_same_side(tmp_path: Path, orientation: Orientation) -> None:
    series = write_series(tmp_path, orientation=orientation, order="shuffled", **CUBE)  # type: ignore[arg-type]
    _, volume = only(read_series(series.files))
    reoriented, _ = volume.reoriented("LPS")
    labels = asymmetric_labels(reoriented.geometry.affine_lps, reoriented.geometry.shape)

    # In LPS order x grows to the left: the left structure has the larger x indices.
    x = {value: np.nonzero(labels == value)[2].mean() for value in (LEFT, RIGHT)}
    assert x[LEFT] > 11 > 8 > x[RIGHT]
    bright = {"left": (290, 480), "right": (590, 780)}
    for value, name in ((LEFT, "left"), (RIGHT, "right")):
        low, high = bright[name]
        image = reoriented.array[0][labels == value]
        assert np.mean((image > low) & (image < high)) > 0.9


@pytest.mark.parametrize("orientation", ["axial", "sagittal", "double-oblique"])
@pytest.mark.parametrize("tilt_deg", [-18.0, 12.5])
@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
def test_tilted_slices_lie_exactly_where_they_were_taken(
    tmp_path: Path, orientation: Orientation, tilt_deg: float
) -> None:
    series = write_series(tmp_path, orientation=orientation, tilt_deg=tilt_deg, order="shuffled", **CUBE)  # type: ignore[arg-type]
    part, volume = only(read_series(series.files))

    np.testing.assert_array_equal(volume.array[0], series.array)
    np.testing.assert_allclose(volume.geometry.affine_lps, series.affine_lps, atol=1e-6)
    np.testing.assert_allclose(blob_centre_mm(volume, "left"), [9.0, 1.0, 0.0], atol=0.8)
    assert part.tilt_deg == pytest.approx(abs(tilt_deg), abs=1e-4)


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("rescale", ["shared", "per-slice", "none"])
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
def test_enhanced_and_classic_objects_give_the_same_volume(
    tmp_path: Path, modality: str, rescale: str, order: str
) -> None:
    same = {"modality": modality, "rescale": rescale, "order": order, "orientation": "double-oblique"}
    classic = write_series(tmp_path / "classic", **same)  # type: ignore[arg-type]
    enhanced = write_series(tmp_path / "enhanced", enhanced=True, **same)  # type: ignore[arg-type]
    _, one = only(read_series(classic.files))
    part, other = only(read_series(enhanced.files))

    np.testing.assert_array_equal(one.array, other.array)
    np.testing.assert_allclose(one.geometry.affine_lps, other.geometry.affine_lps, atol=1e-9)
    assert part.enhanced
    assert len(part.headers) == 1
    for z, frame in enumerate(part.frames):
        assert frame.frame_number is not None
        assert enhanced.frame_order[frame.frame_number - 1] == z


def test_single_slice_of_either_kind(tmp_path: Path) -> None:
    for enhanced in (False, True):
        series = write_series(tmp_path / str(enhanced), single_slice=True, orientation="sagittal", enhanced=enhanced)
        _, volume = only(read_series(series.files))
        np.testing.assert_array_equal(volume.array[0], series.array)
        np.testing.assert_allclose(volume.geometry.affine_lps, series.affine_lps, atol=1e-6)


def test_headers_first_then_the_voxels_of_one_part(tmp_path: Path) -> None:
    series = write_series(tmp_path)
    (part,) = read_series(series.files, only_headers=True)

    assert part.volume is None
    assert all("PixelData" not in header for header in part.headers)
    decoded = decode(part)
    assert decoded.volume is not None
    np.testing.assert_array_equal(decoded.volume.array[0], series.array)
    assert decoded.frames == part.frames


def files_of(folder: Path, pattern: str = "*") -> list[Path]:
    files = sorted(f for f in folder.rglob(pattern) if f.is_file())
    assert files, folder
    return files


def by_gdcm(files: Sequence[Path]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Voxels (Z, Y, X) and affine (LPS) by SimpleITK's series reader, slices in the order of this reader's own sort."""
    names = {str(f.resolve()) for f in files}
    folder = str(files[0].parent)
    sorted_names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder)
    image = sitk.ReadImage([n for n in sorted_names if str(Path(n).resolve()) in names])
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).astype(np.float64), affine


@pytest.mark.parametrize(
    "folder",
    [
        "ct-organs/series",
        "ct-torso/series",
        "mr-hippocampus/study3/11_HCropVolume",
        "mr-hippocampus/study3/37830-T2reg-78532",
        "mr-hippocampus/study1/13_HCropVolume",
        "dcm4che/etc/testdata/dicom",
        "pet-ct-mr-sts-002/CT",
        "pet-ct-mr-sts-002/MR_T1",
        "pet-ct-mr-sts-002/PET",
    ],
)
@pytest.mark.peer("shared-data")
def test_real_series_agree_with_gdcm(shared_data: Path, folder: str) -> None:
    images = [f for f in files_of(shared_data / "dicom" / folder) if f.name != "RS.dcm" and f.suffix != ".gz"]
    images = [
        f for f in images if dcmread(f, specific_tags=["Modality"], stop_before_pixels=True).Modality != "RTSTRUCT"
    ]
    _, volume = only(read_series(images))
    array, affine = by_gdcm(images)

    assert volume.array.shape[1:] == array.shape
    np.testing.assert_allclose(volume.array[0], array, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(volume.geometry.affine_lps, affine, atol=2e-3)


def read_nifti(file: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(Z, Y, X) in stored order and the affine in LPS of a NIfTI-1 file whose sform is set."""
    data = gzip.decompress(file.read_bytes())
    dims = struct.unpack("<8h", data[40:56])
    (datatype,) = struct.unpack("<h", data[70:72])
    (offset,) = struct.unpack("<f", data[108:112])
    slope, intercept = struct.unpack("<2f", data[112:120])
    (sform_code,) = struct.unpack("<h", data[254:256])
    assert sform_code > 0
    ras = np.vstack([np.frombuffer(data, "<f4", 12, 280).reshape(3, 4), [0, 0, 0, 1]])
    dtype = {2: "<u1", 4: "<i2", 8: "<i4", 16: "<f4", 64: "<f8", 512: "<u2"}[datatype]
    x, y, z = dims[1:4]
    values = np.frombuffer(data, dtype, x * y * z, int(offset)).reshape(z, y, x).astype(np.float64)
    if slope not in (0.0, 1.0) or intercept != 0.0:
        values = values * (slope or 1.0) + intercept
    return values, np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras


@pytest.mark.parametrize(
    ("series", "nifti"),
    [
        ("mr-hippocampus/study3/11_HCropVolume", "hippocrop_study3_0000.nii.gz"),
        ("mr-hippocampus/study1/13_HCropVolume", "hippocrop_study1_0000.nii.gz"),
    ],
)
@pytest.mark.peer("shared-data")
def test_voxel_order_is_that_of_the_reference_inputs(shared_root: Path, series: str, nifti: str) -> None:
    _, volume = only(read_series(files_of(shared_root / "data" / "dicom" / series)))
    values, affine = read_nifti(shared_root / "reference" / "inputs" / nifti)

    np.testing.assert_allclose(volume.array[0], values, rtol=1e-6)
    np.testing.assert_allclose(volume.geometry.affine_lps, affine, atol=1e-4)


@pytest.mark.peer("shared-data")
def test_coronal_slices_run_to_the_back_as_their_normal_does(shared_data: Path) -> None:
    part, volume = only(read_series(files_of(shared_data / "dicom/dcm4che/etc/testdata/dicom")))

    assert volume.geometry.shape == (16, 256, 256)
    assert volume.geometry.orientation == "LIP"
    depths = [frame.position_mm[1] for frame in part.frames]
    assert all(a < b for a, b in pairwise(depths))


@pytest.mark.parametrize(
    "name", ["transfer-syntaxes/CT0012.fragmented_no_bot_jpeg_baseline.51.dcm", "pydicom-data/eCT_Supplemental.dcm"]
)
@pytest.mark.peer("shared-data")
def test_real_enhanced_objects_are_read(shared_data: Path, name: str) -> None:
    file = shared_data / "dicom" / name
    part, volume = only(read_series([file]))
    header = dcmread(file, stop_before_pixels=True)

    assert volume.geometry.shape == (2, 512, 512)
    assert part.headers[0].SOPInstanceUID == header.SOPInstanceUID
    for frame in part.frames:
        assert frame.frame_number is not None
        group = header.PerFrameFunctionalGroupsSequence[frame.frame_number - 1]
        stated = [float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient]
        np.testing.assert_allclose(frame.position_mm, stated)


SYNTAXES = "dicom/transfer-syntaxes"


@pytest.mark.requirement("REC-06")
@pytest.mark.peer("shared-data")
def test_lossless_transfer_syntaxes_agree_and_lossy_ones_are_close(shared_data: Path) -> None:
    volumes: dict[str, Volume] = {}
    lossy: dict[str, Volume] = {}
    for file in files_of(shared_data / SYNTAXES, "CTImage.dcm_*.dcm"):
        if file.stem.endswith((".53", ".55")):
            continue
        part, volume = only(read_series([file]))
        (lossy if part.finding("lossy-compression") else volumes)[file.name] = volume
    assert len(volumes) == 9
    assert len(lossy) == 4
    reference = next(v for name, v in volumes.items() if "LittleEndianExplicit" in name)
    for name, volume in volumes.items():
        np.testing.assert_array_equal(volume.array, reference.array, err_msg=name)
    for name, volume in lossy.items():
        error = np.abs(volume.array - reference.array)
        assert np.percentile(error, 95) < 60, name
        assert np.corrcoef(volume.array.ravel(), reference.array.ravel())[0, 1] > 0.999, name


BAD = [
    ("pydicom/test_files/MR_truncated.dcm", "PixelData"),
    ("pydicom/test_files/badVR.dcm", "NumberOfFrames"),
    ("pydicom/test_files/no_meta.dcm", "FileMetaInformationVersion"),
    ("pydicom/test_files/ExplVR_LitEndNoMeta.dcm", "FileMetaInformationVersion"),
    ("pydicom/test_files/ExplVR_BigEndNoMeta.dcm", "FileMetaInformationVersion"),
    ("pydicom/test_files/meta_missing_tsyntax.dcm", "TransferSyntaxUID"),
    ("pydicom-data/liver_rle.dcm", "BitsAllocated"),
    ("pydicom-data/liver_nonbyte_aligned_rle.dcm", "BitsAllocated"),
    ("pydicom-data/liver_deflate.dcm", "TransferSyntaxUID"),
    ("pydicom-data/liver_nonbyte_aligned_deflate.dcm", "TransferSyntaxUID"),
    ("pydicom-data/emri_small_jpeg_2k_lossless_too_short.dcm", "PerFrameFunctionalGroupsSequence"),
    ("pydicom-data/bad_sequence.dcm", "SOPInstanceUID"),
    ("pydicom-data/parametric_map_float.dcm", "PixelRepresentation"),
    ("pydicom/test_files/rtdose.dcm", "PerFrameFunctionalGroupsSequence"),
    ("pydicom/test_files/SC_rgb_rle.dcm", "SamplesPerPixel"),
    ("pydicom/test_files/JPEG2000.dcm", "ImagePositionPatient"),
    ("transfer-syntaxes/CTImage.dcm_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm", "TransferSyntaxUID"),
    ("transfer-syntaxes/CTImage.dcm_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm", "TransferSyntaxUID"),
    ("transfer-syntaxes/no-pixel-data.dcm", "Rows"),
    ("transfer-syntaxes/no-pixel-spacing.dcm", "PhotometricInterpretation"),
]


@pytest.mark.parametrize(("name", "keyword"), BAD, ids=[name.rsplit("/", 1)[1] for name, _ in BAD])
@pytest.mark.peer("shared-data")
def test_files_known_to_be_bad_are_refused_by_attribute(shared_data: Path, name: str, keyword: str) -> None:
    with pytest.raises(AttributeRejected) as caught:
        read_series([shared_data / "dicom" / name])

    assert caught.value.keyword == keyword
    assert Path(name).name in str(caught.value)


@pytest.mark.peer("shared-data")
def test_blank_uids_are_refused(shared_data: Path) -> None:
    with pytest.raises(AttributeRejected, match=r"SOPInstanceUID \(0008,0018\) is absent or empty"):
        read_series(files_of(shared_data / "dicom/ct-organs/series-with-blank-uids"))


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
# pydicom warns of one sample with wrong value representations; what counts is that it is read or refused.
@pytest.mark.filterwarnings("ignore:Expected explicit VR:UserWarning")
@pytest.mark.peer("shared-data")
def test_no_file_of_the_collection_raises_anything_but_a_refusal(shared_data: Path) -> None:
    read = refused = 0
    for folder in ("pydicom", "pydicom-data", "transfer-syntaxes", "foreign-results"):
        for file in files_of(shared_data / "dicom" / folder):
            if "TINY_ALPHA" in file.parts:
                continue
            try:
                read += len(read_series([file]))
            except Rejected:
                refused += 1
    assert read > 50
    assert refused > 80


@pytest.mark.parametrize("transfer_syntax", [ExplicitVRLittleEndian, JPEG2000Lossless])
@pytest.mark.parametrize(("signed", "bits_stored"), [(False, 12), (False, 16), (True, 12), (True, 16)])
def test_voxels_are_those_of_the_itk_series_reader(
    tmp_path: Path, transfer_syntax: str, signed: bool, bits_stored: int
) -> None:
    """For one rescale of all slices: ITK gives every slice the type of the first and so cuts off fractions."""
    series = write_series(
        tmp_path, shape=(6, 40, 36), transfer_syntax=transfer_syntax, signed=signed, bits_stored=bits_stored
    )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    _, volume = only(read_series(series.files))
    np.testing.assert_array_equal(volume.array[0], sitk.GetArrayFromImage(reader.Execute()))


@pytest.mark.parametrize("slope", [1.0, 2.0, -3.0, 255.0, 256.0, 0.5, 1.1, 1e6])
@pytest.mark.parametrize("intercept", [0.0, -1024.0, 65535.0, 0.25, -1e9])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int8])
def test_rescaling_rounds_once_whatever_the_numbers(slope: float, intercept: float, dtype: type) -> None:
    kind = np.iinfo(dtype)
    values: NDArray[Any] = np.linspace(kind.min, kind.max, 997).astype(dtype)
    found = np.empty(values.shape, dtype=np.float32)
    rescale_values(values, slope, intercept, found)
    assert np.array_equal(found, (values.astype(np.float64) * slope + intercept).astype(np.float32))
