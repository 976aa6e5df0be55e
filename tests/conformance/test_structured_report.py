"""Measurement reports and notices as others read them: dciodvfy, dcmqi tid1500reader, DCMTK dsrdump."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from gateway.results.content import Encoding, ObjectReference, ResultContent, Superseded
from gateway.results.quality import Verdict
from gateway.results.segmentation import encode_segmentation, segmentation_reference
from gateway.results.series import SeriesPart
from gateway.results.structured_report import REPORT_STORAGE, encode_notice, encode_structured_report
from tests.conformance.test_segmentation import CHARACTER_SETS, STRAIGHT, TILTED, hippocampus_crop
from tests.support.peers import program
from tests.support.phantoms import LEFT, RIGHT, write_series
from tests.support.result_contents import MODEL, content_of, later, part_of
from tests.support.result_readers import iod_errors, measurement_report, run, shown_name


def phantom(folder: Path, recipe: dict[str, Any], **values: Any) -> tuple[SeriesPart, ResultContent]:
    series = write_series(folder / "source", **recipe)
    part = part_of(series.files)
    return part, content_of(part, series.labels, **values)


def report_file(content: ResultContent, folder: Path) -> Path:
    path = folder / "report.dcm"
    path.write_bytes(encode_structured_report(content).data)
    return path


def measured(report: dict[str, Any]) -> dict[tuple[int | None, str], tuple[Any, str]]:
    """(segment number, quantity) → (value, unit)."""
    return {
        (group.get("ReferencedSegment"), item["quantity"]["CodeMeaning"]): (
            float(item["value"]),
            item["units"]["CodeValue"],
        )
        for group in report["Measurements"]
        for item in group["measurementItems"]
    }


def evaluations(group: dict[str, Any]) -> dict[str, str]:
    return {
        e["conceptCode"]["CodeMeaning"]: e["conceptValue"]["CodeValue"]
        for e in group["qualitativeEvaluations"]
        if isinstance(e["conceptValue"], dict)
    }


@pytest.mark.peer("dciodvfy", "dcmqi", "dcmtk")
@pytest.mark.parametrize("recipe", [*STRAIGHT.values(), TILTED], ids=[*STRAIGHT, "tilted"])
def test_every_source_gets_a_report_without_error(tmp_path: Path, recipe: dict[str, Any]) -> None:
    _, content = phantom(tmp_path, recipe)
    path = report_file(content, tmp_path)
    assert iod_errors(path) == []
    values = measured(measurement_report(path, tmp_path))
    for segment in content.segments:
        assert values[segment.number, "Volume"] == (pytest.approx(segment.volume_ml, rel=1e-6), "cm3")
    assert "Comprehensive 3D SR Document" in run(program("dsrdump"), str(path))


@pytest.mark.requirement("OUT-41", open="SEMIAUTOMATIC and MANUAL after an edit")
@pytest.mark.peer("dcmqi")
def test_dcmqi_reads_values_segments_and_provenance(tmp_path: Path) -> None:
    part, content = phantom(tmp_path, {}, verdict=Verdict.REVIEW)
    report = measurement_report(report_file(content, tmp_path), tmp_path)
    values = measured(report)
    left, right = content.segments
    assert left.mean_intensity is not None
    assert right.mean_intensity is not None
    assert values[LEFT, "Attenuation Coefficient"] == (pytest.approx(left.mean_intensity, rel=1e-6), "[hnsf'U]")
    assert values[RIGHT, "Attenuation Coefficient"] == (pytest.approx(right.mean_intensity, rel=1e-6), "[hnsf'U]")
    assert values[LEFT, "Mean probability that the model gave the segment"] == (0.9, "1")
    assert values[None, "Check confidence"] == (0.91, "1")
    assert values[None, "Check estimated-dice: left structure"] == (0.88, "1")
    assert values[None, "Check estimated-dice, 90 % bound: left structure"] == (0.75, "1")
    groups = {g.get("ReferencedSegment"): g for g in report["Measurements"]}
    made = pydicom.dcmread(BytesIO(encode_segmentation(content).data))
    for item in made.SegmentSequence:
        group = groups[item.SegmentNumber]
        assert group["TrackingUniqueIdentifier"] == item.TrackingUID
        assert group["TrackingIdentifier"] == item.TrackingID
        assert group["segmentationSOPInstanceUID"] == made.SOPInstanceUID
        assert group["SourceSeriesForImageSegmentation"] == part.series_instance_uid
        assert group["Finding"]["CodeValue"] == item.SegmentedPropertyTypeCodeSequence[0].CodeValue
        algorithm = group["measurementAlgorithmIdentification"]
        assert (algorithm["AlgorithmName"], algorithm["AlgorithmVersion"]) == (MODEL.name, MODEL.version)
        assert any(MODEL.weights_digest in p for p in algorithm["AlgorithmParameters"])
        assert evaluations(group)["Verdict of the automatic quality checks"] == "QA-REVIEW"
    assert groups[LEFT]["Laterality"]["CodeMeaning"] == "Left"
    assert groups[RIGHT]["Laterality"]["CodeMeaning"] == "Right"
    assert evaluations(groups[None])["Check empty: left structure"] == "QA-PASS"
    assert evaluations(groups[None])["Check confidence"] == "QA-REVIEW"


@pytest.mark.peer("dcmqi")
def test_magnetic_resonance_intensity_has_no_unit(tmp_path: Path) -> None:
    _, content = phantom(tmp_path, {"modality": "MR"})
    values = measured(measurement_report(report_file(content, tmp_path), tmp_path))
    assert values[LEFT, "MR signal intensity"][1] == "1"
    assert (LEFT, "Attenuation Coefficient") not in values


@pytest.mark.peer("dcmtk")
def test_dcmtk_shows_a_preliminary_unverified_document(tmp_path: Path) -> None:
    _, content = phantom(tmp_path, {})
    text = run(program("dsrdump"), str(report_file(content, tmp_path)))
    assert "Preliminary Flag    : PRELIMINARY" in text
    assert "Completion Flag     : COMPLETE" in text
    assert "Verification Flag   : UNVERIFIED" in text
    assert "AI, not reviewed" in text
    assert f'"Volume")="{content.segments[0].volume_ml:.7g}"' in text


@pytest.mark.requirement("OUT-41", open="SEMIAUTOMATIC and MANUAL after an edit")
@pytest.mark.parametrize("recipe", [{}, {"enhanced": True}], ids=["classic", "enhanced"])
def test_evidence_names_every_source_instance_and_the_segmentation(tmp_path: Path, recipe: dict[str, Any]) -> None:
    part, content = phantom(tmp_path, recipe)
    dataset = pydicom.dcmread(BytesIO(encode_structured_report(content).data))
    (study,) = dataset.CurrentRequestedProcedureEvidenceSequence
    found = {
        series.SeriesInstanceUID: {i.ReferencedSOPInstanceUID for i in series.ReferencedSOPSequence}
        for series in study.ReferencedSeriesSequence
    }
    ours = segmentation_reference(content)
    assert found == {
        part.series_instance_uid: {f.sop_instance_uid for f in part.frames},
        ours.series_instance_uid: {ours.sop_instance_uid},
    }
    assert dataset.SeriesNumber == 9011


@pytest.mark.peer("dciodvfy", "dcmqi")
def test_an_empty_segment_is_reported_with_volume_zero(tmp_path: Path) -> None:
    series = write_series(tmp_path / "source")
    part = part_of(series.files)
    only_left = np.where(series.labels == LEFT, series.labels, 0).astype(np.uint8)
    path = report_file(content_of(part, only_left), tmp_path)
    assert iod_errors(path) == []
    values = measured(measurement_report(path, tmp_path))
    assert values[RIGHT, "Volume"] == (0.0, "cm3")
    assert (RIGHT, "Attenuation Coefficient") not in values


def test_the_report_follows_the_segmentation_that_was_sent(tmp_path: Path) -> None:
    _, content = phantom(tmp_path, {})
    encodings: tuple[Encoding, ...] = ("BINARY", "LABELMAP")
    reports = {e: encode_structured_report(content, segmentation=e) for e in encodings}
    assert len({r.sop_instance_uid for r in reports.values()}) == 2
    for encoding, made in reports.items():
        group = pydicom.dcmread(BytesIO(made.data)).ContentSequence[-1].ContentSequence[0]
        (segment,) = [i for i in group.ContentSequence if i.ValueType == "IMAGE"]
        reference = segmentation_reference(content, encoding=encoding)
        assert segment.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == reference.sop_instance_uid


@pytest.mark.requirement("QUE-27")
def test_the_same_content_makes_the_same_bytes(tmp_path: Path) -> None:
    series = write_series(tmp_path / "source")
    first, second = (content_of(part_of(series.files), series.labels) for _ in range(2))
    assert encode_structured_report(first).data == encode_structured_report(second).data
    assert encode_notice(first).data == encode_notice(second).data


@pytest.mark.peer("dciodvfy")
def test_a_new_version_names_the_report_it_replaces(tmp_path: Path) -> None:
    old = ObjectReference(sop_class_uid=REPORT_STORAGE, sop_instance_uid="2.25.77", series_instance_uid="2.25.78")
    part, content = phantom(tmp_path, {}, supersedes=Superseded(report=old))
    path = report_file(content, tmp_path)
    assert iod_errors(path) == []
    (study,) = pydicom.dcmread(path).PredecessorDocumentsSequence
    assert study.StudyInstanceUID == part.study_instance_uid
    assert study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "2.25.77"


@pytest.mark.requirement("CARD-02")
@pytest.mark.peer("dciodvfy", "dcmtk")
def test_a_notice_says_held_and_carries_no_measurement(tmp_path: Path) -> None:
    _, content = phantom(tmp_path, {}, verdict=Verdict.HOLD)
    path = tmp_path / "notice.dcm"
    path.write_bytes(encode_notice(content).data)
    assert iod_errors(path) == []
    text = run(program("dsrdump"), "+Pl", str(path))
    assert "Result held for review" in text
    assert "QA-HOLD" in text
    assert "confidence" in text
    assert "NUM:" not in text
    assert "0.91" not in text


@pytest.mark.requirement("OUT-39")
@pytest.mark.peer("dciodvfy", "dcmqi", "shared-data")
def test_a_real_series_with_incomplete_headers_gets_its_report(tmp_path: Path, shared_data: Path) -> None:
    part = part_of(hippocampus_crop(shared_data / "dicom" / "mr-hippocampus" / "study3"))
    labels = np.zeros(part.geometry.shape, dtype=np.uint8)
    labels[10:20, 10:20, 10:20] = LEFT
    path = report_file(content_of(part, labels), tmp_path)
    assert iod_errors(path) == []
    assert measured(measurement_report(path, tmp_path))[LEFT, "Volume"] == (pytest.approx(1.0, abs=1e-3), "cm3")


@pytest.mark.peer("dcmtk", "shared-data")
@pytest.mark.parametrize(("file", "name"), CHARACTER_SETS.items(), ids=CHARACTER_SETS)
def test_names_of_every_character_set_arrive(tmp_path: Path, shared_data: Path, file: str, name: str) -> None:
    _, content = phantom(tmp_path, {"shape": (3, 12, 12)})
    source = pydicom.dcmread(shared_data / "dicom" / "pydicom" / "charset_files" / f"{file}.dcm")
    assert shown_name(report_file(later(content, header=source), tmp_path)) == name
