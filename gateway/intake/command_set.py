"""Command sets of C-STORE, read and written by hand (PS3.7 clause 6.3.1 and 9.3.1: Implicit VR Little Endian).

By hand, because a request with a blank or overlong UID must be answered with the attribute's name, and a toolkit's
reader either drops such a message without an answer or ends the association.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

C_STORE_RQ = 0x0001
C_STORE_RSP = 0x8001
NO_DATA_SET = 0x0101

AFFECTED_SOP_CLASS_UID = 0x0002
COMMAND_FIELD = 0x0100
MESSAGE_ID = 0x0110
MESSAGE_ID_BEING_RESPONDED_TO = 0x0120
COMMAND_DATA_SET_TYPE = 0x0800
STATUS = 0x0900
OFFENDING_ELEMENT = 0x0901
ERROR_COMMENT = 0x0902
AFFECTED_SOP_INSTANCE_UID = 0x1000

_KEYWORDS = {
    AFFECTED_SOP_CLASS_UID: "AffectedSOPClassUID",
    AFFECTED_SOP_INSTANCE_UID: "AffectedSOPInstanceUID",
    COMMAND_DATA_SET_TYPE: "CommandDataSetType",
    MESSAGE_ID: "MessageID",
}
_ERROR_COMMENT_LENGTH = 64  # LO


@dataclass(frozen=True, kw_only=True)
class StoreStatus:
    """Status of a C-STORE response with, on failure, the element at fault and a comment."""

    code: int
    comment: str = ""
    element: int | None = None  # element number in group 0000

    @property
    def is_success(self) -> bool:
        return self.code == 0x0000


def attribute_name(element: int) -> str:
    """E.g. "AffectedSOPInstanceUID (0000,1000)"."""
    return f"{_KEYWORDS.get(element, 'element')} (0000,{element:04X})"


def parse_command_set(data: bytes) -> dict[int, bytes]:
    """{element number in group 0000: value bytes}. Raises ValueError when the bytes are no command set."""
    elements: dict[int, bytes] = {}
    offset = 0
    while offset < len(data):
        if offset + 8 > len(data):
            raise ValueError("the command set ends inside an element")
        group, element, length = struct.unpack_from("<HHI", data, offset)
        offset += 8
        if group != 0x0000:
            raise ValueError(f"group {group:04X} in a command set")
        if length > len(data) - offset:
            raise ValueError(f"(0000,{element:04X}) is longer than the command set")
        elements[element] = data[offset : offset + length]
        offset += length
    return elements


def unsigned_short(elements: dict[int, bytes], element: int) -> int | None:
    """Value of a US element; None when absent or not two bytes long."""
    value = elements.get(element, b"")
    return int.from_bytes(value, "little") if len(value) == 2 else None


def encode_store_response(*, message_id: int, sop_class_uid: str, sop_instance_uid: str, status: StoreStatus) -> bytes:
    """A C-STORE-RSP command set. Empty UIDs are left out (they are optional in a response, PS3.7 9.3.1.2)."""
    body = b"".join(
        (
            _uid(AFFECTED_SOP_CLASS_UID, sop_class_uid),
            _short(COMMAND_FIELD, C_STORE_RSP),
            _short(MESSAGE_ID_BEING_RESPONDED_TO, message_id),
            _short(COMMAND_DATA_SET_TYPE, NO_DATA_SET),
            _short(STATUS, status.code),
            b"" if status.element is None else _element(OFFENDING_ELEMENT, struct.pack("<HH", 0x0000, status.element)),
            _text(ERROR_COMMENT, status.comment[:_ERROR_COMMENT_LENGTH]),
            _uid(AFFECTED_SOP_INSTANCE_UID, sop_instance_uid),
        )
    )
    return _element(0x0000, struct.pack("<I", len(body))) + body


def _element(element: int, value: bytes) -> bytes:
    return struct.pack("<HHI", 0x0000, element, len(value)) + value


def _short(element: int, value: int) -> bytes:
    return _element(element, struct.pack("<H", value))


def _uid(element: int, value: str) -> bytes:
    encoded = value.encode("ascii")
    return _element(element, encoded + b"\0" * (len(encoded) % 2)) if encoded else b""


def _text(element: int, value: str) -> bytes:
    encoded = value.encode("ascii", "replace")
    return _element(element, encoded + b" " * (len(encoded) % 2)) if encoded else b""
