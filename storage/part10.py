"""The head of a spooled file: preamble and file meta information (PS3.10 clause 7.1), written and read by hand.

No data set is decoded here, and no DICOM toolkit is needed: the data set that follows the head stays as received.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

# UUID-derived UIDs (PS3.5 B.2) of this implementation.
IMPLEMENTATION_CLASS_UID = "2.25.31337056607250404367437192954732237208"
IMPLEMENTATION_VERSION_NAME = "SEGGATE_0_1"
PRIVATE_INFORMATION_CREATOR_UID = "2.25.16078619026675566321215350527495598433"

_PREAMBLE_BYTES = 128
_MAX_META_BYTES = 1 << 20
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})

_VERSION = 0x00020001
_SOP_CLASS = 0x00020002
_SOP_INSTANCE = 0x00020003
_TRANSFER_SYNTAX = 0x00020010
_IMPLEMENTATION_CLASS = 0x00020012
_IMPLEMENTATION_VERSION = 0x00020013
_SOURCE_AE = 0x00020016
_SENDING_AE = 0x00020017
_RECEIVING_AE = 0x00020018
_PRIVATE_CREATOR = 0x00020100
_PRIVATE_INFORMATION = 0x00020102


@dataclass(frozen=True, kw_only=True)
class ObjectEvidence:
    """How an object came here. The UIDs are those of the C-STORE request and of the accepted context."""

    object_id: str
    association_id: str
    peer_address: str
    calling_ae: str
    called_ae: str
    received_at: datetime
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str


def encode_preamble_and_meta(evidence: ObjectEvidence) -> bytes:
    """128 zero bytes, "DICM", and the file meta information in Explicit VR Little Endian."""
    private = {
        "object_id": evidence.object_id,
        "association_id": evidence.association_id,
        "peer_address": evidence.peer_address,
        "received_at": evidence.received_at.isoformat(),
    }
    body = b"".join(
        (
            _element(_VERSION, b"OB", b"\x00\x01"),
            _text(_SOP_CLASS, b"UI", evidence.sop_class_uid),
            _text(_SOP_INSTANCE, b"UI", evidence.sop_instance_uid),
            _text(_TRANSFER_SYNTAX, b"UI", evidence.transfer_syntax_uid),
            _text(_IMPLEMENTATION_CLASS, b"UI", IMPLEMENTATION_CLASS_UID),
            _text(_IMPLEMENTATION_VERSION, b"SH", IMPLEMENTATION_VERSION_NAME),
            _text(_SOURCE_AE, b"AE", evidence.calling_ae),
            _text(_SENDING_AE, b"AE", evidence.calling_ae),
            _text(_RECEIVING_AE, b"AE", evidence.called_ae),
            _text(_PRIVATE_CREATOR, b"UI", PRIVATE_INFORMATION_CREATOR_UID),
            _element(_PRIVATE_INFORMATION, b"OB", json.dumps(private, sort_keys=True).encode("ascii")),
        )
    )
    length = _element(0x00020000, b"UL", struct.pack("<I", len(body)))
    return b"\0" * _PREAMBLE_BYTES + b"DICM" + length + body


def read_meta_elements(file: BinaryIO) -> tuple[dict[int, bytes], int]:
    """({tag: value bytes}, offset of the data set) of any DICOM file that begins with a preamble.

    Reads elements until group 0002 ends; the group length is not trusted. Raises ValueError naming what is wrong.
    """
    head = file.read(_PREAMBLE_BYTES + 4)
    if head[_PREAMBLE_BYTES:] != b"DICM":
        raise ValueError("no preamble and DICM prefix (PS3.10 7.1)")
    elements: dict[int, bytes] = {}
    offset = len(head)
    while True:
        start = file.read(8)
        if len(start) < 8 or start[:2] != b"\x02\x00":
            return elements, offset
        group, element, vr, length = struct.unpack("<HH2sH", start)
        offset += 8
        if vr in _LONG_VRS:
            extended = file.read(4)
            if len(extended) < 4:
                raise ValueError(f"file meta information ends inside ({group:04X},{element:04X})")
            (length,) = struct.unpack("<I", extended)
            offset += 4
        if length > _MAX_META_BYTES:
            raise ValueError(f"({group:04X},{element:04X}) announces {length} bytes in the file meta information")
        value = file.read(length)
        if len(value) < length:
            raise ValueError(f"file meta information ends inside ({group:04X},{element:04X})")
        offset += length
        elements[group << 16 | element] = value


def read_meta(file: BinaryIO) -> tuple[ObjectEvidence, int]:
    """(evidence, offset of the data set) of a file that the spool wrote. Raises ValueError for any other file."""
    elements, offset = read_meta_elements(file)
    try:
        private: dict[str, Any] = json.loads(elements[_PRIVATE_INFORMATION].rstrip(b" \0"))
        evidence = ObjectEvidence(
            object_id=str(private["object_id"]),
            association_id=str(private["association_id"]),
            peer_address=str(private["peer_address"]),
            received_at=datetime.fromisoformat(private["received_at"]),
            calling_ae=meta_text(elements, _SENDING_AE),
            called_ae=meta_text(elements, _RECEIVING_AE),
            sop_class_uid=meta_text(elements, _SOP_CLASS),
            sop_instance_uid=meta_text(elements, _SOP_INSTANCE),
            transfer_syntax_uid=meta_text(elements, _TRANSFER_SYNTAX),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("the file meta information does not carry the evidence of this spool") from error
    return evidence, offset


def meta_text(elements: dict[int, bytes], tag: int) -> str:
    """Text of a file meta element without padding; empty when absent."""
    return elements.get(tag, b"").rstrip(b" \0").decode("ascii", "replace")


def _element(tag: int, vr: bytes, value: bytes) -> bytes:
    if len(value) % 2:
        value += b" " if vr not in {b"UI", b"OB"} else b"\0"
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr)
    if vr in _LONG_VRS:
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def _text(tag: int, vr: bytes, value: str) -> bytes:
    return _element(tag, vr, value.encode("ascii", "replace"))
