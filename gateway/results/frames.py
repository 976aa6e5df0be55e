"""Reads the planes of one object: where each frame lies, how its values are scaled, what tells it from others.

Classic objects have one frame and its attributes at the top of the data set. Enhanced objects have functional groups
(PS3.3 C.7.6.16), looked up per frame first, then shared, then at the top. RealWorldValueMappingSequence is not
applied: the values a model sees are those of RescaleSlope and RescaleIntercept, as in images converted to NIfTI;
for the same reason PET values are not turned into SUV.
"""

from __future__ import annotations

import datetime
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from gateway.results import attributes
from gateway.results.attributes import READ_ERRORS, AttributeRejected, Where, damaged
from gateway.results.pixels import PixelFormat, check_length, number_of_frames, read_pixel_format
from gateway.results.plain_header import HEAD_BYTES, plain_header
from gateway.results.split_keys import SPLIT_KEYS
from storage.part10 import meta_text, read_meta_elements

MAX_INFLATED_BYTES = 1 << 30
"""A deflated object that grows beyond this is refused before it is parsed."""
_TRANSFER_SYNTAX_UID = 0x00020010
_OTHERWISE_ENCODED = (ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
_ORTHOGONALITY_TOLERANCE = 1e-2
# DA and TM joined, or DT, with an offset from UTC as DT may have one (PS3.5 6.2).
_DATE_TIME = re.compile(
    r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)(?P<hour>\d\d)(?P<minute>\d\d)?(?P<second>\d\d(\.\d{1,6})?)?"
    r"((?P<sign>[+-])(?P<offset_hour>\d\d)(?P<offset_minute>\d\d))?"
)
_NO_DATE = "00010101"


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceObject:
    """One file: its header without pixel data, and how its pixels are encoded. pixel_data_offset: of the element Pixel
    Data in the file, where there is one, as long as the data set is not deflated."""

    file: Path
    header: Dataset
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str
    modality: str
    pixel_format: PixelFormat
    pixel_data_offset: int

    @property
    def where(self) -> Where:
        """For messages."""
        return Where(file=self.file, sop_instance_uid=self.sop_instance_uid)


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One plane in the patient.

    frame_number counts from 1 and is None for classic objects. position_mm: centre of the first pixel (LPS).
    row_direction is the direction of growing column index, column_direction of growing row index, unit vectors.
    pixel_spacing_mm: (between rows, between columns). slice_thickness_mm and spacing_between_slices_mm: None when
    absent or not positive. values: the split keys that this frame has. acquired_s: when its acquisition began, in
    seconds since the start of year 1, or since midnight where the date is unknown; None without a time.
    """

    source: SourceObject
    frame_number: int | None
    position_mm: NDArray[np.float64]
    row_direction: NDArray[np.float64]
    column_direction: NDArray[np.float64]
    pixel_spacing_mm: tuple[float, float]
    slice_thickness_mm: float | None
    spacing_between_slices_mm: float | None
    rescale_slope: float
    rescale_intercept: float
    instance_number: int | None
    stack_id: str
    localizer: bool
    lossy: bool
    values: Mapping[str, str]
    acquired_s: float | None

    @property
    def identity(self) -> str:
        """SOP Instance UID, with the frame number for enhanced objects."""
        uid = self.source.sop_instance_uid
        return uid if self.frame_number is None else f"{uid} frame {self.frame_number}"


def read_object(file: Path) -> SourceObject:
    """Read the header of one DICOM file.

    Raises AttributeRejected (or FileNotFoundError, PermissionError) when it is no complete DICOM file, has no UIDs, is
    no image, or cannot be decoded.
    """
    where = Where(file=file)
    header, pixel_data_offset = _read(file, where, None)
    sop_instance_uid = attributes.required_uid(header, "SOPInstanceUID", where)
    where = Where(file=file, sop_instance_uid=sop_instance_uid)
    transfer_syntax_uid = attributes.required_uid(header.file_meta, "TransferSyntaxUID", where)
    uids = {
        keyword: attributes.required_uid(header, keyword, where)
        for keyword in ("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID")
    }
    pixel_format = read_pixel_format(header, transfer_syntax_uid, where)
    check_length(pixel_format, file, where)
    return SourceObject(
        file=file,
        header=header,
        sop_class_uid=uids["SOPClassUID"],
        sop_instance_uid=sop_instance_uid,
        study_instance_uid=uids["StudyInstanceUID"],
        series_instance_uid=uids["SeriesInstanceUID"],
        frame_of_reference_uid=attributes.uid(header, "FrameOfReferenceUID", where),
        modality=attributes.text(header, "Modality", where),
        pixel_format=pixel_format,
        pixel_data_offset=pixel_data_offset,
    )


def read_header(file: Path, where: Where, *, only: Sequence[str] | None = None) -> Dataset:
    """The data set without pixel data, or of it only these keywords. Raises AttributeRejected when it is no complete
    DICOM file (PS3.10) or cannot be parsed, OSError when the file cannot be read."""
    return _read(file, where, only)[0]


def _read(file: Path, where: Where, only: Sequence[str] | None) -> tuple[Dataset, int]:
    """The data set, and where in the file reading stopped."""
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
            if head[128:132] != b"DICM":
                advice = "send it as a DICOM file (PS3.10) with preamble and file meta information"
                raise attributes.absent("FileMetaInformationVersion", where, advice)
            elements, _ = read_meta_elements(BytesIO(head))
            transfer_syntax_uid = meta_text(elements, _TRANSFER_SYNTAX_UID)
            if not transfer_syntax_uid:
                advice = "the encoding of the data set is unknown; send the object with its transfer syntax"
                raise attributes.absent("TransferSyntaxUID", where, advice)
            if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
                _check_inflated_size(file, where)
            explicit = transfer_syntax_uid not in _OTHERWISE_ENCODED and UID(transfer_syntax_uid).is_transfer_syntax
            if only is None and explicit and (plain := plain_header(head)) is not None:
                return plain
            stream.seek(0)
            found = dcmread(stream, stop_before_pixels=True, specific_tags=None if only is None else list(only))
            return found, stream.tell()
    except READ_ERRORS as error:
        if not damaged(error):
            raise
        advice = "the object is damaged; send it again"
        raise AttributeRejected("FileMetaInformationVersion", "or the data set is unreadable", where, advice) from error


def _check_inflated_size(file: Path, where: Where) -> None:
    """Count, without keeping, what the deflated data set grows to."""
    data = file.read_bytes()
    # File Meta Information Group Length is the first element: 132 + 12 bytes, its value at 140 (PS3.10 7.1).
    start = 144 + int.from_bytes(data[140:144], "little")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    total, pending = 0, data[start:]
    while pending and not inflater.eof:
        total += len(inflater.decompress(pending, 1 << 22))
        pending = inflater.unconsumed_tail
        if total > MAX_INFLATED_BYTES:
            problem = f"is deflated and the data set grows beyond {MAX_INFLATED_BYTES} bytes"
            raise AttributeRejected("TransferSyntaxUID", problem, where, "send it in another transfer syntax")


def is_placed(source: SourceObject) -> bool:
    """Whether the object claims a position in the patient at all (a screen save or report page does not)."""
    header = source.header
    return any(
        keyword in header
        for keyword in ("ImagePositionPatient", "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
    )


def read_frames(source: SourceObject) -> tuple[Frame, ...]:
    """The frames of one object in stored order. Raises AttributeRejected naming what is missing or bad."""
    header, where = source.header, source.where
    count = number_of_frames(header, where)
    per_frame = attributes.items(header, "PerFrameFunctionalGroupsSequence", where)
    if not per_frame:
        if count > 1 or _is_enhanced(source):
            advice = "planes of a multi-frame object are read from its functional groups; send an enhanced object"
            raise attributes.absent("PerFrameFunctionalGroupsSequence", where, advice)
        return (_read_frame(source, (), None),)
    if len(per_frame) != count:
        problem = f"has {len(per_frame)} items for {count} frames"
        advice = "the object is damaged; send it again"
        raise AttributeRejected("PerFrameFunctionalGroupsSequence", problem, where, advice)
    shared = attributes.items(header, "SharedFunctionalGroupsSequence", where)[:1]
    return tuple(_read_frame(source, (groups, *shared), number) for number, groups in enumerate(per_frame, start=1))


def _is_enhanced(source: SourceObject) -> bool:
    return UID(source.sop_class_uid).name.startswith("Enhanced ")


def macro(groups: tuple[Dataset, ...], path: tuple[str, ...], where: Where) -> Dataset | None:
    """The data set at a path of sequences, in the first functional group that has it."""
    for group in groups:
        found: Dataset | None = group
        for keyword in path:
            inside = attributes.items(found, keyword, where) if found is not None else ()
            found = inside[0] if inside else None
        if found is not None:
            return found
    return None


def _level(source: SourceObject, groups: tuple[Dataset, ...], keyword: str, where: Where) -> Dataset:
    """Where a plane attribute is looked up: its macro for enhanced objects, the top of classic ones."""
    found = macro(groups, (keyword,), where) if groups else None
    return source.header if found is None else found


def _read_frame(source: SourceObject, groups: tuple[Dataset, ...], number: int | None) -> Frame:
    header, where = source.header, source.where
    plane_position = _level(source, groups, "PlanePositionSequence", where)
    plane_orientation = _level(source, groups, "PlaneOrientationSequence", where)
    measures = _level(source, groups, "PixelMeasuresSequence", where)
    position_mm = vector(plane_position, "ImagePositionPatient", 3, where)
    row, column = directions(plane_orientation, where)
    slope, intercept = _rescale(source, groups, where)
    values = {key: found for key in SPLIT_KEYS if (found := _split_value(key, header, groups, where))}
    image_type = (*attributes.texts(header, "ImageType", where), *values.get("ImageType", "").split("\\"))
    spacing_y, spacing_x = vector(measures, "PixelSpacing", 2, where)
    if min(spacing_y, spacing_x) <= 0:
        raise AttributeRejected("PixelSpacing", "is not positive", where, "correct it at the sender")
    content = macro(groups, ("FrameContentSequence",), where) if groups else None
    return Frame(
        source=source,
        frame_number=number,
        position_mm=position_mm,
        row_direction=row,
        column_direction=column,
        pixel_spacing_mm=(float(spacing_y), float(spacing_x)),
        slice_thickness_mm=_positive(measures, "SliceThickness", where),
        spacing_between_slices_mm=_positive(measures, "SpacingBetweenSlices", where),
        rescale_slope=slope,
        rescale_intercept=intercept,
        instance_number=_tolerant_integer(header, "InstanceNumber", where),
        stack_id=attributes.text(content, "StackID", where) if content is not None else "",
        localizer="LOCALIZER" in image_type,
        lossy=attributes.text(header, "LossyImageCompression", where) == "01",
        values=values,
        acquired_s=_acquired_s(header, content, where),
    )


def vector(ds: Dataset, keyword: str, length: int, where: Where) -> NDArray[np.float64]:
    """So many numbers that place a plane. Raises AttributeRejected."""
    found = attributes.numbers(ds, keyword, where)
    if not found:
        raise attributes.absent(keyword, where, "the slice cannot be placed in the patient; send the original image")
    if len(found) != length:
        problem = f"has {len(found)} values instead of {length}"
        raise AttributeRejected(keyword, problem, where, "correct it at the sender")
    if any(abs(v) > 1e6 for v in found):
        raise AttributeRejected(keyword, "is beyond one kilometre", where, "correct it at the sender")
    return np.array(found, dtype=np.float64)


def directions(ds: Dataset, where: Where) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row and column direction of ImageOrientationPatient, unit vectors. Raises AttributeRejected."""
    cosines = vector(ds, "ImageOrientationPatient", 6, where)
    row, column = cosines[:3], cosines[3:]
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    skew = abs(float(row @ column))
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), skew) > _ORTHOGONALITY_TOLERANCE:
        problem = "is not a pair of orthogonal unit vectors"
        raise AttributeRejected("ImageOrientationPatient", problem, where, "correct it at the sender")
    return row / lengths[0], column / lengths[1]


def _rescale(source: SourceObject, groups: tuple[Dataset, ...], where: Where) -> tuple[float, float]:
    level = _level(source, groups, "PixelValueTransformationSequence", where)
    slope = attributes.number(level, "RescaleSlope", where)
    intercept = attributes.number(level, "RescaleIntercept", where)
    if slope is None and attributes.items(source.header, "ModalityLUTSequence", where):
        problem = "holds a table instead of RescaleSlope and RescaleIntercept"
        raise AttributeRejected("ModalityLUTSequence", problem, where, "only linear values are read")
    if slope == 0:
        raise AttributeRejected("RescaleSlope", "is 0", where, "correct it at the sender")
    return 1.0 if slope is None else slope, 0.0 if intercept is None else intercept


def _positive(ds: Dataset, keyword: str, where: Where) -> float | None:
    """A hint about slice distance; what is broken here counts as absent, since positions decide."""
    try:
        found = attributes.number(ds, keyword, where)
    except AttributeRejected:
        return None
    return found if found is not None and found > 0 else None


def _tolerant_integer(ds: Dataset, keyword: str, where: Where) -> int | None:
    """A number that only breaks ties; what is broken counts as absent."""
    try:
        return attributes.integer(ds, keyword, where)
    except AttributeRejected:
        return None


def _split_value(key: str, header: Dataset, groups: tuple[Dataset, ...], where: Where) -> str:
    for *path, keyword in SPLIT_KEYS[key].paths:
        if path and not groups:
            continue
        level = macro(groups, tuple(path), where) if path else header
        if level is None:
            continue
        found = attributes.texts(level, keyword, where)
        if found:
            return "\\".join(found)
    return ""


def _acquired_s(header: Dataset, content: Dataset | None, where: Where) -> float | None:
    """The frame's own date and time, AcquisitionDate with AcquisitionTime, AcquisitionDateTime, the time alone
    (PS3.3 C.7.6.16.2.2, C.7.6.1); the first that can be read, since it only ranks."""
    date = attributes.text(header, "AcquisitionDate", where)
    time = attributes.text(header, "AcquisitionTime", where)
    stated = (
        attributes.text(content, "FrameAcquisitionDateTime", where) if content is not None else "",
        date + time if date and time else "",
        attributes.text(header, "AcquisitionDateTime", where),
        _NO_DATE + time if time else "",
    )
    return next((s for text in stated if (s := _seconds(text)) is not None), None)


def _seconds(text: str) -> float | None:
    found = _DATE_TIME.fullmatch(text)
    if found is None:
        return None
    part = {name: float(value or 0) for name, value in found.groupdict().items() if name != "sign"}
    try:
        day = datetime.date(int(part["year"]), int(part["month"]), int(part["day"])).toordinal() - 1
    except ValueError:
        return None
    offset_s = (part["offset_hour"] * 60 + part["offset_minute"]) * (-60 if found["sign"] == "-" else 60)
    return ((day * 24 + part["hour"]) * 60 + part["minute"]) * 60 + part["second"] - offset_s
