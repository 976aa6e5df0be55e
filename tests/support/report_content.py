"""Report contents for tests: deterministic, from one organ to 104, sparse or full."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Literal

from emr.content import (
    Code,
    ReportCheck,
    ReportContent,
    ReportModel,
    ReportObject,
    ReportSegment,
    ReportSeries,
    Verdict,
)

STUDY_UID = "1.2.826.0.1.3680043.8.498.1"
SERIES_UID = "1.2.826.0.1.3680043.8.498.2"
PATIENT_SYSTEM = "urn:oid:1.2.36.146.595.217.0.1"
PATIENT_ID = "P|0,4$7\\1"  # every character that a FHIR search parameter has to escape
PATIENT_NAME = "Yamada^Tarou=山田^太郎=やまだ^たろう"
ACCESSION = "ACC-778812"
LIVER = Code(scheme="SCT", value="10200004", meaning="Liver")

_SIDES: tuple[Literal["left", "right"] | None, ...] = (None, "left", "right")


def report_segment(number: int, *, full: bool = True) -> ReportSegment:
    if not full:
        return ReportSegment(number=number, name=f"Organ {number}", code=LIVER, volume_ml=0.0, voxels=0)
    return ReportSegment(
        number=number,
        name=f"Organ {number} Ärzte",
        code=LIVER if number % 2 else Code(scheme="99SEGGATE", value=f"organ{number}", meaning=f"Organ {number}"),
        laterality=_SIDES[number % 3],
        volume_ml=1.23456789 * number,
        voxels=1000 * number,
        confidence=0.9,
        mean_intensity=-12.5,
        intensity_unit="[hnsf'U]",
        dice=0.87,
    )


def report_content(
    organs: int = 2, *, full: bool = True, result_id: str = "a3f0c1d2e4b5968778695a4b3c2d1e0f", **changes: object
) -> ReportContent:
    """A content with `organs` segments; `full=False` leaves out everything optional."""
    values: dict[str, object] = {
        "result_id": result_id,
        "study_instance_uid": STUDY_UID,
        "series": ReportSeries(series_instance_uid=SERIES_UID),
        "patient_id": PATIENT_ID,
        "model": ReportModel(name="hippocampus-mr", version="1.0.0", weights_digest="ab" * 32),
        "segments": tuple(report_segment(n + 1, full=full) for n in range(organs)),
        "verdict": Verdict.PASS,
        "checks": (),
        "objects": (),
        "issued": datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC),
        "software_version": "0.1.0",
    }
    if full:
        values |= {
            "verdict": Verdict.REVIEW,
            "checks": (
                ReportCheck(name="empty", value=0, limit=1, verdict=Verdict.PASS),
                ReportCheck(name="touches_border", value="superior", limit=None, verdict=Verdict.REVIEW),
                ReportCheck(name="fold-dice", value=None, limit=0.7, verdict=Verdict.PASS),
            ),
            "objects": (
                ReportObject(
                    role="SEG",
                    sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4",
                    sop_instance_uid="2.25.11",
                    series_instance_uid="2.25.12",
                ),
                ReportObject(
                    role="SR",
                    sop_class_uid="1.2.840.10008.5.1.4.1.1.88.34",
                    sop_instance_uid="2.25.21",
                    series_instance_uid="2.25.22",
                ),
            ),
            "series": ReportSeries(
                series_instance_uid=SERIES_UID, number=3, description="T1 koronar, Hippocampus", part="EchoTime=4.9"
            ),
            "accession_number": ACCESSION,
            "study_date": date(2026, 3, 1),
            "issuer_of_patient_id": "HOSPITAL",
            "patient_name": PATIENT_NAME,
            "mean_confidence": 0.93,
            "wado_root": "https://pacs.example/dicom-web/",
            "supersedes_result_id": "b" * 32,
            "institution": "Hôpital Général",
        }
    return ReportContent(**(values | changes))  # type: ignore[arg-type]
