"""What `seggate check` asks of the other side: our own ports, every PACS, every EMR, and what must be entered there.

Every exchange is one that the gateway makes anyway: C-ECHO, negotiation, capability, a query for what cannot exist.
Nothing is stored anywhere and no patient's data is read.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import httpx
import psutil
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as StudyRootFind
from pynetdicom.sop_class import Verification as EchoSopClass

from emr.client import EmrClient
from emr.errors import EmrError, PatientNotResolved
from gateway.app import emr_clients, pacs_destinations
from gateway.checks import Finding, check_bind, failed, ok, warning
from gateway.delivery.association import RejectedForNow, associated
from gateway.delivery.destination import DestinationAway, DestinationRefuses, EchoReport
from gateway.destination_settings import (
    DestinationSettings,
    DicomWebDestination,
    DimseDestination,
    FhirDestination,
    OrthancDestination,
)
from gateway.setting_types import PeerAddress
from gateway.settings import SenderSettings, Settings, SettingsInvalid
from storage.part10 import IMPLEMENTATION_CLASS_UID

_OWN_TIMEOUT_S = 5.0
_QUERY_TIMEOUT_S = 15.0
_AT_ONCE = 8
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - recognised here, not bound
# A Patient ID that is nobody's; the search for it shows that searching is allowed.
_NOBODY = "seggate-check-nobody"

T = TypeVar("T")
Answer = TypeVar("Answer")
Pacs = DimseDestination | DicomWebDestination | OrthancDestination


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the administrator of one other system must enter there, a line each."""

    who: str
    lines: tuple[str, ...]


def check_receiver_port(settings: Settings) -> Finding:
    """The DICOM port is free, or our own receiver answers C-ECHO there."""
    receiver = settings.gateway.receiver
    free = check_bind("receiver port", receiver.host, receiver.port)
    if free is not None:
        return free
    host = _WILDCARDS.get(receiver.host, receiver.host)
    where = f"{receiver.host}:{receiver.port}"
    peer = PeerAddress(ae_title=receiver.ae_title, host=host, port=receiver.port)
    # An echo as an allowed sender leaves no trace; one as a stranger would be listed among the refused callers.
    calling = next((s.ae_title for s in settings.gateway.senders if _may_call_from(s, host)), receiver.ae_title)
    try:
        with associated(
            peer, [build_context(EchoSopClass)], calling_ae_title=calling, timeout_s=_OWN_TIMEOUT_S, name="receiver"
        ) as association:
            ours = association.acceptor.implementation_class_uid == IMPLEMENTATION_CLASS_UID
            answered = association.send_c_echo().get("Status") == 0x0000
    except DestinationRefuses:
        return ok("receiver port", f"{where}: a DICOM receiver runs there, and refuses {calling} as it must")
    except RejectedForNow:
        return failed(
            "receiver port",
            f"{where}: a DICOM receiver runs there, and accepts nothing at the moment: too little disk space, too many "
            "associations, or it is ending",
        )
    except DestinationAway:
        return failed("receiver port", f"{where} is in use by something that does not answer C-ECHO")
    if ours and answered:
        return ok("receiver port", f"{where}: our receiver runs and answers C-ECHO")
    if ours:
        return failed("receiver port", f"{where}: our receiver runs, but C-ECHO failed")
    return failed("receiver port", f"{where} is in use by another DICOM program")


def check_web_port(settings: Settings) -> Finding:
    """The HTTP port is free, or our own /health/live answers there."""
    web = settings.gateway.web
    free = check_bind("web port", web.host, web.port)
    if free is not None:
        return free
    where = f"{web.host}:{web.port}"
    if web.client_ca is not None:
        return ok("web port", f"{where} is in use; not asked further, because it wants a client certificate")
    host = _WILDCARDS.get(web.host, web.host)
    scheme = "https" if web.tls_certificate is not None else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{web.port}/health/live"
    try:
        # The certificate names the public host; here only the answer counts, and nothing is sent.
        with httpx.Client(timeout=_OWN_TIMEOUT_S, trust_env=False, verify=False) as http:  # noqa: S501
            answer = http.get(url)
        if answer.status_code == 200 and answer.json() == {"status": "live"}:
            return ok("web port", f"{where}: our web role runs")
    except (httpx.HTTPError, ValueError):
        pass
    return failed("web port", f"{where} is in use by another program")


def check_sender_queries(settings: Settings) -> list[Finding]:
    """Whoever is asked for expected counts accepts Study Root C-FIND."""
    asked = [s for s in settings.gateway.senders if s.query is not None]
    return _all_at_once(lambda s: _sender_query(s, settings), asked)


def check_pacs(settings: Settings) -> tuple[list[Finding], list[EchoReport]]:
    """Echo, negotiated classes and query of every PACS."""
    if not settings.destinations.pacs:
        return [warning("PACS", "no destination in destinations.toml: results stay here")], []
    adapters = pacs_destinations(settings)
    reports = _all_at_once(lambda d: adapters[d.name].echo(), settings.destinations.pacs)
    found = [_pacs_finding(p, r) for p, r in zip(settings.destinations.pacs, reports, strict=True)]
    return found, reports


def check_emrs(settings: Settings) -> list[Finding]:
    """Capability and one authorised Patient search at every EMR."""
    configured = settings.destinations.fhir
    if not configured:
        return [warning("EMR", "no destination in destinations.toml: no report is sent")]
    return _all_at_once(lambda d: _emr_finding(d, settings), configured)


def advice(settings: Settings, echoes: Sequence[EchoReport]) -> list[Advice]:
    """What the others must enter: scanners, PACS and EMR administrators."""
    receiver = settings.gateway.receiver
    port = str(receiver.port) if receiver.port else "(chosen at start; set receiver.port)"
    lines = [
        f"AE title {receiver.ae_title}, host {own_host(receiver.host)}, port {port}.",
        "Services: C-STORE (Storage SCU), C-ECHO to test; no TLS.",
        *(f"{s.ae_title} may send{_from(s)}." for s in settings.gateway.senders),
    ]
    if not settings.gateway.senders:
        lines.append("Tell us the scanner's AE title and address: nobody may send yet ([[senders]] in gateway.toml).")
    given = [Advice(who="scanner", lines=tuple(lines))]
    given += [Advice(who=f"PACS {e.name}", lines=e.administrator) for e in echoes]
    given += [Advice(who=f"EMR {d.name}", lines=_emr_advice(d)) for d in settings.destinations.fhir]
    return given


def own_host(bound: str) -> str:
    """Name and addresses under which others reach this machine."""
    if bound not in _WILDCARDS:
        return bound
    addresses = {
        a.address
        for interface in psutil.net_if_addrs().values()
        for a in interface
        if a.family == socket.AF_INET and not ipaddress.ip_address(a.address).is_loopback
    }
    return socket.gethostname() + (f" ({', '.join(sorted(addresses))})" if addresses else "")


def _pacs_finding(configured: Pacs, report: EchoReport) -> Finding:
    check = f"PACS {configured.name}"
    if not (report.reachable and report.accepted):
        return failed(check, report.problem or "does not let us in")
    seen = [f"{name} {support}" for name, support in report.capability.sop_classes.items()]
    if report.query is not None:
        seen.append("query offered" if report.query else "no query")
    detail = f"answers in {report.seconds:.2f} s; " + ("; ".join(seen) or "nothing can be asked in advance")
    takes_none = all(report.capability.of(e) == "refused" for e in configured.encodings)
    if takes_none or (configured.send_sr and report.capability.of("SR") == "refused"):
        return failed(check, f"{report.problem}; {detail}")
    return warning(check, f"{report.problem}; {detail}") if report.problem else ok(check, detail)


def _emr_finding(configured: FhirDestination, settings: Settings) -> Finding:
    check = f"EMR {configured.name}"
    alone = settings.model_copy(update={"destinations": DestinationSettings(fhir=(configured,))})
    try:
        client = emr_clients(alone)[configured.name]
    except (SettingsInvalid, EmrError) as error:
        return failed(check, str(error))
    try:
        return _asked(check, configured, client)
    except EmrError as error:
        return failed(check, str(error))
    finally:
        client.close()


def _asked(check: str, configured: FhirDestination, client: EmrClient) -> Finding:
    capability = client.capability()
    spoken = f"{capability.software or 'FHIR server'}, FHIR {capability.fhir_version or '(version not stated)'}"
    if not capability.version_fits:
        return failed(check, f"{spoken}: R4 (4.0.1) or R4B is needed")
    # Nobody has this identifier, so that is the answer of a server that lets us search.
    with contextlib.suppress(PatientNotResolved):
        client.find_patient(_NOBODY, next(iter(configured.accepted_issuers), None))
    searched = f"{spoken}; Patient search allowed (auth = {configured.auth})"
    if capability.takes_report:
        return ok(check, f"{searched}; takes the report as one transaction")
    if capability.can_create("DocumentReference"):
        return warning(check, f"{searched}; refuses the transaction: a DocumentReference alone is sent")
    return failed(check, f"{searched}; takes neither the transaction nor a DocumentReference")


def _sender_query(sender: SenderSettings, settings: Settings) -> Finding:
    check = f"query for {sender.ae_title}"
    peer = sender.query
    if peer is None:
        return ok(check, "not configured")
    try:
        with associated(
            peer,
            [build_context(EchoSopClass), build_context(StudyRootFind)],
            calling_ae_title=settings.gateway.receiver.ae_title,
            timeout_s=_QUERY_TIMEOUT_S,
            name=check,
        ) as association:
            if any(c.abstract_syntax == StudyRootFind for c in association.accepted_contexts):
                return ok(check, f"{peer.ae_title} at {peer.host}:{peer.port} offers Study Root C-FIND")
    except (DestinationAway, DestinationRefuses) as error:
        return warning(check, f"{error}; studies are declared whole without an expected count")
    return warning(check, f"{peer.ae_title} does not offer Study Root C-FIND; no expected count")


def _emr_advice(configured: FhirDestination) -> tuple[str, ...]:
    login = {
        "none": "No login: allow this host by its address or at a proxy.",
        "token": "A static bearer token for us (token_file or token_env).",
        "basic": f"A user {configured.username} with a password (password_file).",
    }
    lines = [login.get(configured.auth, "")]
    if configured.auth == "smart" and configured.smart is not None:
        smart = configured.smart
        lines = [
            f"SMART Backend Services client {smart.client_id}"
            + (f", key id {smart.key_id}" if smart.key_id else "")
            + ", with the public half of smart.key_file.",
            f"Scopes: {smart.scope}",
        ]
    return (
        *lines,
        f"Patients carry an identifier of system {configured.patient_identifier_system} with the PACS's Patient ID.",
        "Allow: GET metadata; search Patient by POST; one transaction that creates DiagnosticReport, Observation, "
        "Device, DocumentReference with If-None-Exist; read them back.",
    )


def _may_call_from(sender: SenderSettings, address: str) -> bool:
    if not sender.addresses:
        return True
    try:
        ours = ipaddress.ip_address(address)
    except ValueError:
        return False
    networks = (ipaddress.ip_network(a, strict=False) for a in sender.addresses)
    return any(ours in network for network in networks if network.version == ours.version)


def _from(sender: SenderSettings) -> str:
    return f" from {', '.join(sender.addresses)}" if sender.addresses else " from any address"


def _all_at_once(ask: Callable[[T], Answer], whom: Sequence[T]) -> list[Answer]:
    """The answers in the order of the questions: one slow system does not hold up the others."""
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return list(pool.map(ask, whom))
