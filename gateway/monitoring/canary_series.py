"""A sanity case as a DICOM series of a study of its own: the same voxels on the same grid, of no patient (OPS-59).

Slices lie along the axis that the model's contract wants, else along the one of the coarsest spacing; axes change
places and direction, nothing is resampled. Whole numbers of 16 bit are stored as they are. Other values are scaled to
16 bit with RescaleSlope and RescaleIntercept: an error of at most 1 in 65,000 of the largest, and what is 0 stays
exactly 0, since preprocessing crops by it.
"""

from __future__ import annotations

import datetime
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)
from pydicom.valuerep import DSfloat, format_number_as_ds

from engine.manifest import Contract
from engine.volume import AS_STORED, Volume
from gateway.errors import Rejected
from storage.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

PATIENT_ID, PATIENT_NAME = "SEGGATE-CANARY", "CANARY^SYNTHETIC"
SliceAxis = Literal["axial", "sagittal", "coronal"]
# Right-handed, and slices along the normal as a reader stacks them: the array comes back in this voxel order.
_ORIENTATIONS = MappingProxyType({"axial": "LPS", "coronal": "LIP", "sagittal": "PIR"})
_CLASSES = MappingProxyType({"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage})
_LARGEST = 32767


@dataclass(frozen=True, kw_only=True)
class CanarySeries:
    """What was written: a file for each slice."""

    study_instance_uid: str
    files: tuple[Path, ...]


def new_uid() -> str:
    """A UID that nobody can guess (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid4().int}"


def modality_of(allowed: tuple[str, ...]) -> str:
    """The first of a contract's modalities that can be written here. Raises Rejected where there is none."""
    found = next((modality for modality in allowed if modality in _CLASSES), None)
    if found is None:
        raise Rejected(f"a canary can be of {', '.join(_CLASSES)}; the model takes {', '.join(allowed)}")
    return found


def slice_axes(volume: Volume, contract: Contract) -> tuple[SliceAxis, ...]:
    """How the slices may lie, the best first: as the contract wants it, else the coarsest spacing across them. A model
    that takes voxels as they are stored is given them in the order of the case, or not at all."""
    axes: tuple[SliceAxis, ...] = ("axial", "coronal", "sagittal")
    if contract.orientation == AS_STORED:
        axes = tuple(axis for axis in axes if _ORIENTATIONS[axis] == volume.geometry.orientation)
    if contract.slice_axis is not None:
        return tuple(axis for axis in axes if axis == contract.slice_axis)

    def distance(axis: SliceAxis) -> float:
        return volume.reoriented(_ORIENTATIONS[axis])[0].geometry.spacing_mm[0]

    return tuple(sorted(axes, key=lambda axis: -round(distance(axis), 6)))


def write_canary_series(
    folder: Path, volume: Volume, *, study_instance_uid: str, modality: str, slice_axis: SliceAxis, model: str
) -> CanarySeries:
    """Write the one channel of `volume` (1, Z, Y, X) into `folder`. `model` is named in SeriesDescription, for people.

    Raises Rejected for an image of several channels.
    """
    if volume.array.shape[0] != 1:
        raise Rejected(f"{volume.array.shape[0]} channels; one series gives 1")
    turned = volume.reoriented(_ORIENTATIONS[slice_axis])[0]
    stored, slope, intercept = stored_values(turned.array[0])
    common = _common(turned, study_instance_uid, modality, model, signed=stored.dtype == np.int16)
    if (slope, intercept) != (1.0, 0.0) or modality != "MR":
        common.RescaleSlope, common.RescaleIntercept = DSfloat(slope, True), DSfloat(intercept, True)
        common.RescaleType = "HU" if modality == "CT" else "US"
    folder.mkdir(parents=True, exist_ok=True)
    affine = turned.geometry.affine_lps
    files = []
    for index, plane in enumerate(stored):
        dataset = FileDataset("", Dataset(), file_meta=_meta(modality), preamble=b"\0" * 128)
        dataset.update(common)
        dataset.SOPInstanceUID = new_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = UID(dataset.SOPInstanceUID)
        dataset.InstanceNumber = index + 1
        position = affine @ (0.0, 0.0, float(index), 1.0)
        dataset.ImagePositionPatient = [DSfloat(float(mm), True) for mm in position[:3]]
        dataset.PixelData = np.ascontiguousarray(plane).tobytes()
        files.append(folder / f"{index + 1:05d}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    return CanarySeries(study_instance_uid=study_instance_uid, files=tuple(files))


def stored_values(
    image: NDArray[np.float32],
) -> tuple[NDArray[np.int16] | NDArray[np.uint16], float, float]:
    """(Z, Y, X) as 16 bit, with slope and intercept as a header can say them (DS has 16 characters)."""
    low, high = float(image.min()), float(image.max())
    if np.array_equal(image, np.rint(image)):
        if low >= -_LARGEST and high <= _LARGEST:
            return image.astype(np.int16), 1.0, 0.0
        if low >= 0 and high <= 2 * _LARGEST:
            return image.astype(np.uint16), 1.0, 0.0
    is_zero = image == 0
    if is_zero.any():
        slope = _as_said(max(abs(low), abs(high)) / _LARGEST)
        counts = np.rint(image.astype(np.float64) / slope)
        # Something is never taken for nothing.
        counts = np.where((counts == 0) & ~is_zero, np.sign(image), counts)
        return np.clip(counts, -_LARGEST, _LARGEST).astype(np.int16), slope, 0.0
    slope, intercept = _as_said((high - low) / (2 * _LARGEST) or 1.0), _as_said(low)
    scaled = np.rint((image.astype(np.float64) - intercept) / slope)
    return np.clip(scaled, 0, 2 * _LARGEST).astype(np.uint16), slope, intercept


def _as_said(value: float) -> float:
    return float(format_number_as_ds(value))


def _common(volume: Volume, study_instance_uid: str, modality: str, model: str, *, signed: bool) -> Dataset:
    now = datetime.datetime.now()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    spacing_z, spacing_y, spacing_x = volume.geometry.spacing_mm
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.Modality = _CLASSES[modality], modality
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"]
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = PATIENT_NAME, PATIENT_ID, "", "O"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study_instance_uid, new_uid(), new_uid()
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = ds.AcquisitionDate = date
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = ds.AcquisitionTime = time
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = "", "CANARY", ""
    ds.StudyDescription, ds.SeriesDescription = "synthetic, no patient", f"canary {model}"[:64]
    ds.Manufacturer, ds.PositionReferenceIndicator, ds.PatientPosition = "SYNTHETIC", "", "HFS"
    ds.SeriesNumber, ds.AcquisitionNumber = 1, 1
    if modality == "CT":
        ds.KVP = ""
    if modality == "MR":
        ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "RM", "NONE", "", "3D"
        ds.EchoTime, ds.RepetitionTime, ds.EchoTrainLength = "", "", ""
    if modality == "PT":
        ds.Units = "CNTS"
    direction = volume.geometry.direction
    ds.ImageOrientationPatient = [DSfloat(float(part), True) for part in (*direction[:, 0], *direction[:, 1])]
    ds.PixelSpacing = [DSfloat(spacing_y, True), DSfloat(spacing_x, True)]
    ds.SliceThickness = ds.SpacingBetweenSlices = DSfloat(spacing_z, True)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = volume.geometry.shape[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, int(signed)
    return ds


def _meta(modality: str) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = _CLASSES[modality], ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return meta
