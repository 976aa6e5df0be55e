"""Code systems, codes and required bindings that the report uses.

Each code was looked up in a published dictionary: DCM, SCT and LOINC values in pydicom 3.0.2's code dictionaries
(`pydicom.sr.codedict`, a test compares them), HL7 tables and bindings in the FHIR R4 definitions, and LOINC
LP29684-5 in the US Core value set us-core-diagnosticreport-category.
"""

from __future__ import annotations

from typing import Any

from emr.content import Code

SNOMED_CT = "http://snomed.info/sct"
LOINC = "http://loinc.org"
DICOM = "http://dicom.nema.org/resources/ontology/DCM"
UCUM = "http://unitsofmeasure.org"
URI = "urn:ietf:rfc:3986"
DICOM_UID = "urn:dicom:uid"  # system of an ImagingStudy identifier; values are urn:oid:<uid>
OBSERVATION_CATEGORY = "http://terminology.hl7.org/CodeSystem/observation-category"
DIAGNOSTIC_SERVICE = "http://terminology.hl7.org/CodeSystem/v2-0074"
IDENTIFIER_TYPE = "http://terminology.hl7.org/CodeSystem/v2-0203"
INTERPRETATION = "http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation"
DATA_ABSENT = "http://terminology.hl7.org/CodeSystem/data-absent-reason"
DATA_ABSENT_EXTENSION = "http://hl7.org/fhir/StructureDefinition/data-absent-reason"

# UUID-derived OIDs (PS3.5 B.2) of this project: identifiers of everything a report creates, and its own codes.
IDENTIFIER_SYSTEM = "urn:oid:2.25.185238798250585779172450109803378926779"
CODE_SYSTEM = "urn:oid:2.25.319329394180411807888678110105210348347"

_SCHEMES = {"SCT": SNOMED_CT, "LN": LOINC, "DCM": DICOM, "UCUM": UCUM}

VOLUME = Code(scheme="SCT", value="118565006", meaning="Volume")
LATERALITY = Code(scheme="SCT", value="272741003", meaning="Laterality")
LEFT = Code(scheme="SCT", value="7771000", meaning="Left")
RIGHT = Code(scheme="SCT", value="24028007", meaning="Right")
SUM_OF_VOXELS = Code(scheme="DCM", value="126030", meaning="Sum of segmented voxel method for volume")
QUALITY_ASSESSMENT = Code(scheme="DCM", value="111050", meaning="Quality Assessment")
ARTIFICIAL_INTELLIGENCE = Code(scheme="DCM", value="123110", meaning="Artificial Intelligence")
IMAGING_REPORT = Code(scheme="LN", value="18748-4", meaning="Diagnostic imaging study")
RADIOLOGY_LOINC = Code(scheme="LN", value="LP29684-5", meaning="Radiology")

# Codes of our own (CODE_SYSTEM): no published dictionary holds these properties of a machine's measurement.
OWN_CODES = {
    "mean-confidence": "Mean confidence of the model over the segmented voxels",
    "voxel-count": "Number of segmented voxels",
    "mean-intensity": "Mean intensity of the segmented voxels",
    "dice-coefficient": "Dice similarity coefficient against a reference segmentation",
    "weights-digest": "SHA-256 of the model's weights",
    "software-version": "Version of the gateway that ran the model",
    "verdict-pass": "All quality checks passed",
    "verdict-review": "A quality check asks for review",
    "summary-document": "Summary of an AI segmentation result",
}

# FHIR R4, strength "required": path (list items are not numbered) to the codes that the standard allows.
REQUIRED_BINDINGS: dict[str, frozenset[str]] = {
    "Bundle.type": frozenset(
        {
            "document",
            "message",
            "transaction",
            "transaction-response",
            "batch",
            "batch-response",
            "history",
            "searchset",
            "collection",
        }
    ),
    "Bundle.entry.request.method": frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"}),
    "DiagnosticReport.status": frozenset(
        {
            "registered",
            "partial",
            "preliminary",
            "final",
            "amended",
            "corrected",
            "appended",
            "cancelled",
            "entered-in-error",
            "unknown",
        }
    ),
    "Observation.status": frozenset(
        {"registered", "preliminary", "final", "amended", "corrected", "cancelled", "entered-in-error", "unknown"}
    ),
    "Device.status": frozenset({"active", "inactive", "entered-in-error", "unknown"}),
    "Device.deviceName.type": frozenset(
        {"udi-label-name", "user-friendly-name", "patient-reported-name", "manufacturer-name", "model-name", "other"}
    ),
    "DocumentReference.status": frozenset({"current", "superseded", "entered-in-error"}),
    "DocumentReference.docStatus": frozenset({"preliminary", "final", "amended", "entered-in-error"}),
    "DocumentReference.relatesTo.code": frozenset({"replaces", "transforms", "signs", "appends"}),
}

# FHIR R4 reference targets of the elements that the report fills; not caught by fhir.resources.
REFERENCE_TARGETS: dict[str, frozenset[str]] = {
    "DiagnosticReport.subject": frozenset({"Patient", "Group", "Device", "Location"}),
    "DiagnosticReport.basedOn": frozenset(
        {"CarePlan", "ImmunizationRecommendation", "MedicationRequest", "NutritionOrder", "ServiceRequest"}
    ),
    "DiagnosticReport.performer": frozenset({"Practitioner", "PractitionerRole", "Organization", "CareTeam"}),
    "DiagnosticReport.result": frozenset({"Observation"}),
    "DiagnosticReport.imagingStudy": frozenset({"ImagingStudy"}),
    "Observation.subject": frozenset({"Patient", "Group", "Device", "Location"}),
    "Observation.device": frozenset({"Device", "DeviceMetric"}),
    "Observation.derivedFrom": frozenset(
        {"DocumentReference", "ImagingStudy", "Media", "QuestionnaireResponse", "Observation", "MolecularSequence"}
    ),
    "Observation.partOf": frozenset(
        {
            "MedicationAdministration",
            "MedicationDispense",
            "MedicationStatement",
            "Procedure",
            "Immunization",
            "ImagingStudy",
        }
    ),
    "DocumentReference.subject": frozenset({"Patient", "Practitioner", "Group", "Device"}),
    "DocumentReference.author": frozenset(
        {"Practitioner", "PractitionerRole", "Organization", "Device", "Patient", "RelatedPerson"}
    ),
    "DocumentReference.custodian": frozenset({"Organization"}),
    "DocumentReference.relatesTo.target": frozenset({"DocumentReference"}),
}


def coding(code: Code) -> dict[str, Any]:
    """FHIR Coding of a DICOM code. A scheme without a published FHIR URI (99...) gets no system: none is invented."""
    system = _SCHEMES.get(code.scheme)
    named = {"system": system} if system else {}
    return {**named, "code": code.value, "display": code.meaning}


def concept(code: Code, text: str | None = None) -> dict[str, Any]:
    """FHIR CodeableConcept of a DICOM code."""
    return {"coding": [coding(code)], "text": text or code.meaning}


def own_concept(code: str) -> dict[str, Any]:
    """FHIR CodeableConcept of one of OWN_CODES."""
    return {"coding": [{"system": CODE_SYSTEM, "code": code, "display": OWN_CODES[code]}], "text": OWN_CODES[code]}


def hl7_concept(system: str, code: str, display: str) -> dict[str, Any]:
    """FHIR CodeableConcept of an HL7 table."""
    return {"coding": [{"system": system, "code": code, "display": display}]}


def quantity(value: float, unit: str, ucum: str) -> dict[str, Any]:
    """FHIR Quantity in UCUM. `unit` is what a reader sees, `ucum` what a machine reads."""
    return {"value": value, "unit": unit, "system": UCUM, "code": ucum}
