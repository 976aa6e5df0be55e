"""ReportContent to one FHIR R4 transaction: Device, Observations, DocumentReferences, DiagnosticReport.

Every entry is a conditional create on an identifier that is derived from the result, so that the same report sent
twice makes nothing twice. Patient and ImagingStudy belong to the EMR and the PACS: they are referenced, never created.
Authorship is in `Observation.device` and `DocumentReference.author`; there is no Provenance, because R4 gives it no
identifier and a retry would repeat it. Built with fhir.resources' R4B models from fields that R4 (4.0.1) has as well.
"""

from __future__ import annotations

import hashlib
import math
import re
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from fhir.resources.R4B.bundle import Bundle
from pydantic import ValidationError

from emr import codes
from emr.capability import Capability
from emr.content import Code, ReportCheck, ReportContent, ReportObject, ReportSegment, Verdict
from emr.errors import ReportInvalid

_NAMESPACE = uuid.UUID("9caa7875-59d6-440b-9854-c38dd386b905")
_TITLES = {
    "SEG": "AI segmentation (DICOM SEG), not reviewed",
    "SC": "AI segmentation as pictures (DICOM SC), not reviewed",
    "SR": "AI measurements (DICOM SR), not reviewed",
}
# One document for the image in whatever form a PACS took it, so that a later version of the study finds it again.
_DOCUMENTS = {"SEG": "seg", "SC": "seg", "SR": "sr"}
_PATIENT = re.compile(r"Patient/[A-Za-z0-9.-]{1,64}")
Json = dict[str, Any]


def build_bundle(content: ReportContent, patient_reference: str, capability: Capability | None = None) -> Bundle:
    """The transaction for one result. `patient_reference` is literal: `Patient/<id>`.

    Resource types that the server says it cannot create are left out where the report stands without them (Device,
    DocumentReference). Raises ReportInvalid if the result would not be valid R4.
    """
    if not _PATIENT.fullmatch(patient_reference):
        raise ReportInvalid("the patient reference must be literal: Patient/<id>")
    able = capability or Capability()
    subject = subject_reference(content, patient_reference)
    entries: list[Json] = []
    device = _reference("Device", device_identifier(content))
    if able.can_create("Device"):
        entries.append(_entry(_device(content)))
        device = {"reference": entries[0]["fullUrl"]}
    results = [_volume(content, segment, subject, device) for segment in content.segments]
    results.append(_quality(content, subject, device))
    result_entries = [_entry(resource) for resource in results]
    entries += result_entries
    if able.can_create("DocumentReference"):
        entries += [_entry(_document(content, item, subject, device)) for item in content.objects]
    report = _diagnostic_report(content, subject, [e["fullUrl"] for e in result_entries])
    entries.append(_entry(report))
    return validated({"resourceType": "Bundle", "type": "transaction", "entry": entries})


def validated(bundle: Json) -> Bundle:
    """fhir.resources' model of `bundle`, after the checks that fhir.resources leaves out. Raises ReportInvalid."""
    faults = list(binding_faults(bundle))
    if faults:
        raise ReportInvalid("; ".join(faults))
    try:
        return Bundle.model_validate(bundle)
    except ValidationError as error:
        where = sorted({".".join(str(p) for p in e["loc"]) + ": " + e["type"] for e in error.errors()})
        raise ReportInvalid("not valid FHIR: " + "; ".join(where)) from None  # the chained text would hold the values


def binding_faults(resource: Json) -> Iterator[str]:
    """Codes outside their required binding and references to a type that the element does not allow."""
    yield from _faults(resource, resource.get("resourceType", "?"))


def _faults(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _faults(item, path)
        return
    allowed = codes.REQUIRED_BINDINGS.get(path)
    if allowed is not None and node not in allowed:
        yield f"{path}: {str(node)[:40]!r} is not in the required value set"
    if not isinstance(node, dict):
        return
    targets = codes.REFERENCE_TARGETS.get(path)
    if targets is not None:
        kind = node.get("type") or str(node.get("reference", "")).partition("/")[0]
        if kind and not kind.startswith(("urn:", "http", "#")) and kind not in targets:
            yield f"{path}: may not refer to {kind[:40]}"
    for key, value in node.items():
        if key == "resource" and isinstance(value, dict):
            yield from _faults(value, value.get("resourceType", "?"))
        else:
            yield from _faults(value, f"{path}.{key}")


def identifier(value: str) -> Json:
    """An Identifier of ours; `value` must survive an unescaped search parameter."""
    if not re.fullmatch(r"[A-Za-z0-9.-]{1,128}", value):
        raise ReportInvalid("an identifier of ours may hold letters, digits, dots and hyphens only")
    return {"system": codes.IDENTIFIER_SYSTEM, "value": value}


def search_token(value: str) -> str:
    """`identifier=system|value`, encoded, as ifNoneExist and If-None-Exist take it."""
    return f"identifier={quote(codes.IDENTIFIER_SYSTEM, safe=':')}%7C{quote(value, safe='')}"


def device_identifier(content: ReportContent) -> str:
    """Stable for the same model (name, version, weights) in the same gateway version; shared by its reports."""
    model = content.model
    parts = "\n".join((model.name, model.version, model.weights_digest, content.software_version))
    return "device." + hashlib.sha256(parts.encode("utf-8")).hexdigest()[:32]


def subject_reference(content: ReportContent, patient_reference: str) -> Json:
    """Literal reference to the EMR's Patient, with the name as the images have it for people to compare."""
    shown = person_display(content.patient_name) if content.patient_name else ""
    return {"reference": patient_reference, "type": "Patient"} | ({"display": shown} if shown else {})


def person_display(name: str) -> str:
    """A PN value (PS3.5 6.2.1.2) for a reader: `Family, Given Middle`, other writings in parentheses."""
    groups = []
    for group in name.split("="):
        parts = [" ".join(part.split()) for part in group.split("^")] + [""] * 5
        given = " ".join(p for p in parts[1:3] if p)
        shown = ", ".join(p for p in (parts[0], given) if p)
        shown = " ".join(p for p in (parts[3], shown, parts[4]) if p)
        if shown:
            groups.append(shown)
    return groups[0] + "".join(f" ({g})" for g in groups[1:]) if groups else ""


def study_reference(content: ReportContent) -> Json:
    """ImagingStudy by identifier: the PACS side owns it, and its id at this server is not known."""
    return {
        "type": "ImagingStudy",
        "identifier": {"system": codes.DICOM_UID, "value": f"urn:oid:{content.study_instance_uid}"},
    }


def series_reference(content: ReportContent) -> Json:
    """The source series, by identifier alone: R4 has no resource for a series."""
    return {
        "identifier": {"system": codes.DICOM_UID, "value": f"urn:oid:{content.series.series_instance_uid}"},
        "display": content.series.shown,
    }


def effective(content: ReportContent) -> Json:
    """`effectiveDateTime`: the day of the study, or a stated absence where the images have no date."""
    if content.study_date is not None:
        return {"effectiveDateTime": content.study_date.isoformat()}
    absent = {"url": codes.DATA_ABSENT_EXTENSION, "valueCode": "unknown"}
    return {"_effectiveDateTime": {"extension": [absent]}}


def conclusion(content: ReportContent) -> str:
    """One line for the EMR's list view; says first that no person has looked at it."""
    model = content.model
    text = f"AI result, not reviewed. {len(content.segments)} segment(s) by {model.name} {model.version} "
    text += f"in {content.series.shown}."
    if content.verdict is Verdict.REVIEW:
        flagged = [check.name for check in content.checks if check.verdict is not Verdict.PASS]
        text += " Quality checks ask for review" + (f": {', '.join(flagged)}." if flagged else ".")
    if content.supersedes_result_id is not None:
        text += " Replaces an earlier AI result of this series."
    return text


def object_document_identifier(content: ReportContent, item: ReportObject) -> str:
    """Identifier value of the DocumentReference to one DICOM object of the result."""
    return f"{content.result_id}.{_DOCUMENTS[item.role]}"


def object_identifier(item: ReportObject) -> Json:
    """The SOP Instance UID as a FHIR Identifier."""
    return {"system": codes.URI, "value": f"urn:oid:{item.sop_instance_uid}"}


def _reference(resource_type: str, value: str) -> Json:
    return {"type": resource_type, "identifier": identifier(value)}


def _entry(resource: Json) -> Json:
    kind, value = resource["resourceType"], resource["identifier"][0]["value"]
    return {
        "fullUrl": f"urn:uuid:{uuid.uuid5(_NAMESPACE, f'{kind}/{value}')}",
        "resource": resource,
        "request": {"method": "POST", "url": kind, "ifNoneExist": search_token(value)},
    }


def _device(content: ReportContent) -> Json:
    model = content.model
    return {
        "resourceType": "Device",
        "identifier": [identifier(device_identifier(content))],
        "status": "active",
        "deviceName": [{"name": model.name, "type": "model-name"}],
        "type": codes.concept(codes.ARTIFICIAL_INTELLIGENCE, "AI segmentation model"),
        "version": [
            {"value": model.version},
            {"type": codes.own_concept("weights-digest"), "value": model.weights_digest},
            {"type": codes.own_concept("software-version"), "value": content.software_version},
        ],
    }


def _observation(content: ReportContent, value: str, code: Json, subject: Json, device: Json) -> Json:
    return {
        "resourceType": "Observation",
        "identifier": [identifier(value)],
        "partOf": [study_reference(content)],
        "derivedFrom": [
            {
                **study_reference(content),
                "display": f"{content.series.shown}; Series Instance UID {content.series.series_instance_uid}",
            }
        ],
        "status": "preliminary",
        "category": [codes.hl7_concept(codes.OBSERVATION_CATEGORY, "imaging", "Imaging")],
        "code": code,
        "subject": subject,
        **effective(content),
        "issued": content.issued.isoformat(timespec="seconds"),
        "device": device,
    }


def _volume(content: ReportContent, segment: ReportSegment, subject: Json, device: Json) -> Json:
    components: list[Json] = [
        {"code": codes.own_concept("voxel-count"), "valueQuantity": codes.quantity(segment.voxels, "voxels", "1")}
    ]
    if segment.laterality is not None:
        side = codes.LEFT if segment.laterality == "left" else codes.RIGHT
        components.append({"code": codes.concept(codes.LATERALITY), "valueCodeableConcept": codes.concept(side)})
    for name, value, unit in (
        ("mean-confidence", segment.confidence, "1"),
        ("mean-intensity", segment.mean_intensity, segment.intensity_unit),
        ("dice-coefficient", segment.dice, "1"),
    ):
        if value is not None:
            shown = round(value, 4)
            components.append({"code": codes.own_concept(name), "valueQuantity": codes.quantity(shown, unit, unit)})
    code = codes.VOLUME
    return _observation(
        content, f"{content.result_id}.volume.{segment.number}", codes.concept(code), subject, device
    ) | {
        "bodySite": codes.concept(segment.code, _site_text(segment.name, segment.code, segment.laterality)),
        "method": codes.concept(codes.SUM_OF_VOXELS),
        "valueQuantity": codes.quantity(round(segment.volume_ml, 4), "mL", "mL"),
        "component": components,
    }


def _site_text(name: str, code: Code, laterality: str | None) -> str:
    text = name if name.casefold() == code.meaning.casefold() else f"{name} ({code.meaning})"
    return text if laterality is None or laterality in name.casefold() else f"{text}, {laterality}"


def _quality(content: ReportContent, subject: Json, device: Json) -> Json:
    components = [_check(check) for check in content.checks]
    if content.mean_confidence is not None:
        components.append(
            {
                "code": codes.own_concept("mean-confidence"),
                "valueQuantity": codes.quantity(round(content.mean_confidence, 4), "1", "1"),
            }
        )
    value = f"{content.result_id}.quality"
    observation = _observation(content, value, codes.concept(codes.QUALITY_ASSESSMENT), subject, device)
    observation["valueCodeableConcept"] = codes.own_concept(f"verdict-{content.verdict.value}")
    return observation | ({"component": components} if components else {})


def _check(check: ReportCheck) -> Json:
    normal = check.verdict is Verdict.PASS
    component: Json = {
        "code": {
            "coding": [{"system": codes.CODE_SYSTEM, "code": f"check-{check.name.replace('_', '-')}"}],
            "text": check.name,
        },
        "interpretation": [
            codes.hl7_concept(codes.INTERPRETATION, "N" if normal else "A", "Normal" if normal else "Abnormal")
        ],
    }
    if isinstance(check.value, str) and check.value.strip():
        component["valueString"] = check.value
    elif isinstance(check.value, int | float) and math.isfinite(check.value):
        component["valueQuantity"] = codes.quantity(check.value, "1", "1")
    else:
        component["dataAbsentReason"] = codes.hl7_concept(codes.DATA_ABSENT, "not-applicable", "Not Applicable")
    if check.limit is not None and str(check.limit).strip():
        component["referenceRange"] = [{"text": f"limit {check.limit}"}]
    return component


def _document(content: ReportContent, item: ReportObject, subject: Json, device: Json) -> Json:
    title = _TITLES[item.role]
    document: Json = {
        "resourceType": "DocumentReference",
        "masterIdentifier": object_identifier(item),
        "identifier": [identifier(object_document_identifier(content, item))],
        "status": "current",
        "docStatus": "preliminary",
        "type": codes.concept(codes.IMAGING_REPORT) if item.role == "SR" else {"text": title},
        "category": [codes.concept(codes.RADIOLOGY_LOINC)],
        "subject": subject,
        "date": content.issued.isoformat(timespec="seconds"),
        "author": [device],
        "description": f"{title}; {content.series.shown}",
        "content": [
            {
                "attachment": {
                    "contentType": "application/dicom",
                    "url": _object_url(content, item),
                    "title": title,
                },
                "format": {"system": codes.URI, "code": f"urn:oid:{item.sop_class_uid}"},
            }
        ],
        "context": {"related": [study_reference(content), series_reference(content)]},
    }
    if content.institution:
        document["custodian"] = {"type": "Organization", "display": content.institution}
    if content.supersedes_result_id is not None:
        former = _reference("DocumentReference", f"{content.supersedes_result_id}.{_DOCUMENTS[item.role]}")
        document["relatesTo"] = [{"code": "replaces", "target": former}]
    return document


def _object_url(content: ReportContent, item: ReportObject) -> str:
    if content.wado_root is None:
        return f"urn:oid:{item.sop_instance_uid}"
    return (
        f"{content.wado_root.rstrip('/')}/studies/{content.study_instance_uid}"
        f"/series/{item.series_instance_uid}/instances/{item.sop_instance_uid}"
    )


def _diagnostic_report(content: ReportContent, subject: Json, results: list[str]) -> Json:
    report: Json = {
        "resourceType": "DiagnosticReport",
        "identifier": [identifier(content.result_id)],
        "status": "preliminary",
        "category": [
            codes.hl7_concept(codes.DIAGNOSTIC_SERVICE, "RAD", "Radiology"),
            codes.concept(codes.RADIOLOGY_LOINC),
        ],
        "code": codes.concept(codes.IMAGING_REPORT),
        "subject": subject,
        **effective(content),
        "issued": content.issued.isoformat(timespec="seconds"),
        "result": [{"reference": url} for url in results],
        "imagingStudy": [study_reference(content)],
        "conclusion": conclusion(content),
    }
    if content.accession_number:
        order = {
            "type": codes.hl7_concept(codes.IDENTIFIER_TYPE, "ACSN", "Accession ID"),
            "value": content.accession_number,
        }
        report["basedOn"] = [{"type": "ServiceRequest", "identifier": order}]
    if content.institution:
        report["performer"] = [{"type": "Organization", "display": content.institution}]
    return report
