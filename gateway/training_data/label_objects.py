"""What a file of labels says about itself: its structures, and the images that it was drawn on.

Structures are the segments of a DICOM SEG (PS3.3 C.8.20.2), the regions of interest of an RTSTRUCT (PS3.3 C.8.8.5) or
the values of a NIfTI label map.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydicom.dataset import Dataset

from engine.dataset import count_labels
from engine.nifti import read_label_map
from gateway.errors import Rejected
from gateway.results import attributes
from gateway.results.attributes import READ_ERRORS, AttributeRejected, Where
from gateway.results.frames import read_header

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.7"
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
LABEL_CLASSES = frozenset({SEGMENTATION, LABEL_MAP_SEGMENTATION, STRUCTURE_SET})
CLOSED = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"})

Kind = Literal["SEG", "RTSTRUCT", "NIfTI"]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """`number`: SegmentNumber, ROINumber or the voxel value; `name`: SegmentLabel, ROIName or the value as text.
    `frame_of_reference`: of an ROI, where its contours lie (an RTSTRUCT may have several), "" where none is given."""

    number: int
    name: str
    frame_of_reference: str = ""


@dataclass(frozen=True, kw_only=True)
class LabelObject:
    """One file of labels. `series` and `instances` are UIDs of the images that it refers to, as far as it names them,
    and `of_series` the instances that it names as those of a series; `left_out` are regions of interest that enclose
    nothing (points, open lines). UIDs are "" where there are none. `digest`: SHA-256 of the file."""

    file: Path
    digest: str
    kind: Kind
    structures: tuple[Structure, ...]
    left_out: tuple[str, ...] = ()
    sop_instance_uid: str = ""
    study_instance_uid: str = ""
    patient_id: str = ""
    frames_of_reference: frozenset[str] = frozenset()
    series: frozenset[str] = frozenset()
    instances: frozenset[str] = frozenset()
    of_series: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def absent(self, own: Iterable[str], known: AbstractSet[str], there: AbstractSet[str]) -> frozenset[str]:
        """Images that it was drawn on and that are not there. own: series that it belongs to; known: all instances that
        were found; there: those of `own`. None where it names not one of these: then its UIDs are other ones."""
        if self.instances.isdisjoint(there):
            return frozenset()
        named = {uid: self.of_series.get(uid, frozenset()) for uid in own}
        of_others = {i for uid, found in self.of_series.items() if uid not in named for i in found}
        return frozenset((self.instances - of_others).union(*named.values()) - known)


def read_label_object(file: Path) -> LabelObject:
    """A DICOM SEG or RTSTRUCT, or a NIfTI label map by its ending.

    Raises AttributeRejected or Rejected naming what is wrong with it, InputRejected (NIfTI), OSError.
    """
    if file.name.endswith((".nii", ".nii.gz")):
        values = [value for value in count_labels(read_label_map(file)) if value > 0]
        structures = tuple(Structure(number=value, name=str(value)) for value in values)
        return LabelObject(file=file, digest=_digest(file), kind="NIfTI", structures=structures)
    where = Where(file=file)
    header = read_header(file, where)
    where = Where(file=file, sop_instance_uid=attributes.required_uid(header, "SOPInstanceUID", where))
    sop_class_uid = attributes.required_uid(header, "SOPClassUID", where)
    if sop_class_uid not in LABEL_CLASSES:
        raise Rejected(f"{file.name}: is no DICOM SEG, no RTSTRUCT and no NIfTI file")
    is_structure_set = sop_class_uid == STRUCTURE_SET
    structures, left_out = _regions(header, where) if is_structure_set else (_segments(header, where), ())
    references = _structure_set_references if is_structure_set else _segmentation_references
    series, instances, frames_of_reference = set[str](), set[str](), set[str]()
    of_series: dict[str, set[str]] = {}
    for found in references(header, where):
        {"series": series, "instance": instances, "frame": frames_of_reference}[found.kind].add(found.uid)
        if found.series:
            of_series.setdefault(found.series, set()).add(found.uid)
    return LabelObject(
        file=file,
        digest=_digest(file),
        kind="RTSTRUCT" if is_structure_set else "SEG",
        structures=structures,
        left_out=left_out,
        sop_instance_uid=where.sop_instance_uid,
        study_instance_uid=attributes.uid(header, "StudyInstanceUID", where),
        patient_id=attributes.text(header, "PatientID", where),
        frames_of_reference=frozenset(frames_of_reference),
        series=frozenset(series),
        instances=frozenset(instances),
        of_series={uid: frozenset(found) for uid, found in of_series.items()},
    )


def source_images(item: Dataset, where: Where) -> frozenset[str]:
    """SOP Instance UIDs of the images that a frame of a SEG (by its functional groups) or a contour was drawn on."""
    derivations = attributes.items(item, "DerivationImageSequence", where)
    found = [
        *(
            reference
            for derivation in derivations
            for reference in _instances(derivation, "SourceImageSequence", where)
        ),
        *_instances(item, "ContourImageSequence", where),
    ]
    return frozenset(reference.uid for reference in found)


def contours_of(header: Dataset, where: Where) -> Iterator[tuple[int, tuple[Dataset, ...]]]:
    """ROINumber and contour items of each item of an RTSTRUCT's ROIContourSequence."""
    for item in attributes.items(header, "ROIContourSequence", where):
        yield _number(item, "ReferencedROINumber", where), attributes.items(item, "ContourSequence", where)


def _segments(header: Dataset, where: Where) -> tuple[Structure, ...]:
    """Number 0 is the background that a label map may describe."""
    items = attributes.items(header, "SegmentSequence", where)
    found = [(_number(item, "SegmentNumber", where), item) for item in items]
    structures = [Structure(number=n, name=_name(i, "SegmentLabel", where)) for n, i in found if n > 0]
    return _distinct(structures, "SegmentNumber", where)


def _regions(header: Dataset, where: Where) -> tuple[tuple[Structure, ...], tuple[str, ...]]:
    """Those with closed contours, and the names of those that have other ones only. Without a contour a region is
    empty, and stays."""
    types: dict[int, set[str]] = {}
    for number, contours in contours_of(header, where):
        kinds = types.setdefault(number, set())
        kinds.update(attributes.text(contour, "ContourGeometricType", where) for contour in contours)
    regions, left_out = [], []
    for item in attributes.items(header, "StructureSetROISequence", where):
        number = _number(item, "ROINumber", where)
        name = _name(item, "ROIName", where)
        kinds = types.get(number, set())
        if kinds and not kinds & CLOSED:
            left_out.append(name)
        else:
            frame = attributes.uid(item, "ReferencedFrameOfReferenceUID", where)
            regions.append(Structure(number=number, name=name, frame_of_reference=frame))
    return _distinct(regions, "ROINumber", where), tuple(left_out)


def _distinct(structures: list[Structure], keyword: str, where: Where) -> tuple[Structure, ...]:
    numbers = Counter(structure.number for structure in structures)
    twice = next((number for number, times in numbers.items() if times > 1), None)
    if twice is not None:
        raise AttributeRejected(keyword, f"{twice} is given twice", where, "export the labels again")
    return tuple(structures)


def _number(item: Dataset, keyword: str, where: Where) -> int:
    number = attributes.integer(item, keyword, where)
    if number is None:
        raise attributes.absent(keyword, where, "export the labels again")
    return number


def _name(item: Dataset, keyword: str, where: Where) -> str:
    """Decoded by the object's character set, in one line; a bad character set or an empty name is no fault of the
    voxels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = str(item.get(keyword) or "")
    except READ_ERRORS:
        value = attributes.text(item, keyword, where)
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())[:64] or "unnamed"


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """`series`: that of an instance, where the object says which."""

    kind: Literal["series", "instance", "frame"]
    uid: str
    series: str = ""


def _instances(item: Dataset, keyword: str, where: Where, *, series: str = "") -> Iterator[_Reference]:
    for reference in attributes.items(item, keyword, where):
        found = attributes.uid(reference, "ReferencedSOPInstanceUID", where)
        if found:
            yield _Reference(kind="instance", uid=found, series=series)


def _series(item: Dataset, keyword: str, where: Where) -> Iterator[_Reference]:
    """And its instances, in the sequence `keyword`."""
    found = attributes.uid(item, "SeriesInstanceUID", where)
    if found:
        yield _Reference(kind="series", uid=found)
    yield from _instances(item, keyword, where, series=found)


def _frame(item: Dataset, keyword: str, where: Where) -> Iterator[_Reference]:
    found = attributes.uid(item, keyword, where)
    if found:
        yield _Reference(kind="frame", uid=found)


def _segmentation_references(header: Dataset, where: Where) -> Iterator[_Reference]:
    """Common Instance Reference (PS3.3 C.12.2), and the source images of object and frames."""
    yield from _frame(header, "FrameOfReferenceUID", where)
    for series in attributes.items(header, "ReferencedSeriesSequence", where):
        yield from _series(series, "ReferencedInstanceSequence", where)
    yield from _instances(header, "SourceImageSequence", where)
    groups = (
        *attributes.items(header, "SharedFunctionalGroupsSequence", where),
        *attributes.items(header, "PerFrameFunctionalGroupsSequence", where),
    )
    for group in groups:
        for uid in source_images(group, where):
            yield _Reference(kind="instance", uid=uid)


def _structure_set_references(header: Dataset, where: Where) -> Iterator[_Reference]:
    """Structure Set module (PS3.3 C.8.8.5), and the image of each contour."""
    for frame in attributes.items(header, "ReferencedFrameOfReferenceSequence", where):
        yield from _frame(frame, "FrameOfReferenceUID", where)
        for study in attributes.items(frame, "RTReferencedStudySequence", where):
            for series in attributes.items(study, "RTReferencedSeriesSequence", where):
                yield from _series(series, "ContourImageSequence", where)
    for region in attributes.items(header, "StructureSetROISequence", where):
        yield from _frame(region, "ReferencedFrameOfReferenceUID", where)
    for _, contours in contours_of(header, where):
        for contour in contours:
            for uid in source_images(contour, where):
                yield _Reference(kind="instance", uid=uid)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
