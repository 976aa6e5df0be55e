"""EmrClient: one report to one FHIR server, exactly once however often it is tried (EMR-47).

Capability, Patient search, transaction; where the server refuses the transaction, one DocumentReference. No patient
identifier, name or accession number enters a URL or a message: the Patient is searched by POST with a form body.

Only what a server says against the content is a refusal. Every other status is a matter of how the two are set up.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from emr import codes
from emr.authorization import Authorization, NoAuthorization, require_encryption
from emr.capability import Capability, capability_from
from emr.content import ReportContent
from emr.document_sink import build_document, document_identifier
from emr.errors import CredentialsInvalid, EmrError, Misconfigured, PatientNotResolved, Refused, TryLater, Unavailable
from emr.exchange import Answer, exchange
from emr.outcome import about_content, issue_codes, refused_for_size, summary
from emr.parts import PART_ENTRIES, parts, resolved
from emr.receipt import ReceiptEntry, ReportReceipt, receipt_entries
from emr.report import build_bundle, search_token
from emr.searchset import ID, escaped, has_identifier, literal_reference, matches, single_patient

_FHIR_JSON = "application/fhir+json"
_ADDRESS = "not offered at this address; check the base URL with the EMR's administrator"
_FORMAT = "FHIR as JSON is not taken here; check the base URL with the EMR's administrator"
_TO_DO = {
    401: "the credentials are not accepted; renew them here, or have the EMR's administrator accept them",
    403: "the credentials do not allow this; the EMR's administrator must grant it",
    404: _ADDRESS,
    405: _ADDRESS,
    406: _FORMAT,
    410: _ADDRESS,
    412: "several resources have one identifier of ours; the EMR's administrator must remove the doubles",
    413: "larger than the server allows; the EMR's administrator must raise the limit",
    415: _FORMAT,
    501: _ADDRESS,
}
_STRICT = {"Prefer": "handling=strict"}  # an unknown search parameter is an error, not ignored


@dataclass(frozen=True, kw_only=True)
class EmrEndpoint:
    """Where the EMR is and how its Patients are found.

    `accepted_issuers`: values of Issuer of Patient ID (0010,0021) that mean `patient_identifier_system`; empty = all.
    """

    base_url: str
    patient_identifier_system: str
    authorization: Authorization = NoAuthorization()  # noqa: RUF009 - stateless
    accepted_issuers: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            _ = parts.port  # raises where it is no number
        except ValueError as error:
            raise CredentialsInvalid("the EMR's base URL is not a valid URL") from error
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise CredentialsInvalid("the EMR's base URL must be http(s)://host/path without query and fragment")
        if parts.username or parts.password:
            raise CredentialsInvalid("the EMR's base URL must not hold credentials; use auth = 'basic'")
        if self.authorization.secret:
            require_encryption(self.base_url, "the EMR's base URL")


class EmrClient:
    """Thread-safe. `http` comes from `emr.exchange.open_http` (TLS, time-outs, no redirects); its owner closes it.

    Methods raise Unavailable or Misconfigured (try again), Refused, PatientNotResolved or ReportInvalid.
    """

    def __init__(self, endpoint: EmrEndpoint, http: httpx.Client) -> None:
        self._endpoint = endpoint
        self._base = endpoint.base_url.rstrip("/")
        self._http = http
        self._capability: Capability | None = None
        self._lock = threading.Lock()

    def capability(self) -> Capability:
        """The server's CapabilityStatement. A server without one is taken as saying nothing.

        One that was read is kept until the server refuses something; one that was not is asked for again.
        """
        with self._lock:
            if self._capability is None:
                self._capability = self._read_capability()
            return self._capability or Capability()

    def close(self) -> None:
        """Close the connections of `http`, for callers that were handed the client alone."""
        self._http.close()

    def find_patient(self, patient_id: str, issuer: str | None = None) -> str:
        """`Patient/<id>` of the one active Patient with the configured identifier system and this value.

        The answer is checked here as well: a server that ignores the parameter returns everybody. Raises
        PatientNotResolved for none, more than one, or one that is inactive or replaced.
        """
        accepted = self._endpoint.accepted_issuers
        if accepted and (issuer or "") not in accepted:
            raise PatientNotResolved("Issuer of Patient ID (0010,0021) is not one that this EMR accepts; report held")
        if not patient_id.strip():
            raise PatientNotResolved("Patient ID (0010,0020) is empty; report held")
        system = self._endpoint.patient_identifier_system
        what = "Patient search"
        answer = self._request(
            "POST",
            f"{self._base}/Patient/_search",
            what=what,
            headers=_STRICT,
            form={"identifier": f"{escaped(system)}|{escaped(patient_id)}", "_count": "2"},
        )
        if answer.status in {400, 422}:
            # It may be this one identifier that the server cannot search for.
            words = f"{what}: HTTP {answer.status}: {summary(answer, [patient_id])}"
            raise Misconfigured(f"{words}; the server must take searches by POST with identifier", whole=False)
        if answer.status != 200:
            raise _misconfigured(answer, f"{what} by POST", [patient_id])
        return single_patient(_searchset(answer, what), system, patient_id)

    def send(self, content: ReportContent) -> ReportReceipt:
        """Bring the report to the EMR; sending the same content again creates nothing and returns the same id."""
        try:
            capability = self.capability()
            if not capability.version_fits:
                spoken = str(capability.fhir_version)[:16]
                raise Misconfigured(
                    f"the server speaks FHIR {spoken}; configure the base URL of its R4 (4.0.1) interface"
                )
            patient = self.find_patient(content.patient_id, content.issuer_of_patient_id)
            try:
                return self._bring(content, patient, capability)
            except TryLater as error:
                raise type(error)(str(error), whole=False) from error
        except Misconfigured:
            self._forget_capability()  # it may be mended by now, and says so in its statement
            raise

    def _bring(self, content: ReportContent, patient: str, capability: Capability) -> ReportReceipt:
        """By transaction, else as one document."""
        refusal = ""
        if capability.takes_report:
            try:
                receipt = self._send_transaction(content, patient, capability)
            except Refused as error:
                if not capability.can_create("DocumentReference"):
                    raise
                refusal = str(error)
            else:
                if receipt is not None:
                    return receipt
        if not capability.can_create("DocumentReference"):
            raise Misconfigured(
                "the server takes neither the transaction nor a DocumentReference; its administrator must allow one"
            )
        try:
            return replace(self._send_document(content, patient, capability), refusal=refusal)
        except Refused as error:
            raise Refused("; ".join(filter(None, (refusal, str(error))))) from error

    def verify(self, report_id: str, result_id: str) -> bool:
        """Read the report back: True if it is there and carries an identifier of this result."""
        if not re.fullmatch(rf"(DiagnosticReport|DocumentReference)/{ID}", report_id):
            raise Refused("report_id is not DiagnosticReport/<id> or DocumentReference/<id>")
        what = "read back"
        answer = self._request("GET", f"{self._base}/{report_id}", what=what)
        if answer.status in {404, 410}:
            return False
        if answer.status != 200:
            raise _misconfigured(answer, what)
        resource = answer.json_object(what)
        wanted = {result_id, f"{result_id}.document"}
        same_type = resource.get("resourceType") == report_id.partition("/")[0]
        return same_type and any(has_identifier(resource, codes.IDENTIFIER_SYSTEM, value) for value in wanted)

    def _read_capability(self) -> Capability | None:
        what = "CapabilityStatement"
        answer = self._request("GET", f"{self._base}/metadata", what=what)
        if answer.status in {401, 403}:
            raise _misconfigured(answer, what)
        if answer.status != 200:
            return None
        statement = answer.json_object(what)
        if statement.get("resourceType") != "CapabilityStatement":
            raise Misconfigured(f"{what}: the answer of /metadata is none; is the base URL that of a FHIR server?")
        return capability_from(statement)

    def _forget_capability(self) -> None:
        with self._lock:
            self._capability = None

    def _send_transaction(self, content: ReportContent, patient: str, capability: Capability) -> ReportReceipt | None:
        """None if the server refuses transactions as such."""
        bundle: dict[str, Any] = json.loads(build_bundle(content, patient, capability).model_dump_json())
        requests: list[dict[str, Any]] = bundle["entry"]
        if not {entry["request"]["url"] for entry in requests} <= capability.conditional_create:
            # The server may ignore ifNoneExist. The DiagnosticReport is never there without all that it refers to (one
            # transaction, or the last of several), so it stands for them; only the Device is shared between reports.
            existing = self._find_own("DiagnosticReport", content.result_id)
            if existing is not None:
                entry = ReceiptEntry(resource_type="DiagnosticReport", reference=existing, created=False)
                return ReportReceipt(report_id=existing, entries=(entry,), created=False, how="transaction")
            requests = self._with_existing_device(requests)
        answer = self._post_transaction(requests)
        if answer.status in {200, 201}:
            entries = receipt_entries(answer.json_object("transaction"), requests)
            return self._receipt(entries, content, "transaction")
        if _refuses_transactions(answer, capability):
            return None
        if len(requests) > PART_ENTRIES and (answer.status == 413 or refused_for_size(answer)):
            return self._receipt(self._send_parts(bundle["entry"], content, capability), content, "parted-transaction")
        raise self._refusal(answer, "transaction", content)

    def _send_parts(
        self, entries: list[dict[str, Any]], content: ReportContent, capability: Capability
    ) -> tuple[ReceiptEntry, ...]:
        """Several small transactions in order of reference: a server may limit those with conditional creates (Medplum
        to 8 entries). The DiagnosticReport goes last, so that a report is never seen without its results."""
        done: list[ReceiptEntry] = []
        known: dict[str, str] = {}
        for part in parts(entries):
            requests = resolved(part, known)
            new: list[dict[str, Any]] = []
            for request in requests:
                kind, value = request["request"]["url"], request["resource"]["identifier"][0]["value"]
                existing = None if kind in capability.conditional_create else self._find_own(kind, value)
                if existing is None:
                    new.append(request)
                else:
                    known[request["fullUrl"]] = existing
                    done.append(ReceiptEntry(resource_type=kind, reference=existing, created=False))
            if not new:
                continue
            new = resolved(new, known)
            answer = self._post_transaction(new)
            if answer.status not in {200, 201}:
                raise self._refusal(answer, "part of the transaction", content)
            for request, entry in zip(new, receipt_entries(answer.json_object("transaction"), new), strict=True):
                value = request["resource"]["identifier"][0]["value"]
                reference = entry.reference or self._find_own(entry.resource_type, value)
                if reference is None:
                    raise Unavailable(f"part of the transaction: accepted, but the {entry.resource_type} is not found")
                known[request["fullUrl"]] = reference
                done.append(entry)
        return tuple(done)

    def _post_transaction(self, entries: list[dict[str, Any]]) -> Answer:
        bundle = {"resourceType": "Bundle", "type": "transaction", "entry": entries}
        body = json.dumps(bundle, ensure_ascii=False).encode("utf-8")
        return self._request("POST", self._base, what="transaction", content=body)

    def _receipt(
        self,
        entries: tuple[ReceiptEntry, ...],
        content: ReportContent,
        how: Literal["transaction", "parted-transaction"],
    ) -> ReportReceipt:
        report = next(entry for entry in entries if entry.resource_type == "DiagnosticReport")
        report_id = report.reference or self._find_own("DiagnosticReport", content.result_id)
        if report_id is None:
            raise Unavailable("transaction: accepted, but the report is not found at the server yet")
        return ReportReceipt(report_id=report_id, entries=entries, created=report.created, how=how)

    def _send_document(self, content: ReportContent, patient: str, capability: Capability) -> ReportReceipt:
        own = document_identifier(content)
        what = "DocumentReference"
        reference: str | None = None
        created = False
        if what not in capability.conditional_create:
            reference = self._find_own(what, own)
        if reference is None:
            answer = self._request(
                "POST",
                f"{self._base}/{what}",
                what=what,
                headers={"If-None-Exist": search_token(own)},
                content=build_document(content, patient).model_dump_json().encode("utf-8"),
            )
            if answer.status not in {200, 201}:
                raise self._refusal(answer, what, content)
            created = answer.status == 201
            reference = literal_reference(answer.headers.get("location"), what) or self._find_own(what, own)
        if reference is None:
            raise Unavailable("DocumentReference: accepted, but not found at the server yet")
        entry = ReceiptEntry(resource_type=what, reference=reference, created=created)
        return ReportReceipt(report_id=reference, entries=(entry,), created=created, how="document-reference")

    def _with_existing_device(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same entries, with the Device replaced by a literal reference where the server has it already."""
        first = entries[0]
        if first["request"]["url"] != "Device":
            return entries
        existing = self._find_own("Device", first["resource"]["identifier"][0]["value"])
        return entries if existing is None else resolved(entries[1:], {first["fullUrl"]: existing})

    def _find_own(self, resource_type: str, value: str) -> str | None:
        """Literal reference of the resource with this identifier of ours (a digest, no patient data)."""
        what = f"{resource_type} search"
        url = f"{self._base}/{resource_type}?{search_token(value)}&_count=1"
        answer = self._request("GET", url, what=what, headers=_STRICT)
        if answer.status != 200:
            raise _misconfigured(answer, what)
        for resource in matches(_searchset(answer, what), resource_type):
            if has_identifier(resource, codes.IDENTIFIER_SYSTEM, value):
                return literal_reference(f"{resource_type}/{resource.get('id')}", resource_type)
        return None

    def _request(
        self,
        method: str,
        url: str,
        *,
        what: str,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        form: Mapping[str, str] | None = None,
    ) -> Answer:
        """One exchange with credentials; after 401 once more with renewed ones.

        Raises Unavailable for what passes: 409, 423, and 2xx without a result (accepted for later).
        """
        fields = {"Accept": _FHIR_JSON, **(headers or {})}
        if content is not None:
            fields["Content-Type"] = _FHIR_JSON
        authorization = self._endpoint.authorization
        credentials = authorization.headers(self._http)
        answer = exchange(
            self._http, method, url, what=what, headers={**fields, **credentials}, content=content, form=form
        )
        if answer.status == 401 and authorization.renew(credentials):
            credentials = authorization.headers(self._http)
            answer = exchange(
                self._http, method, url, what=what, headers={**fields, **credentials}, content=content, form=form
            )
        if answer.status in {409, 423} or 201 < answer.status < 300:
            raise Unavailable(f"{what}: HTTP {answer.status}")
        return answer

    def _refusal(self, answer: Answer, what: str, content: ReportContent) -> EmrError:
        private = (content.patient_id, content.patient_name or "", content.accession_number or "")
        if about_content(answer):
            return Refused(f"{what}: HTTP {answer.status}: {summary(answer, private)}")
        return _misconfigured(answer, what, private)


def _refuses_transactions(answer: Answer, capability: Capability) -> bool:
    """Whether the server has no transactions: it says so, or the address is unknown to a server that states none."""
    if "not-supported" in issue_codes(answer):
        return answer.status in {400, 404, 405, 422, 501}
    return answer.status == 501 or (answer.status in {404, 405} and capability.transaction is not True)


def _searchset(answer: Answer, what: str) -> dict[str, Any]:
    bundle = answer.json_object(what)
    if bundle.get("resourceType") != "Bundle":
        raise Misconfigured(f"{what}: the answer is not a Bundle; is the base URL that of a FHIR server?")
    return bundle


def _misconfigured(answer: Answer, what: str, private: Iterable[str] = ()) -> Misconfigured:
    to_do = _TO_DO.get(answer.status, "not expected here; ask the EMR's administrator")
    return Misconfigured(f"{what}: HTTP {answer.status}: {to_do} ({summary(answer, private)})")
