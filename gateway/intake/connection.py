"""An accepted TCP connection, as a listener in a hospital needs it: no delay, bounded PDUs, deadlines.

pynetdicom's own socket waits for ever inside a PDU, believes any length, and uses select(), which ends at 1024
descriptors. PDU: PS3.8 section 9.3.1.
"""

from __future__ import annotations

import select
import socket
import time
from typing import Any

from pynetdicom.transport import AssociationSocket

_WAIT_FOR_DATA_MS = 4
_READ_BYTES = 1 << 18


class BoundedSocket(AssociationSocket):  # type: ignore[misc]
    """An accepted connection: no delay, and no PDU that is larger or slower than allowed."""

    def __init__(self, association: Any, client_socket: socket.socket, *, timeout_s: float, max_pdu_bytes: int) -> None:
        client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client_socket.settimeout(timeout_s)
        self._timeout_s = timeout_s
        self._max_pdu_bytes = max_pdu_bytes
        self._poll = select.poll()
        self._poll.register(client_socket, select.POLLIN)
        super().__init__(association, client_socket=client_socket)

    @property
    def ready(self) -> bool:
        """Whether there is something to read; waits a little for it. Works for descriptors of 1024 and more."""
        if self.socket is None or not self._is_connected:
            return False
        try:
            return bool(self._poll.poll(_WAIT_FOR_DATA_MS))
        except (OSError, ValueError):
            self.event_queue.put("Evt17")
            return False

    def recv(self, nr_bytes: int) -> bytearray:
        """Read exactly `nr_bytes`, or fewer when the connection ends. Raises OSError on the deadline or limit."""
        if nr_bytes > self._max_pdu_bytes:
            raise OSError(f"a PDU of {nr_bytes} bytes, more than {self._max_pdu_bytes}")
        connection = self.socket
        if connection is None:
            raise OSError("the connection is closed")
        received = bytearray(nr_bytes)
        view = memoryview(received)
        count = 0
        deadline = time.monotonic() + self._timeout_s
        while count < nr_bytes:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("the peer stopped inside a PDU")
            connection.settimeout(remaining)
            step = connection.recv_into(view[count:], min(nr_bytes - count, _READ_BYTES))
            if step == 0:
                break
            count += step
        connection.settimeout(self._timeout_s)
        view.release()
        del received[count:]
        return received
