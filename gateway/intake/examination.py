"""What one spooled object is, found out from its bytes alone, before any row is written."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gateway.intake.errors import IntakeRejected
from gateway.intake.header import Header, read_header
from gateway.intake.identity import PatientIdentity
from gateway.intake.structure import attribute_name
from storage.part10 import ObjectEvidence
from storage.spool import Incoming, Spool, received_at

LOG = logging.getLogger(__name__)

_SOP_CLASS = 0x00080016
_SOP_INSTANCE = 0x00080018
_PIXEL_DATA = 0x7FE00010
_MAX_DIFFERENCES = 50


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One object of `incoming/`. Either `header` or `fault` is set."""

    object_id: str
    path: Path
    evidence: ObjectEvidence
    digest: str  # SHA-256 of the data set bytes as received
    size_bytes: int  # of the data set
    header: Header | None
    fault: IntakeRejected | None
    study_instance_uid: str | None  # known for some faulty objects too
    arrived_at: datetime  # for the quiet time of its study: the indexer knows better than the stamp

    @property
    def identity(self) -> PatientIdentity:
        """Of a readable object, fitted to the columns."""
        if self.header is None:
            raise ValueError("an unreadable object has no patient identity")
        return PatientIdentity(
            patient_id=_fitted(self.header.text("PatientID"), 256),
            issuer_of_patient_id=_fitted(self.header.text("IssuerOfPatientID"), 256),
            patient_name=self.header.text("PatientName"),
            patient_birth_date=_fitted(self.header.text("PatientBirthDate"), 32),
        )

    def text(self, keyword: str, limit: int | None = None) -> str | None:
        """A value of a readable object, cut to the width of its column."""
        if self.header is None:
            return None
        value = self.header.text(keyword)
        return value if limit is None else _fitted(value, limit)


def examine(spool: Spool, incoming: Incoming) -> Examined:
    """Read one object of `incoming/`. Raises ObjectMissing, and OSError when the disk fails; nothing else."""
    fault: IntakeRejected | None = None
    header: Header | None = None
    study_uid: str | None = None
    try:
        evidence = spool.read_evidence(incoming.path)
        offset = spool.dataset_offset(incoming.path)
        digest = spool.dataset_digest(incoming.path)
    except ValueError as error:
        # Not written by a receiver of ours; kept with what its name says.
        evidence, offset = _no_evidence(incoming.id), 0
        digest = hashlib.sha256(incoming.path.read_bytes()).hexdigest()
        fault = IntakeRejected(str(error))
    if fault is None:
        try:
            header = read_header(incoming.path)
            study_uid = header.study_instance_uid
            fault = _mismatch(header, evidence)
        except IntakeRejected as error:
            fault = error
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - the edge: one object must not stop the others
            LOG.error("object %s cannot be read: %s", incoming.id, type(error).__name__)
            fault = IntakeRejected(f"cannot be read ({type(error).__name__})")
    return Examined(
        object_id=incoming.id,
        path=incoming.path,
        evidence=evidence,
        digest=digest,
        size_bytes=incoming.path.stat().st_size - offset,
        header=None if fault else header,
        fault=fault,
        study_instance_uid=study_uid,
        arrived_at=evidence.received_at,
    )


def differences(first: Path, second: Path) -> list[str]:
    """Attributes (top level) in which two objects differ, as "Keyword (gggg,eeee)"; values are never named."""
    try:
        one, other = read_header(first), read_header(second)
    except (IntakeRejected, OSError):
        return []
    names = []
    for tag in sorted({int(tag) for header in (one, other) for tag in header.dataset.keys()}):  # noqa: SIM118
        if _raw(one, tag) != _raw(other, tag):
            names.append(attribute_name(tag))
    if one.transfer_syntax_uid != other.transfer_syntax_uid:
        names.append(attribute_name(0x00020010))
    if _pixels_digest(first, one) != _pixels_digest(second, other):
        names.append(attribute_name(_PIXEL_DATA))
    return names[:_MAX_DIFFERENCES]


def _raw(header: Header, tag: int) -> object:
    element = header.dataset.get_item(tag)
    return None if element is None else element.value


def _pixels_digest(path: Path, header: Header) -> str | None:
    """Digest of what follows the header; None without pixels, and where they are deflated with the header."""
    if header.structure.pixel_data_length is None or header.is_deflated:
        return None
    with path.open("rb") as file:
        file.seek(header.dataset_offset + header.structure.header_end)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mismatch(header: Header, evidence: ObjectEvidence) -> IntakeRejected | None:
    """The data set must be the object that the C-STORE request announced (PS3.4 B.2.1)."""
    if header.sop_instance_uid != evidence.sop_instance_uid:
        return IntakeRejected(
            "is another than AffectedSOPInstanceUID (0000,1000) of the C-STORE request", attribute_name(_SOP_INSTANCE)
        )
    if header.sop_class_uid != evidence.sop_class_uid:
        return IntakeRejected(
            "is another than AffectedSOPClassUID (0000,0002) of the C-STORE request", attribute_name(_SOP_CLASS)
        )
    return None


def _no_evidence(object_id: str) -> ObjectEvidence:
    return ObjectEvidence(
        object_id=object_id,
        association_id="",
        peer_address="",
        calling_ae="",
        called_ae="",
        received_at=received_at(object_id),
        sop_class_uid="",
        sop_instance_uid="",
        transfer_syntax_uid="",
    )


def _fitted(value: str | None, limit: int) -> str | None:
    return value[:limit] if value is not None else None
