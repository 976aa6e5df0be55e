"""What a FHIR server says it can do: its CapabilityStatement, reduced to what the report depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# R4 and R4B; the report uses only what both have.
_VERSIONS = ("4.0", "4.3")


@dataclass(frozen=True, kw_only=True)
class Capability:
    """None means: the server does not say; the client then tries and reads the answer."""

    fhir_version: str | None = None
    software: str | None = None
    transaction: bool | None = None
    # Resource type to the interactions it states ("create", "search-type", ...), empty = listed without any;
    # None = no list at all.
    interactions: Mapping[str, frozenset[str]] | None = None
    conditional_create: frozenset[str] = field(default_factory=frozenset)  # types that state it

    @property
    def version_fits(self) -> bool:
        return self.fhir_version is None or self.fhir_version.startswith(_VERSIONS)

    def can_create(self, resource_type: str) -> bool:
        """False only where the server lists its resources and this one is not among them or cannot be created."""
        if self.interactions is None:
            return True
        stated = self.interactions.get(resource_type)
        return stated is not None and (not stated or "create" in stated)

    @property
    def takes_report(self) -> bool:
        """False where the server says no to the transaction or to its two indispensable types."""
        return self.transaction is not False and self.can_create("DiagnosticReport") and self.can_create("Observation")


def capability_from(statement: Mapping[str, Any]) -> Capability:
    """Read a CapabilityStatement (R4). Parts that are missing or of a wrong shape count as not said."""
    server = _server(statement)
    software = _mapping(statement.get("software")).get("name")
    version = statement.get("fhirVersion")
    listed = _mappings(server.get("resource"))
    modes = {str(i.get("code")) for i in _mappings(server.get("interaction"))}
    transaction: bool | None = "transaction" in modes if modes else None
    interactions = {
        str(resource.get("type")): frozenset(str(i.get("code")) for i in _mappings(resource.get("interaction")))
        for resource in listed
    }
    return Capability(
        fhir_version=version if isinstance(version, str) else None,
        software=software if isinstance(software, str) else None,
        transaction=transaction,
        interactions=interactions if any(interactions.values()) else None,
        conditional_create=frozenset(str(r.get("type")) for r in listed if r.get("conditionalCreate") is True),
    )


def _server(statement: Mapping[str, Any]) -> Mapping[str, Any]:
    for rest in _mappings(statement.get("rest")):
        if rest.get("mode") == "server":
            return rest
    return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
