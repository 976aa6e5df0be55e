"""A transaction in parts, for servers that limit the size of one; each part refers to earlier ones literally."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

# Medplum's limit for transactions with conditional creates, the smallest known.
PART_ENTRIES = 8


def parts(entries: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Entries in their order (Device, Observations, DocumentReferences, DiagnosticReport), PART_ENTRIES at a time.

    The last part holds the DiagnosticReport, which refers to all Observations.
    """
    for start in range(0, len(entries), PART_ENTRIES):
        yield entries[start : start + PART_ENTRIES]


def resolved(entries: list[dict[str, Any]], known: Mapping[str, str]) -> list[dict[str, Any]]:
    """A copy of the entries in which references to a fullUrl of `known` are literal."""
    copied: list[dict[str, Any]] = json.loads(json.dumps(entries))
    for entry in copied:
        _resolve(entry["resource"], known)
    return copied


def _resolve(node: Any, known: Mapping[str, str]) -> None:
    if isinstance(node, list):
        for item in node:
            _resolve(item, known)
    elif isinstance(node, dict):
        reference = node.get("reference")
        if isinstance(reference, str):
            node["reference"] = known.get(reference, reference)
        for value in node.values():
            _resolve(value, known)
