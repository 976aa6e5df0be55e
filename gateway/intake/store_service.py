"""C-STORE as a service provider: fragments go straight to the spool, Success only when they are durable (REC-01).

Takes the place of pynetdicom's DIMSE provider on accepted associations. C-STORE requests are handled here, fragment
by fragment, so that memory does not grow with the object and nothing of the data set is decoded before the answer;
every other message goes to pynetdicom as it came.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.pdu_primitives import P_DATA

from gateway.intake.command_set import (
    AFFECTED_SOP_CLASS_UID,
    AFFECTED_SOP_INSTANCE_UID,
    C_STORE_RQ,
    COMMAND_DATA_SET_TYPE,
    COMMAND_FIELD,
    MESSAGE_ID,
    NO_DATA_SET,
    StoreStatus,
    attribute_name,
    encode_store_response,
    parse_command_set,
    unsigned_short,
)
from gateway.intake.uids import uid_fault
from storage.errors import SpoolFull, StorageError
from storage.object_writer import ObjectWriter
from storage.part10 import ObjectEvidence
from storage.spool import Spool

LOG = logging.getLogger(__name__)

SUCCESS = StoreStatus(code=0x0000)
OUT_OF_RESOURCES = 0xA700  # PS3.4 B.2.3
CANNOT_UNDERSTAND = 0xC000
PROCESSING_FAILURE = 0x0110  # PS3.7 C.5
INVALID_INSTANCE = 0x0117
SOP_CLASS_NOT_SUPPORTED = 0x0122

_MAX_COMMAND_BYTES = 64 << 10
_MAX_FOREIGN_BYTES = 1 << 20  # data set of a message that is not a C-STORE


class ProtocolViolation(Exception):
    """The peer broke PS3.7 or PS3.8 in a way that leaves no message to answer; the association is aborted."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The association that objects come on."""

    association_id: str
    calling_ae: str
    called_ae: str
    peer_address: str


@dataclass
class _Reception:
    """One C-STORE between its command set and its last fragment."""

    context_id: int
    message_id: int
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    writer: ObjectWriter | None = None
    failure: StoreStatus | None = None


class StoreServiceProvider(DIMSEServiceProvider):  # type: ignore[misc]
    """DIMSE provider of one accepted association; called by the association's network thread alone.

    `on_first_object` runs before the first object is written and may raise StorageError.
    `on_refused` hears the reason of each object that was not answered with Success.
    """

    def __init__(
        self,
        association: Any,
        spool: Spool,
        *,
        on_first_object: Callable[[], None],
        on_refused: Callable[[str], None],
    ) -> None:
        super().__init__(association)
        self._spool = spool
        self._on_first_object = on_first_object
        self._on_refused = on_refused
        self._caller: Caller | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._first = True
        self._command = bytearray()
        self._reception: _Reception | None = None
        self._foreign_bytes = -1  # -1: no foreign message is being received
        self.objects = 0  # acknowledged with Success

    @property
    def stored_or_tried(self) -> bool:
        """Whether the peer began to send at least one object that could be written."""
        return not self._first

    def admit(self, caller: Caller) -> None:
        """The association is accepted; objects carry this evidence."""
        self._caller = caller

    def close(self) -> None:
        """The association is over: a half received object is dropped, and nothing more is taken."""
        with self._lock:
            self._closed = True
            if self._reception is not None and self._reception.writer is not None:
                self._reception.writer.discard()
            self._reception = None

    def receive_primitive(self, primitive: Any) -> None:
        """Take the fragments of one P-DATA. Never raises: what cannot be answered ends in an abort."""
        with self._lock:
            if self._closed:
                return
            try:
                for context_id, fragment in primitive.presentation_data_value_list:
                    self._take(context_id, fragment)
            except ProtocolViolation as error:
                LOG.warning("association %s is aborted: %s", self._association_id, error)
                self._abort()
            except Exception:  # the edge: an escaping exception would leave the peer without an answer
                LOG.exception("association %s is aborted: error in the C-STORE service", self._association_id)
                self._abort()

    # -- fragments ---------------------------------------------------------------------------------------------

    def _take(self, context_id: int, fragment: bytes) -> None:
        """One PDV: first byte is the message control header (PS3.8 E.2): bit 0 command, bit 1 last."""
        if not fragment:
            raise ProtocolViolation("a presentation data value without its control header")
        is_command, is_last = fragment[0] & 1, fragment[0] & 2
        if self._foreign_bytes >= 0:
            self._take_foreign(context_id, fragment)
        elif self._reception is None:
            if not is_command:
                raise ProtocolViolation("a data set fragment without a command set before it")
            self._command += fragment[1:]
            if len(self._command) > _MAX_COMMAND_BYTES:
                raise ProtocolViolation(f"a command set of more than {_MAX_COMMAND_BYTES} bytes")
            if is_last:
                command, self._command = bytes(self._command), bytearray()
                self._begin(context_id, command)
        else:
            if is_command:
                raise ProtocolViolation("a command set while a data set is under way")
            if context_id != self._reception.context_id:
                raise ProtocolViolation("a data set fragment on another presentation context than its command")
            self._write(self._reception, fragment)
            if is_last:
                reception, self._reception = self._reception, None
                self._finish(reception)

    def _begin(self, context_id: int, command: bytes) -> None:
        try:
            elements = parse_command_set(command)
        except ValueError as error:
            raise ProtocolViolation(str(error)) from error
        has_data_set = unsigned_short(elements, COMMAND_DATA_SET_TYPE) != NO_DATA_SET
        if unsigned_short(elements, COMMAND_FIELD) != C_STORE_RQ:
            self._hand_over(context_id, b"\x03" + command)
            self._foreign_bytes = 0 if has_data_set else -1
            return
        message_id = unsigned_short(elements, MESSAGE_ID)
        if message_id is None:
            raise ProtocolViolation(f"a C-STORE request without {attribute_name(MESSAGE_ID)}")
        reception = _Reception(context_id=context_id, message_id=message_id)
        reception.failure = self._check(reception, elements, has_data_set=has_data_set)
        if not has_data_set:
            self._finish(reception)
            return
        self._reception = reception
        if reception.failure is None:
            self._open(reception)

    def _check(self, reception: _Reception, elements: dict[int, bytes], *, has_data_set: bool) -> StoreStatus | None:
        """What is wrong with the request, before anything of it is used."""
        context = self.assoc._accepted_cx.get(reception.context_id)
        if context is None:
            raise ProtocolViolation(f"presentation context {reception.context_id} was not accepted")
        faults = {
            element: uid_fault(elements.get(element, b""))
            for element in (AFFECTED_SOP_CLASS_UID, AFFECTED_SOP_INSTANCE_UID)
        }
        for element, field in (
            (AFFECTED_SOP_CLASS_UID, "sop_class_uid"),
            (AFFECTED_SOP_INSTANCE_UID, "sop_instance_uid"),
        ):
            if faults[element] is None:
                setattr(reception, field, elements[element].rstrip(b"\0 ").decode("ascii"))
        for element, code in (
            (AFFECTED_SOP_INSTANCE_UID, INVALID_INSTANCE),
            (AFFECTED_SOP_CLASS_UID, SOP_CLASS_NOT_SUPPORTED),
        ):
            if faults[element] is not None:
                return StoreStatus(code=code, element=element, comment=f"{attribute_name(element)} {faults[element]}")
        if reception.sop_class_uid != context.abstract_syntax:
            return StoreStatus(
                code=SOP_CLASS_NOT_SUPPORTED,
                element=AFFECTED_SOP_CLASS_UID,
                comment=f"{attribute_name(AFFECTED_SOP_CLASS_UID)} is not the context's",
            )
        if not has_data_set:
            return StoreStatus(
                code=CANNOT_UNDERSTAND,
                element=COMMAND_DATA_SET_TYPE,
                comment=f"{attribute_name(COMMAND_DATA_SET_TYPE)} says: no data set",
            )
        return None

    # -- the spool ---------------------------------------------------------------------------------------------

    def _open(self, reception: _Reception) -> None:
        caller = self._caller
        if caller is None:
            raise ProtocolViolation("an object before the association was accepted")
        try:
            if self._first:
                self._on_first_object()
                self._first = False
            evidence = ObjectEvidence(
                object_id=self._spool.new_id(),
                association_id=caller.association_id,
                peer_address=caller.peer_address,
                calling_ae=caller.calling_ae,
                called_ae=caller.called_ae,
                received_at=datetime.now(UTC),
                sop_class_uid=reception.sop_class_uid,
                sop_instance_uid=reception.sop_instance_uid,
                transfer_syntax_uid=str(self.assoc._accepted_cx[reception.context_id].transfer_syntax[0]),
            )
            reception.writer = self._spool.open_object(evidence)
        except Exception as error:  # noqa: BLE001 - the edge: logged and answered as a failure
            reception.failure = _status_of(error)

    def _write(self, reception: _Reception, fragment: bytes) -> None:
        if reception.writer is None or reception.failure is not None:
            return  # a refused object is read to its end, because the answer comes after it
        try:
            reception.writer.write(memoryview(fragment)[1:])
        except Exception as error:  # noqa: BLE001 - the edge: logged and answered as a failure
            reception.failure = _status_of(error)

    def _finish(self, reception: _Reception) -> None:
        """Make the object durable, then answer; any failure on the way is answered as such."""
        status = reception.failure
        if status is None and reception.writer is not None:
            try:
                reception.writer.commit()
                status = SUCCESS
                self.objects += 1
            except Exception as error:  # noqa: BLE001 - the edge: logged, and the object is not durable
                status = _status_of(error)
        if status is None:
            status = StoreStatus(code=PROCESSING_FAILURE, comment="internal error, see the gateway's log")
        if reception.writer is not None:
            reception.writer.discard()
        if not status.is_success:
            LOG.warning(
                "object refused with %04X on association %s: %s", status.code, self._association_id, status.comment
            )
            self._on_refused(status.comment)
        self._send(
            reception.context_id,
            encode_store_response(
                message_id=reception.message_id,
                sop_class_uid=reception.sop_class_uid,
                sop_instance_uid=reception.sop_instance_uid,
                status=status,
            ),
        )

    # -- the network -------------------------------------------------------------------------------------------

    def _send(self, context_id: int, command: bytes) -> None:
        limit = self.assoc.requestor.maximum_length
        size = max(limit - 6, 64) if limit else len(command)  # PS3.8 D.1: 6 bytes of item length, id and header
        for start in range(0, len(command), size):
            last = start + size >= len(command)
            primitive = P_DATA()
            primitive.presentation_data_value_list.append(
                (context_id, (b"\x03" if last else b"\x01") + command[start : start + size])
            )
            self.dul.send_pdu(primitive)

    def _take_foreign(self, context_id: int, fragment: bytes) -> None:
        if fragment[0] & 1:
            raise ProtocolViolation("a command set while a data set is under way")
        self._foreign_bytes += len(fragment)
        if self._foreign_bytes > _MAX_FOREIGN_BYTES:
            raise ProtocolViolation(f"a message of another service with more than {_MAX_FOREIGN_BYTES} bytes")
        if fragment[0] & 2:
            self._foreign_bytes = -1
        self._hand_over(context_id, fragment)

    def _hand_over(self, context_id: int, fragment: bytes) -> None:
        primitive = P_DATA()
        primitive.presentation_data_value_list.append((context_id, fragment))
        super().receive_primitive(primitive)

    def _abort(self) -> None:
        """End the association from the network thread: an invalid PDU event makes the state machine abort (AA-8)."""
        self._closed = True
        if self._reception is not None and self._reception.writer is not None:
            self._reception.writer.discard()
        self._reception = None
        self.dul.event_queue.put("Evt19")

    @property
    def _association_id(self) -> str:
        return self._caller.association_id if self._caller else "(not accepted)"


def _status_of(error: Exception) -> StoreStatus:
    """What a failed write means for the sender: try again later, or look at the gateway."""
    if isinstance(error, SpoolFull):
        LOG.error("an object is refused: %s", error)
        return StoreStatus(code=OUT_OF_RESOURCES, comment="out of disk space, try again later")
    if isinstance(error, (StorageError, OSError)):
        LOG.error("an object is refused: %s", error)
        return StoreStatus(code=PROCESSING_FAILURE, comment="the spool cannot keep the object durably")
    LOG.error("an object is refused: internal error", exc_info=error)
    return StoreStatus(code=PROCESSING_FAILURE, comment="internal error, see the gateway's log")
