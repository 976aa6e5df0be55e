"""Builds the CT and MR objects of the phantoms: classic slices and enhanced multi-frame objects, with all modules of
patient, study, series, frame of reference and image that a result copies from its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

Rescale = Literal["shared", "per-slice", "none"]
Modality = Literal["CT", "MR"]

IMPLEMENTATION_UID = "1.2.826.0.1.3680043.8.498.1"
_SOP_CLASSES = {
    ("CT", False): "1.2.840.10008.5.1.4.1.1.2",
    ("CT", True): "1.2.840.10008.5.1.4.1.1.2.1",
    ("MR", False): "1.2.840.10008.5.1.4.1.1.4",
    ("MR", True): "1.2.840.10008.5.1.4.1.1.4.1",
}


@dataclass(frozen=True, kw_only=True)
class PhantomPatient:
    """Identity written into every object; all invented."""

    name: str = "Phantom^Asymmetric"
    patient_id: str = "PH-0001"
    birth_date: str = "19700101"
    sex: str = "O"


def _ds(value: float) -> str:
    return format_number_as_ds(float(value))


def _ds_list(values: Sequence[float] | NDArray[np.float64]) -> list[str]:
    return [_ds(v) for v in values]


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = scheme
    item.CodeMeaning = meaning
    return item


@dataclass(frozen=True, kw_only=True)
class ObjectPlan:
    """What all objects of one series share. affine: 4x4 LPS; spacing_mm: (z, y, x)."""

    modality: Modality
    enhanced: bool
    rescale: Rescale
    transfer_syntax: str
    patient: PhantomPatient
    study_uid: str
    series_uid: str
    frame_of_reference_uid: str
    series_number: int
    series_description: str
    affine: NDArray[np.float64]
    row: NDArray[np.float64]
    column: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]
    slice_thickness_mm: float
    bits_stored: int
    signed: bool


def _series_header(plan: ObjectPlan, sop_instance_uid: str) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.FileMetaInformationVersion = b"\x00\x01"
    ds.file_meta.MediaStorageSOPClassUID = UID(_SOP_CLASSES[plan.modality, plan.enhanced])
    ds.file_meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
    ds.file_meta.TransferSyntaxUID = UID(plan.transfer_syntax)
    ds.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID
    ds.PatientName = plan.patient.name
    ds.PatientID = plan.patient.patient_id
    ds.PatientBirthDate = plan.patient.birth_date
    ds.PatientSex = plan.patient.sex
    ds.StudyInstanceUID = plan.study_uid
    ds.StudyID = "1"
    ds.StudyDate, ds.StudyTime = "20240105", "101500"
    ds.StudyDescription = "Asymmetric phantom"
    ds.AccessionNumber = "ACC0001"
    ds.ReferringPhysicianName = ""
    ds.SeriesInstanceUID = plan.series_uid
    ds.SeriesNumber = plan.series_number
    ds.SeriesDescription = plan.series_description
    ds.SeriesDate, ds.SeriesTime = "20240105", "101700"
    ds.AcquisitionDate, ds.AcquisitionTime = "20240105", "101730"
    ds.ContentDate, ds.ContentTime = "20240105", "101800"
    ds.Modality = plan.modality
    ds.BodyPartExamined = "HEAD"
    ds.PatientPosition = "HFS"
    ds.FrameOfReferenceUID = plan.frame_of_reference_uid
    ds.PositionReferenceIndicator = ""
    ds.Manufacturer = "Phantom Works"
    ds.ManufacturerModelName = "Asymmetric"
    ds.DeviceSerialNumber = "1"
    ds.SoftwareVersions = "1"
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = 16
    ds.BitsStored = plan.bits_stored
    ds.HighBit = plan.bits_stored - 1
    ds.PixelRepresentation = int(plan.signed)
    return ds


def slice_rescale(plan: ObjectPlan, index: int) -> tuple[float, float]:
    """(slope, intercept) of the slice at `index` along the normal."""
    if plan.rescale == "none":
        return 1.0, 0.0
    base = -1024.0 if plan.modality == "CT" and not plan.signed else 0.0
    if plan.rescale == "shared":
        return (1.0, base) if plan.modality == "CT" else (0.5, 4.0)
    return 1.0 + 0.25 * (index % 4), base - 2.0 * index


def stored_values(plan: ObjectPlan, image: NDArray[np.float64]) -> NDArray[np.int64]:
    """Stored integers for real values (Z, Y, X), clipped to what BitsStored holds."""
    stored = np.empty(image.shape, dtype=np.int64)
    for index in range(image.shape[0]):
        slope, intercept = slice_rescale(plan, index)
        stored[index] = np.rint((image[index] - intercept) / slope)
    low = -(1 << (plan.bits_stored - 1)) if plan.signed else 0
    high = (1 << (plan.bits_stored - 1)) - 1 if plan.signed else (1 << plan.bits_stored) - 1
    return np.clip(stored, low, high)


def _pixel_bytes(plan: ObjectPlan, stored: NDArray[np.int64]) -> bytes:
    order = ">" if plan.transfer_syntax == ExplicitVRBigEndian else "<"
    return stored.astype(f"{order}{'i' if plan.signed else 'u'}2").tobytes()


def _image_type(plan: ObjectPlan) -> list[str]:
    if plan.enhanced:
        return ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    return ["ORIGINAL", "PRIMARY", "AXIAL"] if plan.modality == "CT" else ["ORIGINAL", "PRIMARY", "M", "SE"]


def classic_slice(
    plan: ObjectPlan, index: int, instance_number: int | None, stored: NDArray[np.int64], sop_uid: str
) -> Dataset:
    """One CT or MR Image object: the slice at `index` along the normal."""
    ds = _series_header(plan, sop_uid)
    ds.ImageType = _image_type(plan)
    if instance_number is not None:
        ds.InstanceNumber = instance_number
    ds.AcquisitionNumber = 1
    ds.Rows, ds.Columns = stored.shape
    ds.ImagePositionPatient = _ds_list(plan.affine[:3, 3] + index * plan.affine[:3, 2])
    ds.ImageOrientationPatient = _ds_list([*plan.row, *plan.column])
    ds.PixelSpacing = _ds_list(plan.spacing_mm[1:])
    ds.SliceThickness = _ds(plan.slice_thickness_mm)
    if plan.rescale != "none":
        slope, intercept = slice_rescale(plan, index)
        ds.RescaleSlope, ds.RescaleIntercept = _ds(slope), _ds(intercept)
        ds.RescaleType = "HU" if plan.modality == "CT" else "US"
    if plan.modality == "CT":
        ds.KVP = "120"
    else:
        ds.ScanningSequence = "SE"
        ds.SequenceVariant = "NONE"
        ds.ScanOptions = ""
        ds.MRAcquisitionType = "3D"
        ds.RepetitionTime, ds.EchoTime, ds.EchoTrainLength = "500", "12", "1"
        ds.SpacingBetweenSlices = _ds(plan.spacing_mm[0])
    ds.PixelData = _pixel_bytes(plan, stored)
    return ds


def _pixel_value_transformation(slope: float, intercept: float, modality: Modality) -> Dataset:
    item = Dataset()
    item.RescaleIntercept, item.RescaleSlope = _ds(intercept), _ds(slope)
    item.RescaleType = "HU" if modality == "CT" else "US"
    return item


def enhanced_object(plan: ObjectPlan, frame_order: Sequence[int], stored: NDArray[np.int64], sop_uid: str) -> Dataset:
    """One Enhanced CT or MR object; frame_order[k] is the index along the normal of stored frame k."""
    ds = _series_header(plan, sop_uid)
    ds.ImageType = _image_type(plan)
    ds.InstanceNumber = 1
    ds.NumberOfFrames = len(frame_order)
    ds.Rows, ds.Columns = stored.shape[1:]
    ds.AcquisitionDateTime = "20240105101730"
    ds.AcquisitionDuration = 1.0
    ds.AcquisitionNumber = 1
    ds.PixelPresentation = "MONOCHROME"
    ds.VolumetricProperties = "VOLUME"
    ds.VolumeBasedCalculationTechnique = "NONE"
    ds.BurnedInAnnotation = "NO"
    ds.LossyImageCompression = "00"
    ds.PresentationLUTShape = "IDENTITY"
    ds.ContentQualification = "RESEARCH"
    ds.AcquisitionContextSequence = DicomSequence()
    if plan.modality == "MR":
        ds.ComplexImageComponent = "MAGNITUDE"
        ds.AcquisitionContrast = "T1"
        ds.ResonantNucleus = "1H"
        ds.MagneticFieldStrength = 3.0
        ds.PulseSequenceName = "phantom"
        ds.MRAcquisitionType = "3D"
        ds.EchoPulseSequence = "SPIN"
        ds.MultipleSpinEcho = "NO"
        ds.MultiPlanarExcitation = "NO"
        ds.PhaseContrast = "NO"
        ds.TimeOfFlightContrast = "NO"
        ds.SteadyStatePulseSequence = "NONE"
        ds.EchoPlanarPulseSequence = "NO"
        ds.SaturationRecovery = "NO"
        ds.SpectrallySelectedSuppression = "NONE"
        ds.OversamplingPhase = "NONE"
        ds.GeometryOfKSpaceTraversal = "RECTILINEAR"
        ds.SegmentedKSpaceTraversal = "SINGLE"
        ds.RectilinearPhaseEncodeReordering = "LINEAR"
        ds.KSpaceFiltering = "NONE"
        ds.ApplicableSafetyStandardAgency = "IEC"
    organization = Dataset()
    organization.DimensionOrganizationUID = generate_uid(entropy_srcs=[sop_uid, "dimensions"])
    ds.DimensionOrganizationSequence = DicomSequence([organization])
    dimensions = []
    for pointer in (0x00209056, 0x00209057):  # StackID, InStackPositionNumber
        item = Dataset()
        item.DimensionOrganizationUID = organization.DimensionOrganizationUID
        item.DimensionIndexPointer = pointer
        item.FunctionalGroupPointer = 0x00209111
        dimensions.append(item)
    ds.DimensionIndexSequence = DicomSequence(dimensions)

    shared = Dataset()
    measures = Dataset()
    measures.PixelSpacing = _ds_list(plan.spacing_mm[1:])
    measures.SliceThickness = _ds(plan.slice_thickness_mm)
    shared.PixelMeasuresSequence = DicomSequence([measures])
    orientation = Dataset()
    orientation.ImageOrientationPatient = _ds_list([*plan.row, *plan.column])
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    anatomy = Dataset()
    anatomy.FrameLaterality = "U"
    anatomy.AnatomicRegionSequence = DicomSequence([_code("69536005", "SCT", "Head")])
    shared.FrameAnatomySequence = DicomSequence([anatomy])
    if plan.rescale == "shared":
        shared.PixelValueTransformationSequence = DicomSequence(
            [_pixel_value_transformation(*slice_rescale(plan, 0), plan.modality)]
        )
    ds.SharedFunctionalGroupsSequence = DicomSequence([shared])

    frames = []
    for number, index in enumerate(frame_order, start=1):
        item = Dataset()
        content = Dataset()
        content.StackID = "1"
        content.InStackPositionNumber = index + 1
        content.DimensionIndexValues = [1, index + 1]
        content.FrameAcquisitionDateTime = "20240105101730"
        content.FrameReferenceDateTime = "20240105101730"
        content.FrameAcquisitionDuration = 1.0
        content.FrameAcquisitionNumber = number
        item.FrameContentSequence = DicomSequence([content])
        position = Dataset()
        position.ImagePositionPatient = _ds_list(plan.affine[:3, 3] + index * plan.affine[:3, 2])
        item.PlanePositionSequence = DicomSequence([position])
        if plan.rescale == "per-slice":
            item.PixelValueTransformationSequence = DicomSequence(
                [_pixel_value_transformation(*slice_rescale(plan, index), plan.modality)]
            )
        frame_type = Dataset()
        frame_type.FrameType = _image_type(plan)
        frame_type.PixelPresentation = "MONOCHROME"
        frame_type.VolumetricProperties = "VOLUME"
        frame_type.VolumeBasedCalculationTechnique = "NONE"
        if plan.modality == "MR":
            frame_type.ComplexImageComponent = "MAGNITUDE"
            frame_type.AcquisitionContrast = "T1"
            item.MRImageFrameTypeSequence = DicomSequence([frame_type])
        else:
            item.CTImageFrameTypeSequence = DicomSequence([frame_type])
        frames.append(item)
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    ds.PixelData = _pixel_bytes(plan, stored[list(frame_order)])
    return ds


def write_object(ds: Dataset, path: Path, transfer_syntax: str) -> None:
    """Write a DICOM file, compressed first where the transfer syntax asks for it."""
    syntax = UID(transfer_syntax)
    ds["PixelData"].VR = "OW"
    if syntax.is_compressed and syntax.is_encapsulated:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
