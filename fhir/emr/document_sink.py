"""The fallback for servers that refuse the transaction: one DocumentReference that carries the report as HTML."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from typing import Any

from fhir.resources.R4B.documentreference import DocumentReference
from pydantic import ValidationError

from emr import codes
from emr.content import ReportContent, ReportSegment, Verdict
from emr.errors import ReportInvalid
from emr.report import (
    binding_faults,
    conclusion,
    device_identifier,
    identifier,
    series_reference,
    study_reference,
    subject_reference,
)


def document_identifier(content: ReportContent) -> str:
    """Identifier value of the document, for If-None-Exist."""
    return f"{content.result_id}.document"


def build_document(content: ReportContent, patient_reference: str) -> DocumentReference:
    """The whole report as one DocumentReference; the model is named in the document and as logical author."""
    page = render_html(content).encode("utf-8")
    resource: dict[str, Any] = {
        "resourceType": "DocumentReference",
        "identifier": [identifier(document_identifier(content))],
        "status": "current",
        "docStatus": "preliminary",
        "type": codes.concept(codes.IMAGING_REPORT),
        "category": [codes.concept(codes.RADIOLOGY_LOINC)],
        "subject": subject_reference(content, patient_reference),
        "date": content.issued.isoformat(timespec="seconds"),
        "author": [
            {
                "type": "Device",
                "identifier": identifier(device_identifier(content)),
                "display": f"{content.model.name} {content.model.version}",
            }
        ],
        "description": conclusion(content),
        "content": [
            {
                "attachment": {
                    "contentType": "text/html; charset=utf-8",
                    "language": "en",
                    "data": base64.b64encode(page).decode("ascii"),
                    "size": len(page),
                    # FHIR R4 prescribes SHA-1 for Attachment.hash; it guards against truncation only.
                    "hash": base64.b64encode(hashlib.sha1(page, usedforsecurity=False).digest()).decode("ascii"),
                    "title": "AI segmentation result, not reviewed",
                }
            }
        ],
        "context": {"related": [study_reference(content), series_reference(content)]},
    }
    if content.institution:
        resource["custodian"] = {"type": "Organization", "display": content.institution}
    if content.supersedes_result_id is not None:
        former = {"type": "DocumentReference", "identifier": identifier(f"{content.supersedes_result_id}.document")}
        resource["relatesTo"] = [{"code": "replaces", "target": former}]
    faults = list(binding_faults(resource))
    if faults:
        raise ReportInvalid("; ".join(faults))
    try:
        return DocumentReference.model_validate(resource)
    except ValidationError as error:
        where = sorted({".".join(str(p) for p in e["loc"]) for e in error.errors()})
        raise ReportInvalid("not valid FHIR: " + ", ".join(where)) from None  # the chained text would hold the values


def render_html(content: ReportContent) -> str:
    """A page without script, style sheet or link to anything: what the report says, for a person."""
    model = content.model
    facts = [
        ("Study Instance UID", content.study_instance_uid),
        ("Images", content.series.shown),
        ("Series Instance UID", content.series.series_instance_uid),
        ("Study date", content.study_date.isoformat() if content.study_date else "unknown"),
        ("Accession number", content.accession_number or "none"),
        ("Model", f"{model.name} {model.version}"),
        ("Weights (SHA-256)", model.weights_digest),
        ("Software", f"seggate {content.software_version}"),
        ("Issued", content.issued.isoformat(timespec="seconds")),
        ("Quality verdict", content.verdict.value),
    ]
    facts += [(f"DICOM {item.role}", item.sop_instance_uid) for item in content.objects]
    head = ("Structure", "Side", "Volume (mL)", "Voxels", "Confidence", "Mean intensity", "Dice")
    checks = [(c.name, _shown(c.value), _shown(c.limit), c.verdict.value) for c in content.checks]
    sections = [
        f"<p>{escape(conclusion(content))}</p>",
        _table(("Item", "Value"), facts),
        "<h2>Volumes</h2>",
        _table(head, [_segment_row(segment) for segment in content.segments]),
    ]
    if checks:
        sections += ["<h2>Quality checks</h2>", _table(("Check", "Value", "Limit", "Verdict"), checks)]
    title = "AI segmentation result, not reviewed"
    if content.verdict is Verdict.REVIEW:
        title += "; quality checks ask for review"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title></head>\n<body><h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n"
        "</body></html>\n"
    )


def _segment_row(segment: ReportSegment) -> tuple[str, ...]:
    return (
        f"{segment.name} ({segment.code.scheme} {segment.code.value}, {segment.code.meaning})",
        segment.laterality or "",
        f"{segment.volume_ml:.2f}",
        str(segment.voxels),
        _shown(segment.confidence),
        "" if segment.mean_intensity is None else f"{_shown(segment.mean_intensity)} {segment.intensity_unit}",
        _shown(segment.dice),
    )


def _shown(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table>"
