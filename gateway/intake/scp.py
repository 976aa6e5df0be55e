"""The DICOM listener: C-ECHO and C-STORE into the spool, nothing else (no database, no decoding).

pynetdicom does the upper layer protocol. The pieces that a hospital's network needs differently are replaced here
through its own seams: the connection (no delay, bounded PDU length, deadlines), the association request (admission),
and the DIMSE provider (gateway/intake/store_service.py).
"""

from __future__ import annotations

import copy
import logging
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pynetdicom
from pynetdicom import _config, evt
from pynetdicom.association import MODE_ACCEPTOR, Association
from pynetdicom.pdu_primitives import A_ABORT
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from gateway.intake.admission import Admission, Refusal, RefusalCounter, RefusalKey, plain_address
from gateway.intake.connection import BoundedSocket
from gateway.intake.presentation_contexts import contexts_for_unknown, supported_contexts
from gateway.intake.store_service import Caller, StoreServiceProvider
from gateway.settings import Settings
from gateway.stop_signal import set_on_stop_signals
from storage.errors import StorageError
from storage.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from storage.spool import Spool

LOG = logging.getLogger(__name__)

_MAX_CONTROL_PDU_BYTES = 1 << 20  # an A-ASSOCIATE-RQ with 128 contexts of many transfer syntaxes is far smaller
_EXTRA_CONNECTIONS = 64  # connections beyond max_associations that may wait for their refusal
_REFUSALS_EVERY_S = 1.0
_REFUSALS_EVERY_IN_A_FLOOD_S = 15.0


class IntakeAssociation(Association):  # type: ignore[misc]
    """One accepted connection, from the association request to its end, with the evidence of both."""

    def __init__(self, receiver: Receiver, peer_address: str) -> None:
        super().__init__(receiver.entity, MODE_ACCEPTOR)
        self.receiver = receiver
        self.association_id = uuid.uuid4().hex
        self.peer_address = peer_address
        self.caller: Caller | None = None
        self.opened_at: datetime | None = None
        self.ended_by_peer = False
        self.dimse = StoreServiceProvider(
            self, receiver.spool, on_first_object=self._write_opened, on_refused=self._count_refused_object
        )

    def run_reactor(self) -> None:
        """The association's thread: whatever happens in it, its end is recorded."""
        try:
            super().run_reactor()
        finally:
            self.dimse.close()
            self.receiver.association_ended(self)

    def on_requested(self) -> None:
        """Between the association request and the negotiation: admit or refuse."""
        request = self.requestor.primitive
        calling_ae = str(request.calling_ae_title).strip()
        called_ae = str(request.called_ae_title).strip()
        refusal = self.receiver.admission.request(
            association_id=self.association_id,
            calling_ae=calling_ae,
            called_ae=called_ae,
            peer_address=self.peer_address,
        )
        if refusal is not None:
            self.receiver.count_refused_association(refusal, calling_ae, called_ae, self.peer_address)
            self.acse.send_reject(*refusal.code)
            # Wait until the refusal is out and the peer has closed, else the connection would be closed before it.
            self.kill()
            return
        self.caller = Caller(
            association_id=self.association_id,
            calling_ae=calling_ae,
            called_ae=called_ae,
            peer_address=self.peer_address,
        )
        self.opened_at = datetime.now(UTC)
        self.dimse.admit(self.caller)
        if self.receiver.stores_unknown_sop_classes:
            requested = [
                str(context.abstract_syntax)
                for context in self.requestor.primitive.presentation_context_definition_list
            ]
            more = contexts_for_unknown(requested, self.receiver.known_sop_classes)
            self.acceptor.supported_contexts = [*self.acceptor.supported_contexts, *more]

    @property
    def ended(self) -> str:
        """released | aborted | lost: how the peer left."""
        if self.is_released:
            return "released"
        return "aborted" if self.ended_by_peer else "lost"

    def _write_opened(self) -> None:
        """The association brings objects: record it before the first one."""
        if self.caller is not None and self.opened_at is not None:
            self.receiver.spool.write_event("opened", _association_detail(self.caller, self.opened_at))

    def _count_refused_object(self, reason: str) -> None:
        if self.caller is not None:
            self.receiver.refusals.add(
                RefusalKey(
                    kind="object",
                    calling_ae=self.caller.calling_ae,
                    called_ae=self.caller.called_ae,
                    peer_address=self.caller.peer_address,
                    reason=reason,
                )
            )


class IntakeRequestHandler(RequestHandler):  # type: ignore[misc]
    """Makes an IntakeAssociation for each connection."""

    def _create_association(self) -> IntakeAssociation:
        receiver: Receiver = self.server.receiver
        association = IntakeAssociation(receiver, plain_address(str(self.client_address[0])))
        association._server = self.server
        association.name = f"AcceptorThread@{association.association_id[:8]}"  # the prefix is how the server finds it
        association.set_socket(
            BoundedSocket(
                association,
                self.request,
                timeout_s=receiver.settings.gateway.receiver.network_timeout_s,
                max_pdu_bytes=max(receiver.settings.gateway.receiver.max_pdu_bytes + 12, _MAX_CONTROL_PDU_BYTES),
            )
        )
        association.acceptor.maximum_length = self.ae.maximum_pdu_size
        association.acceptor.ae_title = self.server.ae_title
        association.acceptor.address_info = self.local
        association.acceptor.implementation_class_uid = self.ae.implementation_class_uid
        association.acceptor.implementation_version_name = self.ae.implementation_version_name
        # Shallow: negotiation reads the acceptor's contexts and writes new ones; a deep copy of them costs 50 ms.
        association.acceptor.supported_contexts = [copy.copy(context) for context in self.server.contexts]
        association.requestor.address_info = self.remote
        association.bind(evt.EVT_C_ECHO, _answer_echo)
        association.bind(evt.EVT_REQUESTED, _on_requested)
        association.bind(evt.EVT_ACSE_RECV, _on_acse)
        return association


class IntakeServer(ThreadedAssociationServer):  # type: ignore[misc]
    """Accepts connections, up to a number that a flood cannot pass."""

    receiver: Receiver
    daemon_threads = True
    request_queue_size = 128

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """False closes the connection at once: there are too many that wait for something."""
        limit = self.receiver.settings.gateway.receiver.max_associations + _EXTRA_CONNECTIONS
        return len(self.active_associations) < limit


class Receiver:
    """The listener of one process: `start`, then `stop` (which lets open associations finish)."""

    def __init__(self, settings: Settings, spool: Spool) -> None:
        self.settings = settings
        self.spool = spool
        own = settings.gateway.receiver
        canary_ae = settings.gateway.canary.ae_title if settings.gateway.scheduler.canary_cron else None
        self.admission = Admission(own, settings.gateway.senders, spool, canary_ae=canary_ae)
        self.refusals = RefusalCounter()
        self.stores_unknown_sop_classes = own.unknown_sop_classes == "store"
        self.entity = pynetdicom.AE(ae_title=own.ae_title)
        self.known_sop_classes: frozenset[str] = frozenset()
        self._server: IntakeServer | None = None
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    @property
    def port(self) -> int:
        if self._server is None:
            raise RuntimeError("the receiver is not started")
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Prepare the spool and listen. Raises SpoolFull, SpoolUnsafe, OSError (address in use)."""
        own = self.settings.gateway.receiver
        self.spool.prepare()
        self.spool.sweep_tmp()
        _config.LOG_HANDLER_LEVEL = "none"  # read when the server is made: no log line per PDU
        contexts = supported_contexts()
        self.known_sop_classes = frozenset(str(context.abstract_syntax) for context in contexts)
        entity = self.entity
        entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        entity.maximum_pdu_size = own.max_pdu_bytes
        entity.acse_timeout = own.acse_timeout_s
        entity.dimse_timeout = own.dimse_timeout_s
        entity.network_timeout = own.network_timeout_s
        entity.connection_timeout = own.acse_timeout_s
        entity.maximum_associations = 1 << 20  # admission counts, and tells the peer why
        bound = entity.make_server(
            (own.host, own.port),
            contexts=contexts,
            server_class=IntakeServer,
            request_handler=IntakeRequestHandler,
        )
        try:
            # Between binding and accepting: it ends the open associations of a predecessor, and where the address is
            # in use that one is alive.
            self.spool.write_event("started", {"at": datetime.now(UTC).isoformat()})
        except StorageError:
            bound.server_close()
            raise
        self._server = bound
        self._server.receiver = self
        entity._servers.append(self._server)
        self._threads = [
            threading.Thread(
                target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="accept", daemon=True
            ),
            threading.Thread(target=self._write_refusals, name="refusals", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        LOG.info("receiver %s listens on %s port %d", own.ae_title, own.host, self.port)

    def stop(self) -> None:
        """Stop accepting, let open associations finish up to `drain_timeout_s`, abort the rest."""
        if self._server is None:
            return
        self.admission.drain()
        self._server.shutdown()
        deadline = time.monotonic() + self.settings.gateway.receiver.drain_timeout_s
        while time.monotonic() < deadline and self.admission.open_associations:
            time.sleep(0.02)
        left = self._server.active_associations
        for association in left:
            association.abort(block=False)
        for association in left:
            association.join(timeout=2.0)
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=5.0)
        self._server = None
        LOG.info("receiver stopped; associations aborted: %d", len(left))

    def association_ended(self, association: IntakeAssociation) -> None:
        """Called once by each association's own thread."""
        try:
            self._write_ended(association)
        finally:
            self.admission.closed(association.association_id)

    def _write_ended(self, association: IntakeAssociation) -> None:
        if association.caller is None or association.opened_at is None or not association.dimse.stored_or_tried:
            return  # refused, or nothing but an echo: no evidence about any study
        detail = _association_detail(association.caller, association.opened_at) | {
            "ended": association.ended,
            "ended_at": datetime.now(UTC).isoformat(),
            "objects": association.dimse.objects,
        }
        try:
            self.spool.write_event("ended", detail)
        except StorageError as error:
            LOG.error("the end of association %s could not be recorded: %s", association.association_id, error)

    def count_refused_association(self, refusal: Refusal, calling_ae: str, called_ae: str, peer_address: str) -> None:
        """For the refusals that operators see (REC-04)."""
        self.refusals.add(
            RefusalKey(
                kind="association",
                calling_ae=calling_ae,
                called_ae=called_ae,
                peer_address=peer_address,
                reason=refusal.reason,
            )
        )

    def _write_refusals(self) -> None:
        """Write counted refusals as one event now and then: at once after a quiet time, seldom in a flood."""
        wait_s = _REFUSALS_EVERY_S
        while True:
            stopping = self._stopping.wait(wait_s)
            taken = self.refusals.take()
            wait_s = _REFUSALS_EVERY_IN_A_FLOOD_S if taken else _REFUSALS_EVERY_S
            if taken:
                LOG.warning("refused: %s", "; ".join(_refusal_line(entry) for entry in taken[:5]))
                try:
                    self.spool.write_event("refused", {"refusals": taken})
                except StorageError as error:
                    LOG.error("refusals could not be recorded yet: %s", error)
                    self.refusals.put_back(taken)
            if stopping:
                return


def run_receiver(
    settings: Settings, *, ready: Callable[[int], None] | None = None, stop: threading.Event | None = None
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; `ready` hears the port once connections are accepted.

    Raises SpoolUnsafe, OSError when it cannot start. Signal handlers are set only where no `stop` is given.
    """
    ending = stop or threading.Event()
    if stop is None:
        set_on_stop_signals(ending)
    spool = Spool(settings.spool_dir, reserve_bytes=settings.gateway.receiver.reserve_mb << 20)
    receiver = Receiver(settings, spool)
    receiver.start()
    try:
        if ready is not None:
            ready(receiver.port)
        while not ending.wait(1.0):
            pass
    finally:
        receiver.stop()


def _answer_echo(event: Any) -> int:
    return 0x0000


def _on_requested(event: Any) -> None:
    """Fails closed: pynetdicom would log an exception from here and go on to accept the association."""
    association: IntakeAssociation = event.assoc
    try:
        association.on_requested()
    except Exception:
        LOG.exception("the association request could not be judged and is refused")
        association.caller = None
        association.acse.send_reject(2, 1, 1)
        association.kill()


def _on_acse(event: Any) -> None:
    """A received A-ABORT says that the peer ended the association on purpose."""
    if isinstance(event.primitive, A_ABORT):
        event.assoc.ended_by_peer = True


def _association_detail(caller: Caller, opened_at: datetime) -> dict[str, Any]:
    return {
        "association_id": caller.association_id,
        "calling_ae": caller.calling_ae,
        "called_ae": caller.called_ae,
        "peer_address": caller.peer_address,
        "opened_at": opened_at.isoformat(),
    }


def _refusal_line(entry: dict[str, str | int]) -> str:
    return (
        f"{entry['count']}x {entry['kind']} from {entry['calling_ae']!r} at {entry['peer_address']}: {entry['reason']}"
    )
