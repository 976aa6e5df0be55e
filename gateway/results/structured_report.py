"""Measurements → TID 1500 report (Comprehensive 3D SR), and the notice that a result is held for review.

One measurement group per segment, an empty one included: its volume is 0 and it points at its segment, which the SEG
describes even though it has no frame. The verdict of the QA module is a qualitative evaluation of every group, and one
more group without region (TID 1501) lists every check with its own verdict. The document is preliminary, complete and
not verified: no person has looked at it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    Comprehensive3DSR,
    ContainerContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    ReferencedSegment,
    RelationshipTypeValues,
    SourceSeriesForSegmentation,
    TextContentItem,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as DicomCode
from pydicom.uid import Comprehensive3DSRStorage, EnhancedSRStorage, ExplicitVRLittleEndian

from gateway.results.content import EncodedObject, Encoding, ObjectReference, ResultContent, SegmentContent
from gateway.results.identity import CODING_SCHEME, MANUFACTURER, component_uid, device_uid
from gateway.results.result_modules import (
    NOT_REVIEWED,
    ResultHeader,
    coded,
    finished,
    instance_references,
    side,
    write_common_modules,
)
from gateway.results.segmentation import segmentation_reference

_CONTAINS = RelationshipTypeValues.CONTAINS
REPORT_STORAGE = str(Comprehensive3DSRStorage)
NOTICE_STORAGE = str(EnhancedSRStorage)

_SIGNIFICANT_DIGITS = 7
"""A decimal string has 16 characters, and no measurement of ours is known better."""

_MEAN = DicomCode("373098007", "SCT", "Mean")
_IMAGING = DicomCode("363679005", "SCT", "Imaging")
_NO_UNITS = DicomCode("1", "UCUM", "no units")
_INTENSITY = DicomCode("INTENSITY", CODING_SCHEME, "Image intensity, arbitrary units")
_CONFIDENCE = DicomCode("CONFIDENCE", CODING_SCHEME, "Mean probability that the model gave the segment")
_VERDICT = DicomCode("QA-VERDICT", CODING_SCHEME, "Verdict of the automatic quality checks")
_VERDICTS = {
    "pass": DicomCode("QA-PASS", CODING_SCHEME, "Passed"),
    "review": DicomCode("QA-REVIEW", CODING_SCHEME, "Needs review"),
    "hold": DicomCode("QA-HOLD", CODING_SCHEME, "Held"),
}
_NOTICE_TITLE = DicomCode("NOTICE", CODING_SCHEME, "Notice of automatic segmentation")
HELD_FOR_REVIEW = "Result held for review"
SR_ENCODING: dict[Encoding, str] = {"BINARY": "SR", "LABELMAP": "SR-LABELMAP"}


def encode_structured_report(content: ResultContent, *, segmentation: Encoding = "BINARY") -> EncodedObject:
    """The measurement report of a result. segmentation: which of the result's Segmentations it points at."""
    header = ResultHeader(content)
    reference = segmentation_reference(content, encoding=segmentation)
    encoding = SR_ENCODING[segmentation]
    groups = [_group(content, segment, reference) for segment in content.segments]
    report = MeasurementReport(
        observation_context=_observation_context(content),
        procedure_reported=_IMAGING,
        imaging_measurements=[*groups, *_quality_group(content, encoding)],
        title=codes.DCM.ImagingMeasurementReport,
    )
    dataset = Comprehensive3DSR(
        evidence=[_evidence(content, reference)],
        content=report[0],
        series_instance_uid=reference.series_instance_uid,
        series_number=header.series_number("SR"),
        sop_instance_uid=reference.sop_instance_uid,
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    _write_references(dataset, content, [reference])
    write_common_modules(dataset, header, role="SR", encoding=encoding)
    return finished(dataset, header, role="SR", encoding=encoding, transfer_syntax_uid=str(ExplicitVRLittleEndian))


def encode_notice(content: ResultContent) -> EncodedObject:
    """An Enhanced SR without any measurement: the result is held for review, and which checks held it."""
    header = ResultHeader(content)
    model = content.identity.model
    # Names of checks and segments only: no value of a held result leaves the gateway.
    held = [
        f"{check.name} ({check.segment})" if check.segment else check.name
        for check in content.checks
        if check.verdict != "pass"
    ]
    text = f"{HELD_FOR_REVIEW}. Model {model.name} {model.version}. {NOT_REVIEWED}. "
    text += f"Quality checks that did not pass: {', '.join(held)}." if held else "No check is named."
    root = ContainerContentItem(name=_NOTICE_TITLE, is_content_continuous=False)
    root.ContentSequence = ContentSequence(
        [
            *_observation_context(content),
            CodeContentItem(name=_VERDICT, value=_verdict(content.verdict), relationship_type=_CONTAINS),
            TextContentItem(name=codes.DCM.Comment, value=text[:1024], relationship_type=_CONTAINS),
        ]
    )
    dataset = EnhancedSR(
        evidence=[_evidence(content, None)],
        content=root,
        series_instance_uid=content.identity.series_instance_uid,
        series_number=header.series_number("notice"),
        sop_instance_uid=content.identity.series_instance_uid,
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    _write_references(dataset, content, [])
    write_common_modules(dataset, header, role="notice", encoding="SR")
    return finished(dataset, header, role="notice", encoding="SR", transfer_syntax_uid=str(ExplicitVRLittleEndian))


def _observation_context(content: ResultContent) -> ObservationContext:
    model = content.identity.model
    observer = ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=device_uid(model),
            name=f"{MANUFACTURER} {content.software_version}"[:64],
            manufacturer_name=MANUFACTURER,
            model_name=model.name,
            serial_number=model.weights_digest[:16],
        ),
    )
    return ObservationContext(observer_device_context=observer)


def _algorithm(content: ResultContent) -> AlgorithmIdentification:
    model = content.identity.model
    return AlgorithmIdentification(
        name=model.name,
        version=model.version,
        parameters=[f"weights_sha256={model.weights_digest}", f"configuration_sha256={model.configuration_digest}"],
        family=codes.DCM.ArtificialIntelligence,
        manufacturer=MANUFACTURER,
    )


def _group(
    content: ResultContent, segment: SegmentContent, reference: ObjectReference
) -> VolumetricROIMeasurementsAndQualitativeEvaluations:
    laterality = side(segment)
    property_type = coded(segment.type)
    return VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=content.tracking_uid(segment), identifier=content.tracking_identifier(segment)
        ),
        referenced_segment=ReferencedSegment(
            sop_class_uid=reference.sop_class_uid,
            sop_instance_uid=reference.sop_instance_uid,
            segment_number=segment.number,
            source_series=SourceSeriesForSegmentation(content.identity.series_instance_uid),
        ),
        finding_category=coded(segment.category),
        finding_type=property_type,
        finding_sites=None if laterality is None else [FindingSite(property_type, laterality=laterality)],
        algorithm_id=_algorithm(content),
        measurements=_measurements(content, segment),
        qualitative_evaluations=[QualitativeEvaluation(name=_VERDICT, value=_verdict(content.verdict))],
    )


def _measurements(content: ResultContent, segment: SegmentContent) -> list[Measurement]:
    """Volume always; mean intensity and confidence where there are voxels to take them from."""
    found = [
        Measurement(
            name=codes.SCT.Volume,
            value=_rounded(segment.volume_ml),  # 1 ml = 1 cm3
            unit=codes.UCUM.CubicCentimeter,
            method=codes.DCM.SumOfSegmentedVoxelMethodForVolume,
        )
    ]
    if segment.mean_intensity is not None:
        if segment.unit == codes.UCUM.HounsfieldUnit.value:
            name, unit = codes.DCM.AttenuationCoefficient, codes.UCUM.HounsfieldUnit
        else:
            name = codes.DCM.MRSignalIntensity if content.modality == "MR" else _INTENSITY
            unit = _NO_UNITS
        found.append(Measurement(name=name, value=_rounded(segment.mean_intensity), unit=unit, derivation=_MEAN))
    if segment.confidence is not None:
        found.append(Measurement(name=_CONFIDENCE, value=_rounded(segment.confidence), unit=_NO_UNITS))
    return found


def _quality_group(content: ResultContent, encoding: str) -> list[MeasurementsAndQualitativeEvaluations]:
    """Every check of the QA module with its verdict; with its value where that is a number, and the bound of an
    estimate."""
    evaluations = [QualitativeEvaluation(name=_VERDICT, value=_verdict(content.verdict))]
    values = []
    for check in content.checks:
        name = _check_code(check.name, check.segment)
        evaluations.append(QualitativeEvaluation(name=name, value=_verdict(str(check.verdict))))
        if isinstance(check.value, int | float):
            values.append(Measurement(name=name, value=_rounded(float(check.value)), unit=_NO_UNITS))
        if check.bound is not None:
            name = _check_code(f"{check.name}, 90 % bound", check.segment)
            values.append(Measurement(name=name, value=_rounded(check.bound), unit=_NO_UNITS))
    uid = component_uid(content.identity, role="SR", encoding=encoding, component="quality")
    return [
        MeasurementsAndQualitativeEvaluations(
            tracking_identifier=TrackingIdentifier(uid=uid, identifier="Automatic quality checks"),
            finding_type=codes.DCM.QualityAssessment,
            algorithm_id=_algorithm(content),
            measurements=values or None,
            qualitative_evaluations=evaluations,
        )
    ]


def _check_code(name: str, segment: str | None) -> DicomCode:
    """Code values have 16 characters, so a check of a segment gets a digest; the meaning says it in words."""
    text = f"{name}: {segment}" if segment else name
    digest = hashlib.sha256(text.encode()).hexdigest()[:12].upper()
    return DicomCode(f"QA-{digest}", CODING_SCHEME, f"Check {text}"[:64])


def _verdict(verdict: str) -> DicomCode:
    return _VERDICTS[str(verdict)]


def _rounded(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")


def _evidence(content: ResultContent, reference: ObjectReference | None) -> Dataset:
    """A stand-in for what is referenced: UIDs only. `_write_references` writes the complete list."""
    item = Dataset()
    first = content.frames[0]
    item.StudyInstanceUID = content.identity.study_instance_uid
    item.SeriesInstanceUID = (
        content.identity.series_instance_uid if reference is None else reference.series_instance_uid
    )
    item.SOPClassUID = first.sop_class_uid if reference is None else reference.sop_class_uid
    item.SOPInstanceUID = first.sop_instance_uid if reference is None else reference.sop_instance_uid
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
        setattr(item, keyword, "")
    for keyword in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
        setattr(item, keyword, "")
    return item


def _write_references(dataset: Dataset, content: ResultContent, ours: Sequence[ObjectReference]) -> None:
    """Evidence: every source instance and our Segmentation; and the report that this one replaces."""
    series = [_series_item(content.identity.series_instance_uid, instance_references(content))]
    series += [_series_item(o.series_instance_uid, [_instance_item(o)]) for o in ours]
    dataset.CurrentRequestedProcedureEvidenceSequence = DicomSequence([_study_item(content, series)])
    scheme = Dataset()
    scheme.CodingSchemeDesignator = CODING_SCHEME
    scheme.CodingSchemeName = "seggate: automatic segmentation"
    scheme.CodingSchemeResponsibleOrganization = MANUFACTURER
    dataset.CodingSchemeIdentificationSequence = DicomSequence([scheme])
    earlier = content.supersedes.report
    if earlier is not None:
        item = _series_item(earlier.series_instance_uid, [_instance_item(earlier)])
        dataset.PredecessorDocumentsSequence = DicomSequence([_study_item(content, [item])])


def _study_item(content: ResultContent, series: list[Dataset]) -> Dataset:
    item = Dataset()
    item.StudyInstanceUID = content.identity.study_instance_uid
    item.ReferencedSeriesSequence = DicomSequence(series)
    return item


def _series_item(series_instance_uid: str, instances: list[Dataset]) -> Dataset:
    item = Dataset()
    item.SeriesInstanceUID = series_instance_uid
    item.ReferencedSOPSequence = DicomSequence(instances)
    return item


def _instance_item(reference: ObjectReference) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = reference.sop_class_uid
    item.ReferencedSOPInstanceUID = reference.sop_instance_uid
    return item
