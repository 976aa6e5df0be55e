"""A DICOM peer that does exactly what a test says, legal or not: raw upper layer PDUs over a socket (PS3.8 clause 9).

Written against the standard, not against any toolkit, so that it can send what a toolkit refuses to send.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Self

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
VERIFICATION = "1.2.840.10008.1.1"


@dataclass(frozen=True)
class Rejected(Exception):
    """A-ASSOCIATE-RJ: result, source, diagnostic."""

    result: int
    source: int
    diagnostic: int


class Aborted(Exception):
    """The other side sent A-ABORT or closed the connection."""


@dataclass(frozen=True)
class Response:
    """What a DIMSE response says."""

    status: int
    comment: str
    elements: dict[int, bytes]


def element(number: int, value: bytes) -> bytes:
    """One element of group 0000, Implicit VR Little Endian, padded to even length with NUL."""
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHI", 0, number, len(value)) + value


def command_set(elements: dict[int, bytes]) -> bytes:
    body = b"".join(element(number, value) for number, value in sorted(elements.items()))
    return element(0, struct.pack("<I", len(body))) + body


def store_command(
    sop_class: bytes | None, sop_instance: bytes | None, *, message_id: int = 1, data: bool = True
) -> bytes:
    """A C-STORE-RQ command set; None leaves the attribute out."""
    elements = {
        0x0100: struct.pack("<H", 0x0001),
        0x0110: struct.pack("<H", message_id),
        0x0700: struct.pack("<H", 0),
        0x0800: struct.pack("<H", 0x0000 if data else 0x0101),
    }
    if sop_class is not None:
        elements[0x0002] = sop_class
    if sop_instance is not None:
        elements[0x1000] = sop_instance
    return command_set(elements)


class ScriptedPeer:
    """One TCP connection to a storage SCP; `associate` first, or send what you like."""

    def __init__(self, port: int, *, host: str = "127.0.0.1", timeout_s: float = 10.0) -> None:
        self.socket = socket.create_connection((host, port), timeout=timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.accepted: dict[int, tuple[int, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    # -- upper layer -------------------------------------------------------------------------------------------

    def send_pdu(self, kind: int, body: bytes) -> None:
        self.socket.sendall(struct.pack(">BBL", kind, 0, len(body)) + body)

    def receive_pdu(self) -> tuple[int, bytes]:
        head = self._exactly(6)
        kind, _, length = struct.unpack(">BBL", head)
        return kind, self._exactly(length)

    def associate(
        self,
        *,
        calling_ae: str = "CT1",
        called_ae: str = "SEGGATE",
        contexts: dict[int, tuple[str, list[str]]] | None = None,
        max_pdu_bytes: int = 16384,
    ) -> dict[int, tuple[int, str]]:
        """Ask for an association; returns {context id: (result, transfer syntax)}. Raises Rejected, Aborted."""
        contexts = contexts or {1: (CT_IMAGE, [EXPLICIT_LITTLE]), 3: (VERIFICATION, [IMPLICIT_LITTLE])}
        body = struct.pack(">HH", 1, 0) + called_ae.ljust(16).encode() + calling_ae.ljust(16).encode() + bytes(32)
        body += _item(0x10, b"1.2.840.10008.3.1.1.1")
        for context_id, (abstract, syntaxes) in contexts.items():
            inner = _item(0x30, abstract.encode()) + b"".join(_item(0x40, s.encode()) for s in syntaxes)
            body += _item(0x20, bytes((context_id, 0, 0, 0)) + inner)
        body += _item(0x50, _item(0x51, struct.pack(">L", max_pdu_bytes)) + _item(0x52, b"1.2.3.4.5"))
        self.send_pdu(0x01, body)
        kind, answer = self.receive_pdu()
        if kind == 0x03:
            raise Rejected(*answer[1:4])
        if kind != 0x02:
            raise Aborted(f"PDU type {kind}")
        offset = 68
        while offset < len(answer):
            item, length = struct.unpack_from(">BxH", answer, offset)
            value = answer[offset + 4 : offset + 4 + length]
            if item == 0x21:
                self.accepted[value[0]] = (value[2], value[8:].decode().rstrip("\0"))
            offset += 4 + length
        return self.accepted

    def release(self) -> None:
        self.send_pdu(0x05, bytes(4))
        kind, _ = self.receive_pdu()
        if kind != 0x06:
            raise Aborted(f"PDU type {kind} instead of a release response")

    def abort(self) -> None:
        """A-ABORT by the service user."""
        self.send_pdu(0x07, bytes(4))

    # -- messages ----------------------------------------------------------------------------------------------

    def send_fragment(self, data: bytes, *, command: bool, last: bool, context_id: int = 1) -> None:
        value = bytes((context_id, (1 if command else 0) | (2 if last else 0))) + data
        self.send_pdu(0x04, struct.pack(">L", len(value)) + value)

    def send_store(
        self,
        data_set: bytes,
        *,
        sop_instance: bytes | None,
        sop_class: bytes | None = CT_IMAGE.encode(),
        context_id: int = 1,
        fragment_bytes: int = 16000,
        message_id: int = 1,
    ) -> None:
        """Send a whole C-STORE request."""
        self.send_fragment(
            store_command(sop_class, sop_instance, message_id=message_id),
            command=True,
            last=True,
            context_id=context_id,
        )
        for start in range(0, max(len(data_set), 1), fragment_bytes):
            piece = data_set[start : start + fragment_bytes]
            last = start + fragment_bytes >= len(data_set)
            self.send_fragment(piece, command=False, last=last, context_id=context_id)

    def store(self, data_set: bytes, **how: object) -> Response:
        """Send a whole C-STORE request and wait for its answer."""
        self.send_store(data_set, **how)  # type: ignore[arg-type]
        return self.receive_response()

    def receive_response(self) -> Response:
        """The next DIMSE response (a command set). Raises Aborted."""
        command = b""
        while True:
            kind, body = self.receive_pdu()
            if kind != 0x04:
                raise Aborted(f"PDU type {kind}")
            offset = 0
            while offset < len(body):
                (length,) = struct.unpack_from(">L", body, offset)
                control = body[offset + 5]
                command += body[offset + 6 : offset + 4 + length]
                offset += 4 + length
                if control & 2:
                    return _response(command)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                piece = self.socket.recv(count - len(data))
            except ConnectionError as error:
                raise Aborted("the connection broke") from error
            if not piece:
                raise Aborted("the connection was closed")
            data += piece
        return data


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def _response(command: bytes) -> Response:
    elements: dict[int, bytes] = {}
    offset = 0
    while offset < len(command):
        _, number, length = struct.unpack_from("<HHI", command, offset)
        elements[number] = command[offset + 8 : offset + 8 + length]
        offset += 8 + length
    (status,) = struct.unpack("<H", elements[0x0900])
    return Response(status, elements.get(0x0902, b"").decode().strip(), elements)
