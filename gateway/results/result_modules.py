"""The DICOM modules that all result objects share: patient, study, series, equipment, SOP common, references.

highdicom never sees a source header: it gets stand-ins with UIDs and geometry only, and patient, study and equipment
are written here from the repaired header. A bad source attribute so cannot stop the encoder, and no clock or random
UID of the library reaches the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from io import BytesIO

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as DicomCode
from pydicom.uid import UID, CTImageStorage
from pydicom.valuerep import format_number_as_ds

from engine.manifest import Code
from gateway.results.content import EncodedObject, Repair, ResultContent, SegmentContent
from gateway.results.identity import MANUFACTURER, frame_of_reference_uid, series_instance_uid, sop_instance_uid
from gateway.results.source_header import copied_to_results, repaired_header
from storage.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

NOT_REVIEWED = "AI, not reviewed"
_MODEL_KEPT = 20  # characters of the model's name that a series description always has
_SERIES_BASE = 9000
_ROLE_OFFSET = {"SEG": 0, "SR": 1, "SC": 2, "notice": 3}
_SIDES = {"left": DicomCode("7771000", "SCT", "Left"), "right": DicomCode("24028007", "SCT", "Right")}


class ResultHeader:
    """The repaired source header of one result, and what is derived from it. Raises Rejected (see repaired_header)."""

    def __init__(self, content: ResultContent) -> None:
        self.content = content
        self.attributes, self.repairs = repaired_header(content.header)
        if content.frame_of_reference_uid:
            self.frame_of_reference_uid = content.frame_of_reference_uid
        elif "FrameOfReferenceUID" in self.attributes:
            self.frame_of_reference_uid = str(self.attributes.FrameOfReferenceUID)
        else:
            self.frame_of_reference_uid = frame_of_reference_uid(content.identity)
            self.repairs.append(
                Repair(
                    attribute="FrameOfReferenceUID",
                    tag="(0020,0052)",
                    action="replaced",
                    reason="is missing; a UID derived from the series was written",
                )
            )

    @property
    def created_at(self) -> datetime:
        """When the result was made, in the time zone of the dates and times that are copied from the source: the
        source's TimezoneOffsetFromUTC, which is copied too; the zone of this host where the source says nothing, and
        then the result says nothing either (PS3.3 C.12.1.1.8)."""
        offset = self.attributes.get("TimezoneOffsetFromUTC")
        zone = datetime.strptime(str(offset), "%z").tzinfo if offset is not None else None
        return self.content.created_at.astimezone(zone)

    @property
    def slice_thickness_mm(self) -> str:
        """Of the source; the distance between slices where it says nothing legal."""
        thickness = self.attributes.get("SliceThickness")
        if thickness is not None and float(thickness) > 0:
            return str(thickness)
        return format_number_as_ds(self.slice_step_mm)

    @property
    def slice_step_mm(self) -> float:
        """Distance between neighbouring slices along the normal, also in a tilted gantry."""
        affine = self.content.geometry.affine_lps
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        return float(abs(affine[:3, 2] @ normal) / np.linalg.norm(normal))

    def series_number(self, role: str) -> int:
        """9000 + 10 x the source's SeriesNumber (0 where it has none) + 0 SEG, 1 SR, 2 SC, 3 notice."""
        number = self.attributes.get("SeriesNumber")
        source = int(number) if number is not None else 0
        return _SERIES_BASE + 10 * (source if 0 <= source <= 99_999 else 0) + _ROLE_OFFSET[role]


def stand_ins(
    header: ResultHeader, planes: Iterable[int], *, rows_columns: tuple[int, int] | None = None
) -> list[Dataset]:
    """One single-frame image per plane, with the geometry of the source slice and no identity but a number.

    The SOP Instance UID of plane z is "2.25.<z + 1>"; `restore_references` puts the real one back. rows_columns: other
    than the slice's.
    """
    content = header.content
    _, y_spacing, x_spacing = content.geometry.spacing_mm
    cosines = content.geometry.direction
    orientation = [format_number_as_ds(float(v)) for v in (*cosines[:, 0], *cosines[:, 1])]
    common = Dataset()
    common.SOPClassUID = CTImageStorage
    common.StudyInstanceUID = content.identity.study_instance_uid
    common.SeriesInstanceUID = content.identity.series_instance_uid
    common.FrameOfReferenceUID = header.frame_of_reference_uid
    common.Modality = "OT"
    common.Rows, common.Columns = rows_columns or content.geometry.shape[1:]
    common.ImageOrientationPatient = orientation
    common.PixelSpacing = [format_number_as_ds(y_spacing), format_number_as_ds(x_spacing)]
    common.SliceThickness = header.slice_thickness_mm
    if content.geometry.shape[0] > 1:
        common.SpacingBetweenSlices = format_number_as_ds(header.slice_step_mm)
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
        setattr(common, keyword, "")
    for keyword in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
        setattr(common, keyword, "")
    result = []
    for z in planes:
        image = Dataset()
        image.update(common)
        image.SOPInstanceUID = f"2.25.{z + 1}"
        image.ImagePositionPatient = [format_number_as_ds(float(v)) for v in content.frames[z].position_mm]
        result.append(image)
    return result


def instance_references(content: ResultContent) -> list[Dataset]:
    """One item per source object (not per frame), in slice order."""
    seen: dict[str, Dataset] = {}
    for frame in content.frames:
        if frame.sop_instance_uid not in seen:
            item = Dataset()
            item.ReferencedSOPClassUID = frame.sop_class_uid
            item.ReferencedSOPInstanceUID = frame.sop_instance_uid
            seen[frame.sop_instance_uid] = item
    return list(seen.values())


def write_common_modules(dataset: Dataset, header: ResultHeader, *, role: str, encoding: str) -> None:
    """Patient, study, series, equipment and SOP common, from the content alone; replaces what is there."""
    content = header.content
    identity, created = content.identity, header.created_at
    date, time = created.strftime("%Y%m%d"), created.strftime("%H%M%S")
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for element in copied_to_results(header.attributes):
        dataset.add(element)
    dataset.SeriesInstanceUID = series_instance_uid(identity, role=role, encoding=encoding)
    dataset.SOPInstanceUID = sop_instance_uid(
        identity, role=role, sop_class_uid=str(dataset.SOPClassUID), encoding=encoding
    )
    dataset.SeriesNumber = header.series_number(role)
    dataset.InstanceNumber = 1
    dataset.SeriesDescription = series_description(header)
    dataset.SeriesDate, dataset.SeriesTime = date, time
    dataset.ContentDate, dataset.ContentTime = date, time
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = date, time
    dataset.Manufacturer = MANUFACTURER
    dataset.ManufacturerModelName = MANUFACTURER
    dataset.DeviceSerialNumber = identity.model.weights_digest[:16]
    dataset.SoftwareVersions = content.software_version[:64]
    for keyword in ("BodyPartExamined", "Laterality"):
        if role in ("SEG", "SC") and keyword in header.attributes:
            dataset.add(header.attributes[keyword])
    dataset.ContributingEquipmentSequence = DicomSequence(_equipment(header))


def series_description(header: ResultHeader) -> str:
    """`<model>: <source's SeriesNumber> <part> <SeriesDescription> AI, not reviewed`, at most 64 characters (VR LO).

    What tells two results of a study apart comes first; the wording is never what gets cut.
    """
    identity = header.content.identity
    room = 64 - len(NOT_REVIEWED) - 1
    number, described = (str(header.attributes.get(k, "")) for k in ("SeriesNumber", "SeriesDescription"))
    source = " ".join(filter(None, (number, identity.part, described)))
    if not source:
        return f"{identity.model.name[:room]} {NOT_REVIEWED}"
    model = identity.model.name[: max(_MODEL_KEPT, room - 2 - len(source))]
    room -= len(model) + 2
    part = _without_middle(identity.part, room - len(number) - 1)
    source = " ".join(filter(None, (number, part, described)))[:room].rstrip()
    return f"{model}: {source} {NOT_REVIEWED}"


def _without_middle(text: str, room: int) -> str:
    """Parts of one series often begin alike and often end alike."""
    if len(text) <= room:
        return text
    tail = room // 2
    return f"{text[: room - tail - 1]}~{text[-tail:]}"


def algorithm_identification(content: ResultContent) -> AlgorithmIdentificationSequence:
    """Name and version of the model, and the weights digest as parameter."""
    model = content.identity.model
    return AlgorithmIdentificationSequence(
        name=model.name,
        family=codes.DCM.ArtificialIntelligence,
        version=model.version,
        source=MANUFACTURER,
        parameters={
            "weights_sha256": model.weights_digest,
            "configuration_sha256": model.configuration_digest,
        },
    )


def coded(code: Code) -> DicomCode:
    """A code of the model bundle as pydicom's."""
    return DicomCode(code.value, code.scheme, code.meaning[:64])


def side(segment: SegmentContent) -> DicomCode | None:
    """SNOMED CT code of the segment's side."""
    return None if segment.laterality is None else _SIDES[segment.laterality]


def code_item(code: DicomCode) -> Dataset:
    """An item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def finished(
    dataset: Dataset, header: ResultHeader, *, role: str, encoding: str, transfer_syntax_uid: str
) -> EncodedObject:
    """The data set as a DICOM file whose bytes depend on the content only."""
    data = file_bytes(dataset, transfer_syntax_uid)
    return encoded_object(
        dataset,
        header,
        role=role,
        encoding=encoding,
        transfer_syntax_uid=transfer_syntax_uid,
        chunks=lambda: (data,),
    )


def encoded_object(
    dataset: Dataset,
    header: ResultHeader,
    *,
    role: str,
    encoding: str,
    transfer_syntax_uid: str,
    chunks: Callable[[], Iterable[bytes]],
) -> EncodedObject:
    """An object whose file is made of `chunks`; dataset: at least its UIDs."""
    return EncodedObject(
        role=role,
        encoding=encoding,
        chunks=chunks,
        sop_class_uid=str(dataset.SOPClassUID),
        sop_instance_uid=str(dataset.SOPInstanceUID),
        series_instance_uid=str(dataset.SeriesInstanceUID),
        transfer_syntax_uid=str(transfer_syntax_uid),
        repairs=tuple(header.repairs),
    )


def file_bytes(dataset: Dataset, transfer_syntax_uid: str) -> bytes:
    """Preamble, file meta information (PS3.10 7.1) and data set."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = UID(str(dataset.SOPClassUID))
    meta.MediaStorageSOPInstanceUID = UID(str(dataset.SOPInstanceUID))
    meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    # A plain data set: highdicom's classes keep look-up tables that no longer match.
    plain = Dataset()
    plain.update(dict(dataset.items()))
    plain.file_meta = meta
    plain.preamble = b"\0" * 128
    buffer = BytesIO()
    dcmwrite(buffer, plain, enforce_file_format=True)
    return buffer.getvalue()


def _equipment(header: ResultHeader) -> list[Dataset]:
    """The acquiring device as far as the source names it, then the gateway with the model (OUT-41)."""
    items = []
    if "Manufacturer" in header.attributes:
        acquisition = Dataset()
        for keyword in ("Manufacturer", "InstitutionName", "StationName", "ManufacturerModelName", "SoftwareVersions"):
            if keyword in header.attributes:
                acquisition.add(header.attributes[keyword])
        acquisition.PurposeOfReferenceCodeSequence = DicomSequence([code_item(codes.DCM.AcquisitionEquipment)])
        items.append(acquisition)
    content = header.content
    model = content.identity.model
    ours = Dataset()
    ours.PurposeOfReferenceCodeSequence = DicomSequence([code_item(codes.DCM.ProcessingEquipment)])
    ours.Manufacturer = MANUFACTURER
    ours.ManufacturerModelName = model.name[:64]
    ours.DeviceSerialNumber = model.weights_digest[:16]
    versions = [model.version[:64], content.software_version[:64]]
    ours.add(DataElement("SoftwareVersions", "LO", versions, validation_mode=config.IGNORE))
    ours.ContributionDateTime = header.created_at.strftime("%Y%m%d%H%M%S%z")
    ours.ContributionDescription = f"Automatic segmentation with {model.name} {model.version}; {NOT_REVIEWED}"
    items.append(ours)
    return items
