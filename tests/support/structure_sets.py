"""Writes RTSTRUCT objects for phantoms: regions from masks or from contours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds
from skimage.measure import find_contours

from tests.support.phantoms import PhantomSeries

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"


@dataclass(frozen=True, kw_only=True)
class Region:
    """contours: each (n, 3) points in voxel indices (x, y, z)."""

    name: str
    contours: Sequence[NDArray[np.float64]] = field(default_factory=tuple)
    kind: str = "CLOSED_PLANAR"


def outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Contours of a mask (Z, Y, X), halfway between the centres inside and outside; holes are contours of their own."""
    found = []
    for z in np.flatnonzero(mask.any(axis=(1, 2))):
        for line in find_contours(np.pad(mask[z].astype(float), 1), 0.5):
            yx = line[:-1] - 1
            found.append(np.column_stack([yx[:, 1], yx[:, 0], np.full(len(yx), float(z))]))
    return found


def write_structure_set(
    path: Path, series: PhantomSeries, regions: Sequence[Region], *, refers: bool = True, **changes: Any
) -> Path:
    """An RTSTRUCT on a phantom series; refers: name its series and instances, not the frame of reference alone.
    `changes` replace attributes of the object."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = UID(STRUCTURE_SET)
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[series.series_instance_uid, *(r.name for r in regions), path.name])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.Modality = UID(STRUCTURE_SET), "RTSTRUCT"
    first = series.datasets[0]
    ds.PatientID, ds.PatientName = first.PatientID, first.PatientName
    ds.StudyInstanceUID = series.study_instance_uid
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[ds.SOPInstanceUID, "series"])
    frame = Dataset()
    frame.FrameOfReferenceUID = series.frame_of_reference_uid
    if refers:
        frame.RTReferencedStudySequence = DicomSequence([_references(series)])
    ds.ReferencedFrameOfReferenceSequence = DicomSequence([frame])
    ds.StructureSetROISequence = DicomSequence(
        [
            _item(ROINumber=number, ReferencedFrameOfReferenceUID=series.frame_of_reference_uid, ROIName=region.name)
            for number, region in enumerate(regions, start=1)
        ]
    )
    ds.ROIContourSequence = DicomSequence(
        [_contours(number, region, series.affine_lps) for number, region in enumerate(regions, start=1)]
    )
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def regions_of(labels: NDArray[Any], names: Mapping[int, str]) -> list[Region]:
    """A region for each value of a label map."""
    return [Region(name=name, contours=outlines(labels == value)) for value, name in names.items()]


def _references(series: PhantomSeries) -> Dataset:
    images = [
        _item(ReferencedSOPClassUID=d.SOPClassUID, ReferencedSOPInstanceUID=d.SOPInstanceUID) for d in series.datasets
    ]
    of_series = _item(SeriesInstanceUID=series.series_instance_uid, ContourImageSequence=DicomSequence(images))
    return _item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
        ReferencedSOPInstanceUID=series.study_instance_uid,
        RTReferencedSeriesSequence=DicomSequence([of_series]),
    )


def _contours(number: int, region: Region, affine_lps: NDArray[np.float64]) -> Dataset:
    items = []
    for indices in region.contours:
        points_mm = indices @ affine_lps[:3, :3].T + affine_lps[:3, 3]
        items.append(
            _item(
                ContourGeometricType=region.kind,
                NumberOfContourPoints=len(points_mm),
                ContourData=[format_number_as_ds(float(value)) for value in points_mm.ravel()],
            )
        )
    return _item(ReferencedROINumber=number, ContourSequence=DicomSequence(items))


def _item(**attributes: Any) -> Dataset:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item
