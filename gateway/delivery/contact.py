"""What is known of a destination between attempts: its circuit, what it takes, and at which address that was learned.

One row per name (DestinationState), shared by every process that delivers. A name that is given to another address
starts anew: that the old one was away, or took no segmentations, says nothing of the new one.
"""

from __future__ import annotations

import hashlib

import structlog
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from gateway.delivery.attempt import DESTINATION_REFUSES, FALLBACK_ENCODING, QUERY_REFUSES
from gateway.delivery.retry import Circuit
from gateway.settings import DicomWebDestination, DimseDestination, FhirDestination, OrthancDestination
from storage.alarms import clear_alarms, raise_alarm
from storage.records import DestinationState, utc_now

AnyPacs = DimseDestination | DicomWebDestination | OrthancDestination
AnyDestination = AnyPacs | FhirDestination

DESTINATION_AWAY = "destination-away"

_log = structlog.get_logger(__name__)


def kind_of(destination: AnyDestination) -> str:
    """dimse, dicomweb, orthanc or fhir."""
    if isinstance(destination, DimseDestination):
        return "dimse"
    if isinstance(destination, DicomWebDestination):
        return "dicomweb"
    return "orthanc" if isinstance(destination, OrthancDestination) else "fhir"


def address_of(destination: AnyDestination) -> str:
    """SHA-256 (hex) of kind and address; a digest, because a URL may hold a password."""
    if isinstance(destination, DimseDestination):
        where = f"{destination.ae_title}@{destination.host}:{destination.port}"
    else:
        where = destination.url.rstrip("/")
    return hashlib.sha256(f"{kind_of(destination)} {where}".encode()).hexdigest()


def destination_row(session: Session, destination: AnyDestination) -> DestinationState:
    """The row of a destination: made at first contact, started anew where the name has another address than before."""
    row = session.get(DestinationState, destination.name) or _first_contact(session, destination)
    address = address_of(destination)
    if row.address is not None and row.address != address:
        _start_anew(session, row, destination)
    row.address = address
    return row


def claim(session: Session, row: DestinationState, destination: AnyDestination) -> float:
    """Seconds to wait before this destination may be contacted; 0 = go ahead (as the probe, when it is down)."""
    now = utc_now()
    circuit = Circuit(is_open=row.circuit == "open", since=row.since, failures=row.failures)
    limits = {"first_retry_s": destination.first_retry_s, "max_retry_s": destination.max_retry_s}
    circuit = circuit.righted(now, **limits)
    row.since, row.failures = circuit.since, circuit.failures
    session.flush()
    wait_s = circuit.wait_s(now, **limits)
    if wait_s > 0 or not circuit.is_open:
        return wait_s
    claimed = circuit.claim(now, **limits)
    # Two deliveries may see the same due probe; the update of one of them finds the old count gone.
    taken = session.execute(
        update(DestinationState)
        .where(DestinationState.name == row.name, DestinationState.failures == circuit.failures)
        .values(failures=claimed.failures)
    )
    session.expire(row)
    return 0.0 if getattr(taken, "rowcount", 0) else max(0.5, claimed.wait_s(now, **limits))


def note_contact(session: Session, row: DestinationState, *, away: bool, reason: str) -> None:
    """Open the circuit of a destination that is away, close that of one that answered; alarm and clear."""
    now = utc_now()
    circuit = Circuit(is_open=row.circuit == "open", since=row.since, failures=row.failures)
    after = circuit.failed(now) if away else circuit.succeeded(now)
    row.circuit, row.since, row.failures = ("open" if after.is_open else "closed"), after.since, after.failures
    row.last_error = reason if away else row.last_error
    subject = f"destination:{row.name}"
    if away and not circuit.is_open:
        raise_alarm(
            session,
            kind=DESTINATION_AWAY,
            subject=subject,
            message=f"nothing reaches {row.name}, results wait: {reason}",
        )
    if not away:
        for kind in (DESTINATION_AWAY, DESTINATION_REFUSES):
            clear_alarms(session, kind=kind, subject=subject, by="gateway")


def _first_contact(session: Session, destination: AnyDestination) -> DestinationState:
    row = DestinationState(name=destination.name, circuit="closed", since=utc_now(), failures=0)
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:  # another process had its first contact at the same moment
        return session.get_one(DestinationState, destination.name)
    return row


def _start_anew(session: Session, row: DestinationState, destination: AnyDestination) -> None:
    row.circuit, row.since, row.failures = "closed", utc_now(), 0
    row.last_error = row.capability = None
    subject = f"destination:{row.name}"
    for kind in (DESTINATION_AWAY, DESTINATION_REFUSES, QUERY_REFUSES):
        clear_alarms(session, kind=kind, subject=subject, by="gateway")
    if not isinstance(destination, FhirDestination):
        for encoding in destination.encodings:
            clear_alarms(session, kind=FALLBACK_ENCODING, subject=f"{subject}:{encoding}", by="gateway")
    _log.warning("a destination has another address: started anew", destination=row.name, kind=kind_of(destination))
