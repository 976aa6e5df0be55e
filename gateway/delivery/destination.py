"""What a PACS is to the gateway: the port `Destination` and the values that cross it.

Three adapters fulfil it (dimse.py, dicomweb.py, orthanc.py); ladder.py is its only caller besides `seggate check`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydicom.filereader import read_file_meta_info

from gateway.delivery.status import Outcome
from gateway.errors import Permanent, Transient
from storage.errors import ObjectChanged, ObjectMissing

Role = Literal["SEG", "SR", "SC", "notice"]
Encoding = Literal["LABELMAP", "BINARY", "SC"]
Found = Literal["verified", "absent", "differs", "not-queryable"]
Support = Literal["accepted", "refused", "unknown"]

# What a capability is asked about, and the SOP classes (PS3.4 B.5) that stand for it.
STORED_CLASSES: Mapping[str, tuple[str, ...]] = {
    "BINARY": ("1.2.840.10008.5.1.4.1.1.66.4",),  # Segmentation Storage
    "LABELMAP": ("1.2.840.10008.5.1.4.1.1.66.7",),  # Label Map Segmentation Storage
    "SR": (
        "1.2.840.10008.5.1.4.1.1.88.34",  # Comprehensive 3D SR Storage
        "1.2.840.10008.5.1.4.1.1.88.33",  # Comprehensive SR Storage
        "1.2.840.10008.5.1.4.1.1.88.22",  # Enhanced SR Storage
    ),
    "SC": (
        "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture Image Storage
        "1.2.840.10008.5.1.4.1.1.7.4",  # Multi-frame True Color Secondary Capture Image Storage
    ),
}

_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*")


class DestinationAway(Transient):
    """The destination cannot be reached or broke off before any object was sent; the same may succeed later."""


class DestinationRefuses(Transient):
    """The destination answers but does not let this gateway in (AE title, address, credentials, URL).

    Transient, because nothing is wrong with the result: it goes out as soon as the other side's administrator has
    entered what `seggate check` prints. An alarm says so at once.
    """


class CredentialsMissing(DestinationRefuses):
    """This gateway's own half is missing (a file with a token, a password or certificates), so nobody was contacted.

    Transient as well: such files are replaced while the gateway runs.
    """


@dataclass(frozen=True, kw_only=True)
class OutgoingObject:
    """A DICOM file that is sent as it is: `path` holds preamble, file meta information and data set (PS3.10).

    `digest`: SHA-256 (hex) of the whole file, as recorded when it was written.
    """

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    series_instance_uid: str
    study_instance_uid: str
    path: Path
    digest: str
    role: Role

    def __post_init__(self) -> None:
        for keyword in ("sop_instance_uid", "series_instance_uid", "study_instance_uid", "sop_class_uid"):
            if not is_uid(getattr(self, keyword)):
                raise Permanent(f"{keyword} of an outgoing object is not a UID (PS3.5 9.1); it is not sent")


@dataclass(frozen=True, kw_only=True)
class ObjectStatus:
    """What the destination answered for one object.

    `code` is the DIMSE status, the DICOMweb Failure Reason or the HTTP
    status; None where there was none (a rejected presentation context, a lost connection).
    """

    sop_instance_uid: str
    code: int | None
    outcome: Outcome
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a query said about one object; `differs` = there under this UID, with content that is not ours."""

    sop_instance_uid: str
    outcome: Found
    detail: str


@dataclass(frozen=True, kw_only=True)
class Capability:
    """Which classes the destination takes: keys of STORED_CLASSES → accepted, refused or unknown."""

    sop_classes: Mapping[str, Support]

    def of(self, name: str) -> Support:
        return self.sop_classes.get(name, "unknown")


@dataclass(frozen=True, kw_only=True)
class EchoReport:
    """What `seggate check` shows of a destination.

    `query` None = not asked (verification is switched off). `administrator`: what the other side must enter, a line
    each. `problem` is empty when results can be delivered and verified.
    """

    name: str
    reachable: bool
    accepted: bool
    capability: Capability
    query: bool | None
    problem: str
    administrator: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "reachable": self.reachable,
            "accepted": self.accepted,
            "capability": dict(self.capability.sop_classes),
            "query": self.query,
            "problem": self.problem,
            "administrator": list(self.administrator),
            "seconds": round(self.seconds, 3),
        }


class Destination(Protocol):
    """A PACS. Every method opens what it needs and closes it again; an instance holds settings only."""

    @property
    def name(self) -> str: ...

    def send(self, objects: Sequence[OutgoingObject]) -> tuple[ObjectStatus, ...]:
        """Send in the given order over one connection and stop after the first object that was not stored.

        Returns a status per object that was tried; an object without a status was not sent.
        Raises DestinationAway or DestinationRefuses when nothing was sent, Permanent when a file is not what it
        is said to be, storage.errors.ObjectChanged or ObjectMissing when it was altered or is gone.
        """
        ...

    def verify(self, objects: Sequence[OutgoingObject]) -> tuple[Verification, ...]:
        """Ask for each object by its UIDs. Raises DestinationAway, DestinationRefuses."""
        ...

    def echo(self) -> EchoReport:
        """Reachability, acceptance and query in one report. Does not raise for what the other side does."""
        ...


def is_uid(value: str) -> bool:
    """PS3.5 9.1: digits and dots, no leading zeros, at most 64 characters."""
    return len(value) <= 64 and _UID.fullmatch(value) is not None


def check_file(item: OutgoingObject) -> None:
    """The file has the bytes that were recorded and is the object that the caller means; nothing else leaves the house.

    Raises ObjectMissing when the file cannot be read, ObjectChanged when its bytes are others, Permanent when it is
    another object.
    """
    remedy = f"restore {item.path} from a backup of the spool, then say `seggate retry`"
    try:
        with item.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ObjectMissing(f"object {item.sop_instance_uid} cannot be read: {error.strerror}; {remedy}") from error
    if digest != item.digest:
        raise ObjectChanged(
            f"the file of object {item.sop_instance_uid} was altered or truncated on disk (SHA-256 {digest[:12]}…, "
            f"recorded {item.digest[:12]}…); it is not sent: {remedy}"
        )
    meta = read_file_meta_info(item.path)
    said = {
        "MediaStorageSOPInstanceUID": item.sop_instance_uid,
        "MediaStorageSOPClassUID": item.sop_class_uid,
        "TransferSyntaxUID": item.transfer_syntax_uid,
    }
    for keyword, expected in said.items():
        if str(meta.get(keyword, "")) != expected:
            raise Permanent(
                f"the file of object {item.sop_instance_uid} has another {keyword} than recorded; it is not sent"
            )
