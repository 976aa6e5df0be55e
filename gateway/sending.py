"""Sends DICOM files as they are: a storage SCU for `seggate send` (PS3.4 Annex B).

Each file is negotiated in its own SOP class and transfer syntax, and its data set goes out byte for byte. A file
that cannot be sent is named with the attribute at fault; the others are sent.
"""

from __future__ import annotations

import os
import socket
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynetdicom
from pydicom.uid import UID
from pynetdicom import _config, evt
from pynetdicom.presentation import PresentationContext, build_context

from gateway.intake.errors import IntakeRejected
from gateway.intake.header import read_header
from gateway.intake.structure import attribute_name
from gateway.intake.uids import uid_fault
from gateway.service_user import keep_answers
from gateway.setting_types import PeerAddress
from storage.part10 import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    meta_text,
    read_meta_elements,
)

_MAX_CONTEXTS = 128  # of one association request (PS3.8 9.3.2.2: odd numbers up to 255)
_DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"
_TRANSFER_SYNTAX = 0x00020010
_META_TAGS = (_TRANSFER_SYNTAX, 0x00020002, 0x00020003)
_FIRST_GROUPS = (b"\x08\x00", b"\x00\x08", b"\x02\x00", b"\x04\x00")  # how a data set without preamble may begin


class PeerRefused(Exception):
    """The peer cannot be reached, or refuses every association; the message says which, and what to check."""


@dataclass(frozen=True, kw_only=True)
class Sendable:
    """A file that can be sent, with what is negotiated for it."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A file that was not stored, and why; `status` is the peer's answer where it gave one."""

    path: Path
    reason: str
    status: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A file that the peer stored; `status` is 0x0000, or a warning 0xBxxx with its comment."""

    path: Path
    sop_instance_uid: str
    status: int
    comment: str = ""


@dataclass(frozen=True, kw_only=True)
class SendReport:
    """What became of every file. `skipped` are not DICOM objects, with one word why."""

    sent: tuple[Sent, ...]
    warnings: tuple[Sent, ...]
    failed: tuple[Failure, ...]
    skipped: tuple[tuple[Path, str], ...]

    @property
    def is_complete(self) -> bool:
        """Every DICOM object was stored, and there was at least one."""
        return not self.failed and bool(self.sent or self.warnings)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """After each file: how many are dealt with, of how many."""

    done: int
    total: int
    path: Path


def send_files(
    sources: Path | Sequence[Path],
    peer: PeerAddress,
    *,
    calling_ae: str = "SEGGATE",
    timeout_s: float = 30.0,
    progress: Callable[[Progress], None] | None = None,
) -> SendReport:
    """Send files, or all files below folders; every file is tried once.

    Raises FileNotFoundError for a source that does not exist, and PeerRefused when no association could be opened
    at all. A peer that goes away later makes the remaining files failures.
    """
    sendable: list[Sendable] = []
    failed: list[Failure] = []
    skipped: list[tuple[Path, str]] = []
    for path in _walk([sources] if isinstance(sources, Path) else sources, failed):
        found = inspect_file(path)
        if isinstance(found, Sendable):
            sendable.append(found)
        elif isinstance(found, Failure):
            failed.append(found)
        else:
            skipped.append((path, found))
    session = _Session(peer, calling_ae=calling_ae, timeout_s=timeout_s, total=len(sendable), progress=progress)
    for batch in _batches(sendable):
        session.send(batch)
    accepted = [s for s in session.sent if s.status == 0x0000]
    return SendReport(
        sent=tuple(accepted),
        warnings=tuple(s for s in session.sent if s.status != 0x0000),
        failed=(*failed, *session.failed),
        skipped=tuple(skipped),
    )


def inspect_file(path: Path) -> Sendable | Failure | str:
    """What a file is: sendable, a DICOM object that cannot be sent, or (a word) something else.

    Only regular files are opened: a pipe would never end, and a device is none of ours.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode) and path.is_symlink():
            return "link to a folder, not followed"
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return "pipe, socket or device"
        with path.open("rb") as file:
            head = file.read(1024)
            file.seek(0)
            if head[128:132] != b"DICM":
                if _looks_like_a_data_set(head):
                    return Failure(
                        path=path, reason="no preamble and no file meta information, so its encoding is unknown"
                    )
                if not head and path.suffix.lower() in _DICOM_SUFFIXES:
                    return Failure(path=path, reason="empty file")
                return "not DICOM" if head else "empty"
            try:
                meta, _ = read_meta_elements(file)
            except ValueError as error:
                return Failure(path=path, reason=str(error))
    except OSError as error:
        return Failure(path=path, reason=f"cannot be read: {error.strerror}")
    if meta_text(meta, 0x00020002) == _MEDIA_STORAGE_DIRECTORY:
        return "DICOMDIR"
    for tag in _META_TAGS:
        value = meta.get(tag, b"")
        fault = "is absent" if tag not in meta else uid_fault(value)
        if fault is not None:
            return Failure(path=path, reason=f"{attribute_name(tag)} {fault}")
    try:
        header = read_header(path)
    except IntakeRejected as error:
        return Failure(path=path, reason=str(error))
    except OSError as error:
        return Failure(path=path, reason=f"cannot be read: {error.strerror}")
    for meta_tag, announced, tag, held in (
        (0x00020002, header.media_storage_sop_class_uid, 0x00080016, header.sop_class_uid),
        (0x00020003, header.media_storage_sop_instance_uid, 0x00080018, header.sop_instance_uid),
    ):
        if announced != held:
            reason = f"{attribute_name(meta_tag)} of the file is another than {attribute_name(tag)} of its data set"
            return Failure(path=path, reason=reason)
    return Sendable(
        path=path,
        sop_class_uid=header.media_storage_sop_class_uid,
        sop_instance_uid=header.media_storage_sop_instance_uid,
        transfer_syntax_uid=header.transfer_syntax_uid,
    )


class _Session:
    """Sends batches, each in an association of its own, and collects what became of the files."""

    def __init__(
        self,
        peer: PeerAddress,
        *,
        calling_ae: str,
        timeout_s: float,
        total: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._peer = peer
        self._timeout_s = timeout_s
        self._total = total
        self._progress = progress
        self._opened_once = False
        self.sent: list[Sent] = []
        self.failed: list[Failure] = []
        entity = pynetdicom.AE(ae_title=calling_ae)
        entity.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        entity.maximum_pdu_size = 131072
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = timeout_s
        self._entity = entity

    def send(self, batch: Sequence[Sendable]) -> None:
        """One association for files of at most 128 different contexts."""
        try:
            # A peer that is not there is found out here: pynetdicom leaks the socket of a failed connection.
            socket.create_connection((self._peer.host, self._peer.port), self._timeout_s).close()
        except OSError as error:
            self._give_up(batch, f"{_where(self._peer)} cannot be reached: {error.strerror or error}")
            return
        # Public settings of pynetdicom: file bytes go out without being decoded, and no PDU is logged.
        _config.STORE_SEND_CHUNKED_DATASET = True
        _config.LOG_HANDLER_LEVEL = "none"
        association = self._entity.associate(
            self._peer.host,
            self._peer.port,
            contexts=_contexts(batch),
            ae_title=self._peer.ae_title,
            evt_handlers=[(evt.EVT_CONN_OPEN, _without_delay)],
        )
        if association.rejected_contexts and not association.accepted_contexts:
            self._opened_once = True
            for item in batch:
                self._fail(item, _not_accepted(item))
            return
        if not association.is_established:
            self._give_up(batch, _why_not(association, self._peer))
            return
        self._opened_once = True
        keep_answers(association)
        accepted = {(str(c.abstract_syntax), str(c.transfer_syntax[0])) for c in association.accepted_contexts}
        try:
            for message_id, item in enumerate(batch):
                self._send_one(association, item, accepted, message_id % 65535 + 1)
        finally:
            if association.is_established:
                association.release()

    def _give_up(self, batch: Sequence[Sendable], reason: str) -> None:
        """Without any association so far there is nothing to report per file."""
        if not self._opened_once:
            raise PeerRefused(reason)
        for item in batch:
            self._fail(item, reason)

    def _send_one(self, association: Any, item: Sendable, accepted: set[tuple[str, str]], message_id: int) -> None:
        if not association.is_established:
            self._fail(item, "the peer ended the association before this file")
            return
        if (item.sop_class_uid, item.transfer_syntax_uid) not in accepted:
            self._fail(item, _not_accepted(item))
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = association.send_c_store(item.path, msg_id=message_id)
        except (OSError, ValueError, AttributeError, RuntimeError) as error:
            self._fail(item, f"could not be sent: {type(error).__name__}")
            return
        status = answer.get("Status")
        if status is None:
            self._fail(item, "the peer did not answer")
            return
        comment = str(answer.get("ErrorComment") or "").strip()
        if status == 0x0000 or status & 0xF000 == 0xB000:
            self.sent.append(
                Sent(path=item.path, sop_instance_uid=item.sop_instance_uid, status=int(status), comment=comment)
            )
            self._advance(item.path)
            return
        self._fail(item, f"the peer answered {status:04X}" + (f": {comment}" if comment else ""), int(status))

    def _fail(self, item: Sendable, reason: str, status: int | None = None) -> None:
        self.failed.append(Failure(path=item.path, reason=reason, status=status))
        self._advance(item.path)

    def _advance(self, path: Path) -> None:
        if self._progress is not None:
            self._progress(Progress(done=len(self.sent) + len(self.failed), total=self._total, path=path))


def _walk(sources: Iterable[Path], failed: list[Failure]) -> Iterator[Path]:
    """Everything below the sources but folders; folders that cannot be listed go to `failed`."""

    def unlisted(error: OSError) -> None:
        failed.append(Failure(path=Path(error.filename), reason=f"folder cannot be read: {error.strerror}"))

    for source in sources:
        if source.is_dir():
            for folder, subfolders, names in os.walk(source, onerror=unlisted):
                subfolders.sort()
                links = [name for name in subfolders if Path(folder, name).is_symlink()]
                yield from (Path(folder, name) for name in sorted([*names, *links]))
        elif source.exists():
            yield source
        else:
            raise FileNotFoundError(f"{source} does not exist")


def _batches(items: Sequence[Sendable]) -> Iterator[list[Sendable]]:
    """In the given order, cut where an association would need more than 128 presentation contexts."""
    batch: list[Sendable] = []
    contexts: set[tuple[str, str]] = set()
    for item in items:
        key = (item.sop_class_uid, item.transfer_syntax_uid)
        if key not in contexts and len(contexts) == _MAX_CONTEXTS:
            yield batch
            batch, contexts = [], set()
        contexts.add(key)
        batch.append(item)
    if batch:
        yield batch


def _contexts(batch: Sequence[Sendable]) -> list[PresentationContext]:
    """One context per SOP class and transfer syntax, so that the peer cannot choose another syntax for a file."""
    pairs = dict.fromkeys((item.sop_class_uid, item.transfer_syntax_uid) for item in batch)
    return [build_context(sop_class, syntax) for sop_class, syntax in pairs]


def _without_delay(event: Any) -> None:
    connection = event.assoc.dul.socket.socket
    if connection is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _why_not(association: Any, peer: PeerAddress) -> str:
    if association.is_rejected:
        answer = association.acceptor.primitive
        why = _REJECTIONS.get((answer.result_source, answer.diagnostic), f"diagnostic {answer.diagnostic}")
        return f"{_where(peer)} refuses the association: {why}"
    return f"{_where(peer)} does not answer as a DICOM application; check host and port"


def _not_accepted(item: Sendable) -> str:
    return (
        f"the peer does not accept {UID(item.sop_class_uid).name} in {UID(item.transfer_syntax_uid).name} "
        f"({attribute_name(_TRANSFER_SYNTAX)} of the file)"
    )


def _where(peer: PeerAddress) -> str:
    return f"{peer.ae_title}@{peer.host}:{peer.port}"


_REJECTIONS = {
    (1, 3): "it does not know our AE title (--from); its administrator must add it",
    (1, 7): "it has another AE title than the one called",
    (3, 1): "it is busy or out of space; try again later",
    (3, 2): "it has as many associations as it takes; try again later",
}


def _looks_like_a_data_set(head: bytes) -> bool:
    """Begins like an element of group 0002, 0004 or 0008, or holds a DICOM UID among binary bytes."""
    if len(head) < 8:
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    if head[:2] in _FIRST_GROUPS and (explicit or int.from_bytes(head[4:8], "little") < 1024):
        return True
    return b"1.2.840.10008." in head and b"\0" in head
