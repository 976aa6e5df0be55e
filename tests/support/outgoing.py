"""Small DICOM objects to send: a segmentation in three encodings and a report, all of one invented study."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from gateway.delivery.destination import OutgoingObject, Role

COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


class InventedResult:
    """One result's objects, each written once; the same call gives the same object again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, OutgoingObject] = {}
        self.study_instance_uid = generate_uid()
        self._source = [_slice(self.study_instance_uid, z) for z in range(4)]
        _place(self._source)
        self.asked: list[str] = []

    def objects(self, encoding: str) -> tuple[OutgoingObject, ...]:
        """The image object in this encoding and the report that refers to it, in the order of sending."""
        self.asked.append(encoding)
        return (self.image(encoding), self.report(encoding))

    def image(self, encoding: str) -> OutgoingObject:
        if encoding == "SC":
            return self._once("SC", "SC", self._secondary_capture)
        return self._once(encoding, "SEG", lambda: self._segmentation(encoding))

    def report(self, encoding: str) -> OutgoingObject:
        return self._once(f"SR-{encoding}", "SR", self._report)

    def _once(self, key: str, role: Role, make: Callable[[], Dataset]) -> OutgoingObject:
        if key not in self._made:
            dataset = make()
            path = self._folder / f"{len(self._made)}.dcm"
            self._folder.mkdir(parents=True, exist_ok=True)
            dataset.save_as(path, enforce_file_format=True)
            self._made[key] = OutgoingObject(
                sop_instance_uid=dataset.SOPInstanceUID,
                sop_class_uid=dataset.SOPClassUID,
                transfer_syntax_uid=dataset.file_meta.TransferSyntaxUID,
                series_instance_uid=dataset.SeriesInstanceUID,
                study_instance_uid=dataset.StudyInstanceUID,
                path=path,
                digest=hashlib.sha256(path.read_bytes()).hexdigest(),
                role=role,
            )
        return self._made[key]

    def _segmentation(self, encoding: str) -> Dataset:
        mask = np.zeros((4, 16, 16), dtype=np.uint8)
        mask[1:3, 4:9, 3:7] = 1
        description = hd.seg.SegmentDescription(
            segment_number=1,
            segment_label="Invented",
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Organ,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        return hd.seg.Segmentation(
            source_images=self._source,
            pixel_array=mask,
            segmentation_type=hd.seg.SegmentationTypeValues(encoding),
            segment_descriptions=[description],
            series_instance_uid=generate_uid(),
            series_number=100,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="seggate",
            manufacturer_model_name="seggate",
            software_versions="0",
            device_serial_number="0",
        )

    def _secondary_capture(self) -> Dataset:
        dataset = _empty(SECONDARY_CAPTURE, self.study_instance_uid, "OT")
        dataset.ConversionType = "WSD"
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.Rows, dataset.Columns = 8, 8
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
        dataset.PixelData = bytes(range(64))
        return dataset

    def _report(self) -> Dataset:
        dataset = _empty(COMPREHENSIVE_3D_SR, self.study_instance_uid, "SR")
        dataset.CompletionFlag, dataset.VerificationFlag = "COMPLETE", "UNVERIFIED"
        dataset.ValueType, dataset.ContinuityOfContent = "CONTAINER", "SEPARATE"
        return dataset


def _empty(sop_class_uid: str, study_instance_uid: str, modality: str) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class_uid, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_instance_uid, generate_uid()
    dataset.Modality = modality
    dataset.PatientName, dataset.PatientID = "Invented^Patient", "INVENTED-1"
    dataset.PatientBirthDate, dataset.PatientSex = "", ""
    dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber, dataset.StudyID = "", "", "", ""
    dataset.ReferringPhysicianName = ""
    dataset.SeriesNumber, dataset.InstanceNumber = 101, 1
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _slice(study_instance_uid: str, z: int) -> Dataset:
    dataset = _empty(MRImageStorage, study_instance_uid, "MR")
    dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Rows, dataset.Columns = 16, 16
    dataset.PixelSpacing = [1, 1]
    dataset.SliceThickness = 1
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [0, 0, z]
    dataset.InstanceNumber = z + 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.PixelData = bytes(2 * 16 * 16)
    return dataset


def _place(slices: list[Dataset]) -> None:
    """All slices belong to one series and one frame of reference."""
    series, frame = generate_uid(), generate_uid()
    for item in slices:
        item.SeriesInstanceUID, item.FrameOfReferenceUID = series, frame
