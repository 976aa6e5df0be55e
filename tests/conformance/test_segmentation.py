"""Segmentations as others see them: dciodvfy judges the object, dcmqi and highdicom read it voxel by voxel."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from highdicom.seg import Segmentation
from numpy.typing import NDArray

from engine.nifti import read_label_map
from gateway.errors import Rejected
from gateway.results.content import EncodedObject, Encoding, ObjectReference, ResultContent, Superseded
from gateway.results.segmentation import LABEL_MAP_STORAGE, encode_segmentation, segmentation_reference
from gateway.results.series import SeriesPart
from tests.support.phantoms import LEFT, RIGHT, write_series
from tests.support.result_contents import MODEL, content_of, later, part_of
from tests.support.result_readers import iod_errors, on_source_grid, patient_masks, shown_name

STRAIGHT: dict[str, dict[str, Any]] = {
    "axial": {},
    "axial-prone": {"orientation": "axial-prone"},
    "axial-mirrored": {"orientation": "axial-mirrored", "modality": "MR"},
    "sagittal": {"orientation": "sagittal", "modality": "MR"},
    "coronal": {"orientation": "coronal"},
    "oblique": {"orientation": "oblique", "modality": "MR"},
    "double-oblique": {"orientation": "double-oblique"},
    "reversed": {"order": "reversed", "instance_numbers": "against"},
    "single-slice": {"single_slice": True},
    "enhanced-ct": {"enhanced": True, "order": "shuffled"},
    "enhanced-mr-sagittal": {"enhanced": True, "modality": "MR", "orientation": "sagittal", "order": "reversed"},
}
TILTED: dict[str, Any] = {"tilt_deg": 15.0}
ENCODINGS: tuple[Encoding, ...] = ("BINARY", "LABELMAP")

# What dciodvfy of 2022 says about every label map, the SOP class being newer.
KNOWN_OF_LABEL_MAPS = (
    "Error - Information Object Not found",
    "Error - SegmentNumber not monotonically increasing from one by one - have SegmentSequence item number 1 "
    "(from one) with SegmentNumber of 0",
)


def written(made: EncodedObject, folder: Path) -> Path:
    path = folder / f"{made.encoding}.dcm"
    path.write_bytes(made.data)
    return path


def phantom(folder: Path, recipe: dict[str, Any]) -> tuple[SeriesPart, NDArray[np.uint8], ResultContent]:
    series = write_series(folder / "source", **recipe)
    part = part_of(series.files)
    return part, series.labels, content_of(part, series.labels)


def read(made: EncodedObject) -> Segmentation:
    return Segmentation.from_dataset(pydicom.dcmread(BytesIO(made.data)), copy=False)


@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
@pytest.mark.peer("dciodvfy")
@pytest.mark.parametrize("recipe", [*STRAIGHT.values(), TILTED], ids=[*STRAIGHT, "tilted"])
def test_dciodvfy_finds_no_error(tmp_path: Path, recipe: dict[str, Any]) -> None:
    _, _, content = phantom(tmp_path, recipe)
    assert iod_errors(written(encode_segmentation(content), tmp_path)) == []
    label_map = written(encode_segmentation(content, encoding="LABELMAP"), tmp_path)
    assert [line for line in iod_errors(label_map) if line not in KNOWN_OF_LABEL_MAPS] == []


@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
@pytest.mark.peer("dcmqi")
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("recipe", STRAIGHT.values(), ids=STRAIGHT)
def test_dcmqi_reads_every_voxel_where_it_was_put(tmp_path: Path, recipe: dict[str, Any], encoding: Encoding) -> None:
    """Its volume starts at the first frame with foreground and may run the other way: placed by its affine."""
    part, labels, content = phantom(tmp_path, recipe)
    masks = patient_masks(written(encode_segmentation(content, encoding=encoding), tmp_path), tmp_path / "dcmqi")
    assert set(masks) == {LEFT, RIGHT}
    for number, (mask, affine) in masks.items():
        assert np.array_equal(on_source_grid(mask, affine, part.geometry), labels == number)


@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("recipe", [*STRAIGHT.values(), TILTED], ids=[*STRAIGHT, "tilted"])
def test_highdicom_reads_every_frame_at_its_source_frame(
    tmp_path: Path, recipe: dict[str, Any], encoding: Encoding
) -> None:
    part, labels, content = phantom(tmp_path, recipe)
    made = read(encode_segmentation(content, encoding=encoding))
    if part.enhanced:
        decoded = made.get_pixels_by_source_frame(
            source_sop_instance_uid=part.frames[0].sop_instance_uid,
            source_frame_numbers=[f.frame_number for f in part.frames if f.frame_number is not None],
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )
    else:
        decoded = made.get_pixels_by_source_instance(
            source_sop_instance_uids=[f.sop_instance_uid for f in part.frames],
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )
    assert np.array_equal(decoded, labels)


@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
@pytest.mark.parametrize("recipe", [*STRAIGHT.values(), TILTED], ids=[*STRAIGHT, "tilted"])
def test_each_frame_has_the_position_of_its_source_slice(tmp_path: Path, recipe: dict[str, Any]) -> None:
    part, _, content = phantom(tmp_path, recipe)
    dataset = pydicom.dcmread(BytesIO(encode_segmentation(content).data))
    places = {(f.sop_instance_uid, f.frame_number): f.position_mm for f in part.frames}
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        key = (source.ReferencedSOPInstanceUID, source.get("ReferencedFrameNumber"))
        position = [float(v) for v in frame.PlanePositionSequence[0].ImagePositionPatient]
        assert position == pytest.approx(places[key], abs=1e-9)


@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
@pytest.mark.peer("dcmqi")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dcmqi_reads_the_pixels_of_a_tilted_stack(tmp_path: Path, encoding: Encoding) -> None:
    """ITK images have orthogonal axes, so dcmqi drops the tilt: slices are compared by height along the normal and
    by row and column; where they lie is proven frame by frame above."""
    part, labels, content = phantom(tmp_path, TILTED)
    affine = part.geometry.affine_lps
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    for number, (mask, placed) in patient_masks(
        written(encode_segmentation(content, encoding=encoding), tmp_path), tmp_path / "dcmqi"
    ).items():
        rebuilt = np.zeros_like(labels, dtype=np.bool_)
        for index in range(mask.shape[0]):
            height = (placed @ [0, 0, index, 1])[:3] @ normal
            z = int(np.argmin([abs(np.array(f.position_mm) @ normal - height) for f in part.frames]))
            rebuilt[z] = mask[index]
        assert np.array_equal(rebuilt, labels == number)


@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
@pytest.mark.peer("dcmqi")
@pytest.mark.parametrize("orientation", ["axial", "axial-prone", "sagittal", "coronal", "double-oblique"])
def test_left_is_left(tmp_path: Path, orientation: str) -> None:
    """The left structure lies at larger x (LPS) than the right one, and each carries its side's code."""
    _, _, content = phantom(tmp_path, {"orientation": orientation})
    path = written(encode_segmentation(content), tmp_path)
    centres = {}
    for number, (mask, affine) in patient_masks(path, tmp_path / "dcmqi").items():
        z, y, x = np.nonzero(mask)
        centres[number] = float((affine @ [x.mean(), y.mean(), z.mean(), 1.0])[0])
    assert centres[LEFT] > 4.0 > centres[RIGHT]  # 4 mm: the phantom's middle
    sides = {}
    for item in pydicom.dcmread(path).SegmentSequence:
        (modifier,) = item.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
        sides[item.SegmentNumber] = (modifier.CodeValue, modifier.CodingSchemeDesignator, modifier.CodeMeaning)
    assert sides == {LEFT: ("7771000", "SCT", "Left"), RIGHT: ("24028007", "SCT", "Right")}


@pytest.mark.requirement("QUE-27")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_same_content_makes_the_same_bytes(tmp_path: Path, encoding: Encoding) -> None:
    series = write_series(tmp_path / "source", modality="MR")
    first = encode_segmentation(content_of(part_of(series.files), series.labels), encoding=encoding)
    second = encode_segmentation(content_of(part_of(series.files), series.labels), encoding=encoding)
    assert first.data == second.data
    assert (
        first.sop_instance_uid
        == segmentation_reference(content_of(part_of(series.files), series.labels), encoding=encoding).sop_instance_uid
    )


@pytest.mark.requirement("OUT-41", open="SEMIAUTOMATIC and MANUAL after an edit")
def test_provenance_is_complete(tmp_path: Path) -> None:
    part, _, content = phantom(tmp_path, {})
    dataset = pydicom.dcmread(BytesIO(encode_segmentation(content).data))
    assert dataset.SeriesDescription == "asymmetric-phantom: 1 asymmetric phantom AI, not reviewed"
    assert (dataset.SeriesNumber, dataset.InstanceNumber) == (9010, 1)
    assert dataset.SeriesInstanceUID != part.series_instance_uid
    assert (dataset.StudyInstanceUID, dataset.AccessionNumber) == (part.study_instance_uid, "ACC0001")
    assert (dataset.PatientID, dataset.PatientBirthDate, dataset.StudyDate) == ("PH-0001", "19700101", "20240105")
    assert dataset.FrameOfReferenceUID == part.frame_of_reference_uid
    (series,) = dataset.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == part.series_instance_uid
    sources = {f.sop_instance_uid for f in part.frames}
    assert {i.ReferencedSOPInstanceUID for i in series.ReferencedInstanceSequence} == sources
    acquisition, processing = dataset.ContributingEquipmentSequence
    assert acquisition.Manufacturer == "Phantom Works"
    assert (processing.Manufacturer, processing.ManufacturerModelName) == ("seggate", MODEL.name)
    assert list(processing.SoftwareVersions) == ["1.2.0", "0.1.0"]
    for item, segment in zip(dataset.SegmentSequence, content.segments, strict=True):
        (algorithm,) = item.SegmentationAlgorithmIdentificationSequence
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (MODEL.name, MODEL.version)
        assert MODEL.weights_digest in algorithm.AlgorithmParameters
        assert item.TrackingUID == content.tracking_uid(segment)
        assert len(item.RecommendedDisplayCIELabValue) == 3


def test_wording_survives_a_long_model_name(tmp_path: Path) -> None:
    _, _, content = phantom(tmp_path, {})
    long_name = replace(content.identity, model=replace(MODEL, name="m" * 64))
    dataset = pydicom.dcmread(BytesIO(encode_segmentation(later(content, identity=long_name)).data))
    assert len(dataset.SeriesDescription) <= 64
    assert dataset.SeriesDescription.endswith("AI, not reviewed")


@pytest.mark.peer("dcmqi", "dciodvfy")
def test_overlapping_regions_keep_every_voxel_in_binary(tmp_path: Path) -> None:
    """A region model: segment 1 is everything, segment 2 its core."""
    part, labels, _ = phantom(tmp_path, {})
    content = content_of(part, labels, regions=((LEFT, RIGHT), (RIGHT,)))
    path = written(encode_segmentation(content), tmp_path)
    assert iod_errors(path) == []
    placed = {
        number: on_source_grid(mask, affine, part.geometry)
        for number, (mask, affine) in patient_masks(path, tmp_path / "dcmqi").items()
    }
    assert np.array_equal(placed[1], labels > 0)
    assert np.array_equal(placed[2], labels == RIGHT)
    with pytest.raises(Rejected, match="overlap"):
        encode_segmentation(content, encoding="LABELMAP")


@pytest.mark.peer("dciodvfy")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_result_without_any_voxel_is_a_small_valid_object(tmp_path: Path, encoding: Encoding) -> None:
    part, labels, _ = phantom(tmp_path, {})
    made = encode_segmentation(content_of(part, np.zeros_like(labels)), encoding=encoding)
    errors = [line for line in iod_errors(written(made, tmp_path)) if line not in KNOWN_OF_LABEL_MAPS]
    assert errors == []
    decoded = read(made)
    assert [n for n in decoded.segment_numbers if n] == [LEFT, RIGHT]
    assert decoded.NumberOfFrames <= 2
    assert not decoded.pixel_array.any()
    assert len(decoded.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == len(part.frames)


@pytest.mark.peer("dciodvfy", "dcmqi")
def test_a_segment_without_voxels_is_described_and_has_no_frame(tmp_path: Path) -> None:
    part, labels, _ = phantom(tmp_path, {})
    only_left = np.where(labels == LEFT, labels, 0).astype(np.uint8)
    path = written(encode_segmentation(content_of(part, only_left)), tmp_path)
    assert iod_errors(path) == []
    dataset = pydicom.dcmread(path)
    assert [item.SegmentNumber for item in dataset.SegmentSequence] == [LEFT, RIGHT]
    framed = {
        f.SegmentIdentificationSequence[0].ReferencedSegmentNumber for f in dataset.PerFrameFunctionalGroupsSequence
    }
    assert framed == {LEFT}
    assert set(patient_masks(path, tmp_path / "dcmqi")) == {LEFT}


@pytest.mark.peer("dciodvfy")
def test_a_new_version_names_the_one_it_replaces(tmp_path: Path) -> None:
    part, labels, _ = phantom(tmp_path, {})
    old = ObjectReference(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4", sop_instance_uid="2.25.77", series_instance_uid="2.25.78"
    )
    made = encode_segmentation(content_of(part, labels, supersedes=Superseded(image=old)))
    assert iod_errors(written(made, tmp_path)) == []
    dataset = pydicom.dcmread(BytesIO(made.data))
    assert dataset.ReferencedImageSequence[0].ReferencedSOPInstanceUID == "2.25.77"
    assert "2.25.77" in dataset.DerivationDescription


def test_only_label_maps_use_the_new_sop_class(tmp_path: Path) -> None:
    _, _, content = phantom(tmp_path, {})
    binary, label_map = (encode_segmentation(content, encoding=e) for e in ENCODINGS)
    assert label_map.sop_class_uid == LABEL_MAP_STORAGE
    assert binary.sop_instance_uid != label_map.sop_instance_uid
    assert binary.transfer_syntax_uid == "1.2.840.10008.1.2.1"
    assert label_map.transfer_syntax_uid == "1.2.840.10008.1.2.5"


@pytest.mark.requirement("OUT-39")
@pytest.mark.peer("dciodvfy", "dcmqi", "shared-data")
@pytest.mark.parametrize("study", ["study1", "study3"])
def test_a_real_series_with_incomplete_headers_gets_its_segmentation(
    tmp_path: Path, shared_data: Path, study: str
) -> None:
    """HippoCrop: no SeriesNumber, body part, manufacturer, birth date or sex."""
    part = part_of(hippocampus_crop(shared_data / "dicom" / "mr-hippocampus" / study))
    labels = np.zeros(part.geometry.shape, dtype=np.uint8)
    z, y, x = (n // 3 for n in labels.shape)
    labels[z : 2 * z, y : 2 * y, x : 2 * x] = LEFT
    labels[z : 2 * z, y : y + 3, x : x + 2] = RIGHT
    made = encode_segmentation(content_of(part, labels))
    assert {r.attribute: r.action for r in made.repairs}["PatientBirthDate"] == "emptied"
    path = written(made, tmp_path)
    assert iod_errors(path) == []
    for number, (mask, affine) in patient_masks(path, tmp_path / "dcmqi").items():
        assert np.array_equal(on_source_grid(mask, affine, part.geometry), labels == number)


def hippocampus_crop(study: Path) -> list[Path]:
    return [
        f
        for f in sorted(study.rglob("*.dcm"))
        if "Crop" in str(pydicom.dcmread(f, stop_before_pixels=True).get("SeriesDescription", ""))
    ]


@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
@pytest.mark.peer("dciodvfy", "dcmqi", "shared-data")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_thirty_one_organs_of_a_real_ct(tmp_path: Path, shared_data: Path, encoding: Encoding) -> None:
    folder = shared_data / "dicom" / "ct-organs"
    part = part_of([f for f in sorted(folder.rglob("*.dcm")) if "blank" not in str(f)])
    label_map = read_label_map(folder / "labels.nii.gz")
    labels = label_map.array
    to_source = np.linalg.inv(part.geometry.affine_lps) @ label_map.geometry.affine_lps
    values = [int(v) for v in np.unique(labels[labels > 0])]
    z, y, x = np.nonzero(labels)
    source = np.rint(to_source @ np.stack([x, y, z, np.ones_like(x)])).astype(int)
    on_grid = np.zeros(part.geometry.shape, dtype=np.uint8)
    on_grid[source[2], source[1], source[0]] = labels[z, y, x]
    content = content_of(part, on_grid, regions=[(v,) for v in values])
    path = written(encode_segmentation(content, encoding=encoding), tmp_path)
    assert [line for line in iod_errors(path) if line not in KNOWN_OF_LABEL_MAPS] == []
    masks = patient_masks(path, tmp_path / "dcmqi")
    assert len(masks) == len(values) > 25
    for number, (mask, affine) in masks.items():
        placed = on_source_grid(mask, affine, part.geometry)
        assert np.array_equal(placed, on_grid == values[number - 1])


CHARACTER_SETS = {
    "chrArab": "قباني^لنزار",
    "chrFren": "Buc^Jérôme",
    "chrFrenMulti": "Buc^Jérôme",
    "chrGerm": "Äneas^Rüdiger",
    "chrGreek": "Διονυσιος",
    "chrH31": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "chrH32": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    "chrHbrw": "שרון^דבורה",
    "chrI2": "Hong^Gildong=洪^吉洞=홍^길동",
    "chrJapMulti": "やまだ^たろう",
    "chrJapMultiExplicitIR6": "やまだ^たろう",
    "chrKoreanMulti": "김희중",
    "chrRuss": "Люкceмбypг",  # noqa: RUF001 - Cyrillic and Latin mixed, as in the file
    "chrX1": "Wang^XiaoDong=王^小東",
    "chrX2": "Wang^XiaoDong=王^小东",
}


@pytest.mark.requirement("OUT-41", open="SEMIAUTOMATIC and MANUAL after an edit")
@pytest.mark.peer("dcmtk", "dciodvfy", "shared-data")
@pytest.mark.parametrize(("file", "name"), CHARACTER_SETS.items(), ids=CHARACTER_SETS)
def test_names_of_every_character_set_arrive(tmp_path: Path, shared_data: Path, file: str, name: str) -> None:
    """The name as a source with this Specific Character Set has it, read by DCMTK from the Segmentation."""
    _, _, content = phantom(tmp_path, {})
    source = pydicom.dcmread(shared_data / "dicom" / "pydicom" / "charset_files" / f"{file}.dcm")
    path = written(encode_segmentation(later(content, header=source)), tmp_path)
    assert shown_name(path) == name
    assert pydicom.dcmread(path).SpecificCharacterSet == "ISO_IR 192"
    assert iod_errors(path) == []
