"""What came of a report at the server, and how it is read from a transaction-response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from emr.errors import Refused, Unavailable
from emr.searchset import literal_reference


@dataclass(frozen=True, kw_only=True)
class ReceiptEntry:
    """One resource of the report at the server. `reference` is None where the server did not say."""

    resource_type: str
    reference: str | None
    created: bool  # False: it was there already


@dataclass(frozen=True, kw_only=True)
class ReportReceipt:
    """`report_id` is the relative reference of the report: `DiagnosticReport/<id>` or `DocumentReference/<id>`."""

    report_id: str
    entries: tuple[ReceiptEntry, ...]
    created: bool  # False: an earlier attempt had already made it
    how: Literal["transaction", "parted-transaction", "document-reference"]
    refusal: str = ""  # what the server said against the transaction, where a DocumentReference had to stand in for it


def receipt_entries(response: Mapping[str, Any], requests: Sequence[Mapping[str, Any]]) -> tuple[ReceiptEntry, ...]:
    """One ReceiptEntry per request entry, in the same order (R4 3.1.0.11.2).

    Raises Unavailable where the answer is incomplete or an entry failed on the server's side, Refused where the server
    refused an entry although it accepted the transaction.
    """
    answers = response.get("entry")
    if not isinstance(answers, list) or len(answers) != len(requests):
        raise Unavailable("transaction: the answer has not one entry per request; asked again, nothing is doubled")
    return tuple(
        _receipt_entry(request["resource"]["resourceType"], answer)
        for request, answer in zip(requests, answers, strict=True)
    )


def _receipt_entry(resource_type: str, answer: Any) -> ReceiptEntry:
    response = answer.get("response") if isinstance(answer, dict) else None
    response = response if isinstance(response, dict) else {}
    status = str(response.get("status", ""))[:3]
    if not status.isdigit() or status.startswith("5"):
        raise Unavailable(f"transaction: {resource_type} answered with status {status or 'none'}")
    if not status.startswith("2"):
        raise Refused(f"transaction: {resource_type} answered with status {status}")
    reference = literal_reference(response.get("location"), resource_type)
    resource = answer.get("resource")
    if reference is None and isinstance(resource, dict):
        reference = literal_reference(f"{resource_type}/{resource.get('id')}", resource_type)
    return ReceiptEntry(resource_type=resource_type, reference=reference, created=status == "201")
