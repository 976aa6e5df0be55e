"""A reader's labels for a result: a DICOM SEG or a NIfTI label map → a label array on the grid of the result's series.

Nothing is guessed. A SEG must refer to the very images and lie in their frame of reference, its segments are the
model's labels by name; a NIfTI label map has the values of the model and the grid of the images, in any voxel order.
Whatever does not fit is refused with what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.dataset import count_labels, undeclared_labels
from engine.labels import Label, LabelManager
from engine.nifti import narrowed, read_whole_numbers
from engine.volume import Geometry
from gateway.errors import Rejected
from gateway.results.series import SeriesPart
from gateway.training_data.case_conversion import paint_label_map, series_grid
from gateway.training_data.grid_placement import place
from gateway.training_data.label_names import folded
from gateway.training_data.label_objects import LabelObject, read_label_object
from gateway.training_data.label_painting import LabelPainter
from gateway.training_data.segment_masks import paint_segments

Missing = Literal["refuse", "keep", "erase"]
"""A label that the result has and a SEG does not describe: refused, kept as the result has it, or none there."""

_NIFTI = (".nii", ".nii.gz")
_MOST_NAMED = 8
_THRESHOLD = 0.5
_LABEL_LENGTH = 64
"""Of SegmentLabel (0062,0005), an LO: longer names of labels are cut there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CorrectedLabels:
    """`array` (Z, Y, X) holds values of `labels`, slice z being slice z of the result's series, on `geometry`."""

    array: NDArray[Any]
    geometry: Geometry
    labels: LabelManager


def read_corrected_labels(
    file: Path,
    part: SeriesPart,
    labels: LabelManager,
    predicted: NDArray[Any],
    *,
    missing: Missing = "refuse",
    patient_id: str | None = None,
) -> CorrectedLabels:
    """`part` is the result's volume, `labels` are its model's, `predicted` its own label array (Z, Y, X); `patient_id`
    that of the study, where it is known.

    Raises Rejected (AttributeRejected) or InputRejected for a file that cannot be read, is of other images, lies on
    another grid or has labels that the model has not; OSError when it is not there.
    """
    if file.name.endswith(_NIFTI):
        array = _of_nifti(file, part, labels)
    else:
        array = _of_segmentation(file, part, labels, predicted, missing=missing, patient_id=patient_id)
    return CorrectedLabels(array=array.astype(_type(labels)), geometry=part.geometry, labels=labels)


def _of_nifti(file: Path, part: SeriesPart, labels: LabelManager) -> NDArray[Any]:
    grid = series_grid(part)
    found = read_whole_numbers(file)
    if sorted(found.geometry.shape) != sorted(grid.shape):
        raise Rejected(
            f"{file.name}: has {_size(found.geometry)} voxels (x, y, z), its images {_size(grid)}; give labels of the "
            "whole volume"
        )
    _check_covers(found.geometry, grid, file.name)
    if unexpected := undeclared_labels(found, labels):
        raise Rejected(f"{file.name}: {unexpected} ({_names(labels.foreground)})")
    painter = LabelPainter(grid.shape, labels.highest_value, "refuse")
    labelled = narrowed(found)
    paint_label_map(labelled, {value: value for value in count_labels(labelled) if value}, grid, painter, file.name)
    return painter.array


def _check_covers(own: Geometry, grid: Geometry, name: str) -> None:
    """Raises Rejected unless both grids have the same voxels, in whatever order."""
    axes = 3 if own.shape[0] > 1 else 2  # the thickness of a single slice says nothing of where its voxels are
    sizes = own.shape[::-1][:axes]
    placement = place(
        origin_mm=own.affine_lps[:3, 3], steps_mm=own.affine_lps[:3, :axes], sizes=sizes, target=grid, what=name
    )
    ends = np.stack([placement.shift, placement.shift + placement.turn @ (np.array(sizes) - 1)])
    away = np.abs([ends.min(axis=0), ends.max(axis=0) - (np.array(grid.shape[::-1]) - 1)]).max()
    if away:
        raise Rejected(f"{name}: lies {int(away)} voxels away from its images; give labels on the grid of the images")


def _of_segmentation(
    file: Path,
    part: SeriesPart,
    labels: LabelManager,
    predicted: NDArray[Any],
    *,
    missing: Missing,
    patient_id: str | None,
) -> NDArray[Any]:
    found = read_label_object(file)
    if found.kind != "SEG":
        raise Rejected(f"{file.name}: is an {found.kind}; a correction is a DICOM SEG or a NIfTI label map")
    _check_references(found, part, patient_id)
    # Regions overlap, and a later one is written over an earlier one: painted by rank, the higher one stays.
    ranks = _ranks(found, labels)
    painter = LabelPainter(part.geometry.shape, len(labels.foreground) + 1, "last" if labels.has_regions else "refuse")
    paint_segments(file, ranks, part.geometry, painter, threshold=_THRESHOLD)
    if painter.overlaps and not labels.has_regions:
        (low, high), voxels = next(iter(sorted(painter.overlaps.items())))
        one, other = (labels.foreground[rank - 1].name for rank in (low, high))
        raise Rejected(f"{file.name}: {one!r} and {other!r} overlap in {voxels} voxels; a voxel has one label")
    values = np.array([0, *(label.value for label in labels.foreground), labels.ignore_label or 0])
    array: NDArray[Any] = values[painter.array]
    return _completed(array, frozenset(ranks.values()), labels, predicted, missing=missing, name=file.name)


def _check_references(found: LabelObject, part: SeriesPart, patient_id: str | None) -> None:
    """Raises Rejected where the object says that it is of other images than the result's, or does not say of which."""
    name, series = found.file.name, part.series_instance_uid
    if found.study_instance_uid and found.study_instance_uid != part.study_instance_uid:
        raise Rejected(
            f"{name}: StudyInstanceUID (0020,000D) is {found.study_instance_uid}, that of the result is "
            f"{part.study_instance_uid}"
        )
    if patient_id and found.patient_id and found.patient_id.strip() != patient_id.strip():
        raise Rejected(f"{name}: PatientID (0010,0020) is another one than that of the result's study")
    if found.series and series not in found.series:
        raise Rejected(f"{name}: refers to series {', '.join(sorted(found.series))}; the result is of series {series}")
    own = {frame.sop_instance_uid for frame in part.frames}
    if found.instances and found.instances.isdisjoint(own):
        raise Rejected(f"{name}: refers to no image of the result's volume in series {series}")
    frame = part.frame_of_reference_uid
    if frame and found.frames_of_reference and frame not in found.frames_of_reference:
        raise Rejected(
            f"{name}: FrameOfReferenceUID (0020,0052) is {', '.join(sorted(found.frames_of_reference))}, that of "
            f"series {series} is {frame}"
        )
    if not found.series and not found.instances:
        raise Rejected(
            f"{name}: names no images that it was drawn on (ReferencedSeriesSequence (0008,1115)); export it with its "
            "references"
        )


def _ranks(found: LabelObject, labels: LabelManager) -> dict[int, int]:
    """Segment number → 1, 2, … in the order of the model's labels; `ignore` is after the last."""
    known = {folded(label.name[:_LABEL_LENGTH]): rank for rank, label in enumerate(labels.foreground, start=1)}
    if labels.ignore_label is not None:
        known["ignore"] = len(labels.foreground) + 1
    unknown = [s for s in found.structures if folded(s.name) not in known]
    if unknown:
        named = ", ".join(repr(s.name) for s in unknown[:_MOST_NAMED])
        raise Rejected(f"{found.file.name}: the model has no label {named} ({_names(labels.foreground)})")
    ranks = {s.number: known[folded(s.name)] for s in found.structures}
    if len(set(ranks.values())) < len(ranks):
        raise Rejected(f"{found.file.name}: two segments have one name; each label is one segment")
    if not ranks:
        raise Rejected(f"{found.file.name}: has no segments; use --reject where the result has no usable labels")
    return ranks


def _completed(
    array: NDArray[Any],
    described: frozenset[int],
    labels: LabelManager,
    predicted: NDArray[Any],
    *,
    missing: Missing,
    name: str,
) -> NDArray[Any]:
    """A SEG of one organ says nothing of the others, or that there are none: who hands it in has to know."""
    absent = [
        label
        for rank, label in enumerate(labels.foreground, start=1)
        if rank not in described and bool((predicted == label.value).any())
    ]
    if not absent or missing == "erase":
        return array
    if missing == "refuse":
        raise Rejected(
            f"{name}: has no segment for {', '.join(repr(label.name) for label in absent[:_MOST_NAMED])}, which the "
            "result has; --missing keep takes them from the result, --missing erase says that there are none"
        )
    if labels.has_regions:
        names = ", ".join(repr(label.name) for label in absent[:_MOST_NAMED])
        raise Rejected(
            f"{name}: has no segment for {names}; labels of this model lie within one another, so that none can be "
            "kept beside the others: give all of them, or --missing erase"
        )
    kept = np.isin(predicted, [label.value for label in absent]) & (array == 0)
    return np.where(kept, predicted, array)


def _type(labels: LabelManager) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if labels.highest_value < 256 else np.uint16


def _size(geometry: Geometry) -> str:
    return " x ".join(str(n) for n in geometry.shape[::-1])


def _names(labels: Sequence[Label]) -> str:
    shown = ", ".join(f"{label.value} {label.name!r}" for label in labels[:_MOST_NAMED])
    return f"it has {shown}{' …' if len(labels) > _MOST_NAMED else ''}"
