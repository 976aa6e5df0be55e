"""Reading a searchset: what the search itself found, and the one Patient that a report may refer to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emr.errors import PatientNotResolved

ID = r"[A-Za-z0-9.-]{1,64}"  # FHIR R4 data type id


def escaped(value: str) -> str:
    """FHIR search escaping of a parameter value (R4 search 3.1.1.3)."""
    return re.sub(r"([\\$,|])", r"\\\1", value)


def matches(bundle: Mapping[str, Any], resource_type: str) -> list[Mapping[str, Any]]:
    """Resources of a searchset that the search itself found (not included ones, not outcomes)."""
    found: list[Mapping[str, Any]] = []
    entries = bundle.get("entry")
    for entry in entries if isinstance(entries, list) else []:
        resource = entry.get("resource") if isinstance(entry, dict) else None
        search = entry.get("search") if isinstance(entry, dict) else None
        mode = search.get("mode", "match") if isinstance(search, dict) else "match"
        if isinstance(resource, dict) and resource.get("resourceType") == resource_type and mode == "match":
            found.append(resource)
    return found


def has_identifier(resource: Mapping[str, Any], system: str, value: str) -> bool:
    """Whether the resource carries exactly this identifier."""
    identifiers = resource.get("identifier")
    return any(
        isinstance(i, dict) and i.get("system") == system and i.get("value") == value
        for i in (identifiers if isinstance(identifiers, list) else [])
    )


def single_patient(bundle: Mapping[str, Any], system: str, patient_id: str) -> str:
    """`Patient/<id>` if the searchset holds exactly one usable Patient with this identifier.

    Raises PatientNotResolved otherwise; a server that ignored the parameter and returned everybody is found out.
    """
    patients = matches(bundle, "Patient")
    links = bundle.get("link")
    more = any(isinstance(k, dict) and k.get("relation") == "next" for k in (links if isinstance(links, list) else []))
    total = bundle.get("total")
    count = max(len(patients), total if isinstance(total, int) else 0)
    if count == 0:
        raise PatientNotResolved("no Patient has the configured identifier; report held")
    if count > 1 or more:
        raise PatientNotResolved("more than one Patient has the configured identifier; report held")
    patient = patients[0] if patients else {}
    if not has_identifier(patient, system, patient_id):
        raise PatientNotResolved("the Patient that the server returned does not have the identifier; report held")
    links_of = patient.get("link")
    replaced = any(
        isinstance(k, dict) and k.get("type") == "replaced-by" for k in (links_of if isinstance(links_of, list) else [])
    )
    if patient.get("active") is False or replaced:
        raise PatientNotResolved("the only Patient with the identifier is inactive or replaced; report held")
    reference = literal_reference(f"Patient/{patient.get('id')}", "Patient")
    if reference is None:
        raise PatientNotResolved("the Patient that the server returned has no usable id; report held")
    return reference


def literal_reference(location: str | None, resource_type: str) -> str | None:
    """`Type/id` out of a location such as `https://host/fhir/Type/id/_history/1`."""
    match = re.search(rf"(?:^|/)({resource_type}/{ID})(?:/_history/{ID})?\Z", location or "")
    return match.group(1) if match else None
