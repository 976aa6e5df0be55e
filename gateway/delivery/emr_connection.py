"""An EMR whose client is made at the first contact.

A token, key or CA file that cannot be read then keeps this EMR's reports waiting, with an alarm, and nothing else. Once
made, a client is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from emr.client import EmrClient
from emr.content import ReportContent
from emr.receipt import ReportReceipt


class Emr(Protocol):
    """What delivery asks of an EMR; EmrClient does it."""

    def send(self, content: ReportContent) -> ReportReceipt: ...

    def verify(self, report_id: str, result_id: str) -> bool: ...

    def close(self) -> None: ...


class EmrConnection:
    """`Emr` over the client that `connect` makes; what `connect` raises (CredentialsInvalid) passes. Thread-safe."""

    def __init__(self, connect: Callable[[], EmrClient]) -> None:
        self._connect = connect
        self._client: EmrClient | None = None
        self._lock = threading.Lock()

    def send(self, content: ReportContent) -> ReportReceipt:
        return self._connected().send(content)

    def verify(self, report_id: str, result_id: str) -> bool:
        return self._connected().verify(report_id, result_id)

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()

    def _connected(self) -> EmrClient:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client
