"""What one report says: the values that a result hands to the EMR side, checked once, here.

Nothing in this module knows FHIR. The same content always makes the same report, byte for byte, so that a retry
creates nothing twice (EMR-47); therefore the caller fixes `issued` once per result and keeps it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from typing import Literal

from emr.errors import ReportInvalid

# PS3.5 9.1: dotted decimal, no leading zeros, at most 64 characters.
_UID = re.compile(r"(?=.{1,64}\Z)(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*")
# A `|` in an identifier value breaks ifNoneExist at real servers, so identifiers of ours use these characters only.
_IDENTIFIER = re.compile(r"[A-Za-z0-9.-]{1,64}")


class Verdict(StrEnum):
    """Verdict of the QA module (CARD-02); a held result never becomes a report."""

    PASS = "pass"  # noqa: S105 - a verdict
    REVIEW = "review"
    HOLD = "hold"


@dataclass(frozen=True, kw_only=True)
class Code:
    """A coded concept as DICOM writes it: coding scheme designator, code value, code meaning (PS3.3 8)."""

    scheme: str  # "SCT", "DCM", "LN", "UCUM" or a private 99... designator
    value: str
    meaning: str

    def __post_init__(self) -> None:
        if not (self.scheme.strip() and self.value.strip() and self.meaning.strip()):
            raise ReportInvalid("a code needs scheme, value and meaning; correct the labels in bundle.json")


@dataclass(frozen=True, kw_only=True)
class ReportSegment:
    """One organ. `number` is the Segment Number (0062,0004) in the SEG and unique within the report."""

    number: int
    name: str
    code: Code
    laterality: Literal["left", "right"] | None = None
    volume_ml: float
    voxels: int
    confidence: float | None = None  # mean over the segment's voxels, 0 to 1
    mean_intensity: float | None = None
    intensity_unit: str = "1"  # UCUM, e.g. "[hnsf'U]" for CT; "1" where the values have no unit
    dice: float | None = None  # against a reference segmentation, where one exists

    def __post_init__(self) -> None:
        where = f"segment {self.number}"
        if self.number < 1:
            raise ReportInvalid(f"{where}: segment numbers start at 1")
        if not self.name.strip():
            raise ReportInvalid(f"{where}: the name is empty")
        if not (math.isfinite(self.volume_ml) and self.volume_ml >= 0) or self.voxels < 0:
            raise ReportInvalid(f"{where}: volume_ml {self.volume_ml} and voxels {self.voxels} must be at least 0")
        _fraction(self.confidence, f"{where}: confidence")
        _fraction(self.dice, f"{where}: dice")
        if self.mean_intensity is not None and not math.isfinite(self.mean_intensity):
            raise ReportInvalid(f"{where}: mean_intensity is not a finite number")


@dataclass(frozen=True, kw_only=True)
class ReportCheck:
    """One QA check: a name such as `touches-border`, the value found, the limit it was held against, the verdict."""

    name: str
    value: float | str | None
    limit: float | str | None
    verdict: Verdict

    def __post_init__(self) -> None:
        if not _IDENTIFIER.fullmatch(self.name.replace("_", "-")):
            raise ReportInvalid("a check's name must be 1 to 64 letters, digits, dots, hyphens or underscores")


@dataclass(frozen=True, kw_only=True)
class ReportSeries:
    """The images that the result was made from. `number` and `description` are (0020,0011) and (0008,103E); `part`
    says which volume of a series that holds several. The texts are the site's own and may say anything: not in repr."""

    series_instance_uid: str
    number: int | None = None
    description: str = field(default="", repr=False)
    part: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        _uid(self.series_instance_uid, "the source's series_instance_uid")

    @property
    def shown(self) -> str:
        """`series 3 (T1 axial), part EchoTime=4.9`; its UID where the images have neither number nor description."""
        number = "" if self.number is None else str(self.number)
        description = _line(self.description)
        name = " ".join(filter(None, (number, f"({description})" if description else "")))
        part = _line(self.part)
        return f"series {name or self.series_instance_uid}" + (f", part {part}" if part else "")


@dataclass(frozen=True, kw_only=True)
class ReportObject:
    """A DICOM object of the result at the PACS."""

    role: Literal["SEG", "SC", "SR"]
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str

    def __post_init__(self) -> None:
        for name in ("sop_class_uid", "sop_instance_uid", "series_instance_uid"):
            _uid(getattr(self, name), f"{self.role} {name}")


@dataclass(frozen=True, kw_only=True)
class ReportModel:
    """What made the result: name, version and weights digest (SHA-256, hex) of the model bundle."""

    name: str
    version: str
    weights_digest: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.weights_digest):
            raise ReportInvalid("weights_digest is not a SHA-256 in lower-case hex")
        if not (self.name and self.version):
            raise ReportInvalid("the model's name and version are required")


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that goes into one report (ART-25). Raises ReportInvalid where a value cannot be reported.

    `patient_id` and `issuer_of_patient_id` are (0010,0020) and (0010,0021) without padding; the EMR's Patient is
    searched by the first. `patient_name` is the decoded PN value, used for display only. What identifies the patient is
    not in the repr, so that no traceback or log shows it.
    """

    result_id: str
    study_instance_uid: str
    series: ReportSeries
    patient_id: str = field(repr=False)
    model: ReportModel
    segments: tuple[ReportSegment, ...]
    verdict: Verdict
    checks: tuple[ReportCheck, ...]
    objects: tuple[ReportObject, ...]
    issued: datetime
    software_version: str
    accession_number: str | None = field(default=None, repr=False)
    study_date: date | None = None
    issuer_of_patient_id: str | None = None
    patient_name: str | None = field(default=None, repr=False)
    mean_confidence: float | None = None
    wado_root: str | None = None  # DICOMweb root under which the EMR's users reach the PACS
    supersedes_result_id: str | None = None
    institution: str = ""

    def __post_init__(self) -> None:
        if not _IDENTIFIER.fullmatch(self.result_id):
            raise ReportInvalid("result_id must be 1 to 64 letters, digits, dots or hyphens")
        if self.supersedes_result_id is not None and not _IDENTIFIER.fullmatch(self.supersedes_result_id):
            raise ReportInvalid("supersedes_result_id must be 1 to 64 letters, digits, dots or hyphens")
        _uid(self.study_instance_uid, "study_instance_uid")
        if not self.segments:
            raise ReportInvalid("a report needs at least one segment (EMR-47)")
        numbers = [s.number for s in self.segments]
        if len(set(numbers)) != len(numbers):
            raise ReportInvalid("two segments have the same number")
        if self.verdict is Verdict.HOLD or any(c.verdict is Verdict.HOLD for c in self.checks):
            raise ReportInvalid("the QA verdict is hold: nothing leaves for the EMR")
        if self.issued.tzinfo is None:
            raise ReportInvalid("issued has no time zone")
        _fraction(self.mean_confidence, "mean_confidence")
        if self.wado_root is not None and not re.fullmatch(r"https?://[^\s?#@]+", self.wado_root):
            raise ReportInvalid("wado_root must be an http(s) URL without user, query or fragment")


def _line(text: str) -> str:
    """One line of at most 64 characters, as VR LO allows, without what no screen shows."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:64]


def _uid(value: str, name: str) -> None:
    if not _UID.fullmatch(value):
        raise ReportInvalid(f"{name} is not a DICOM UID (PS3.5 9.1)")


def _fraction(value: float | None, name: str) -> None:
    if value is not None and not 0.0 <= value <= 1.0:
        raise ReportInvalid(f"{name} is {value}; it must lie between 0 and 1")
