"""One association with a PACS as requestor: opened, used, released; failures in words (PS3.8 7 and 9.3)."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation, AssociationSocket

from gateway.delivery.destination import DestinationAway, DestinationRefuses
from gateway.service_user import keep_answers
from gateway.setting_types import PeerAddress

_MAX_PDU_BYTES = 131072
_REJECTED_PERMANENT = 0x01  # PS3.8 9.3.4, Table 9-21


class RejectedForNow(DestinationAway):
    """The peer is there and rejected the association as transient (PS3.8 9.3.4)."""


@contextmanager
def associated(
    peer: PeerAddress, contexts: Sequence[PresentationContext], *, calling_ae_title: str, timeout_s: float, name: str
) -> Iterator[Association]:
    """An established association; released at the end, aborted when the body raises.

    `timeout_s` bounds the connection, the negotiation and every answer, each by itself. `name` is the destination's,
    for the message. Raises DestinationAway (RejectedForNow) or DestinationRefuses.
    """
    entity = _Entity(calling_ae_title)
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = timeout_s
    where = f"{name}: {peer.ae_title} at {peer.host}:{peer.port}"
    try:
        association = entity.associate(
            peer.host, peer.port, contexts=list(contexts), ae_title=peer.ae_title, max_pdu=_MAX_PDU_BYTES
        )
    except OSError as error:  # the host name does not resolve, or no socket can be had
        raise DestinationAway(f"{where} cannot be reached: {error.strerror or error}") from error
    if not association.is_established:
        raise _failure(association, entity.connect_error, where)
    keep_answers(association)
    try:
        yield association
    except BaseException:
        association.abort()
        raise
    if association.is_established:
        association.release()


def _failure(association: Association, error: OSError | None, where: str) -> DestinationAway | DestinationRefuses:
    if error is not None:
        return DestinationAway(f"{where} cannot be reached: {error.strerror or error}")
    if association.is_rejected:
        answer = association.acceptor.primitive
        words = f"{where} rejected the association: {answer.reason_str}"
        if answer.result == _REJECTED_PERMANENT:
            return DestinationRefuses(f"{words}; `seggate check` prints what must be entered there")
        return RejectedForNow(words)
    if association.rejected_contexts:
        return DestinationRefuses(f"{where} accepts none of what was proposed")
    return DestinationAway(f"{where} took the connection, but the association was aborted or not answered in time")


class _Entity(ApplicationEntity):  # type: ignore[misc]
    """An application entity whose sockets are closed in every case and send without delay."""

    connect_error: OSError | None = None

    def _create_socket(
        self, assoc: Association, address: AddressInformation, tls_args: tuple[object, str] | None
    ) -> AssociationSocket:
        transport = _Transport(assoc, address=address)
        transport.tls_args = tls_args
        transport.entity = self
        # Command set and data set leave in separate writes; Nagle would wait for the peer's delayed ACK in between.
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return transport


class _Transport(AssociationSocket):  # type: ignore[misc]
    """pynetdicom forgets to close a socket that was never or is no longer connected, and only logs why."""

    entity: _Entity

    def _shutdown_socket(self) -> None:
        error = sys.exception()
        if isinstance(error, OSError) and not self._is_connected:
            self.entity.connect_error = error
        connection = self.socket
        super()._shutdown_socket()
        if connection is not None:
            connection.close()
