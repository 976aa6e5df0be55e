"""A FHIR server on a loopback port that fails on command: the demonstration EMR behind a layer of faults.

with EmrDouble(patients=[(system, value)]) as emr:
    emr.fail(503)                    # the next request
    emr.swallow_answer("/fhir")      # do the work of the next POST /fhir, never answer
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import uvicorn

from gateway.demo.emr_server import FhirStore, add_patient, create_app

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


@dataclass
class _Fault:
    path: str  # exact path, or "" for any
    status: int | None = None
    body: dict[str, Any] | bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    forever: bool = False
    swallow: bool = False
    after: int = 0  # matching requests that still pass


class EmrDouble:
    """`base_url` is the FHIR base; `store` what the EMR holds; `seen` every request in order."""

    def __init__(self, *, patients: Sequence[tuple[str, str]] = (), capability: dict[str, Any] | None = None) -> None:
        self.store = FhirStore()
        for system, value in patients:
            add_patient(self.store, system, value)
        self.seen: list[Seen] = []
        self.swallowed = threading.Event()
        self._capability = capability
        self._faults: list[_Fault] = []
        self._app = create_app(self.store)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/fhir"
        config = uvicorn.Config(self._asgi, interface="asgi3", log_level="error", access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="emr-double", daemon=True)

    def fail(
        self,
        status: int,
        *,
        path: str = "",
        body: dict[str, Any] | bytes | None = None,
        headers: dict[str, str] | None = None,
        forever: bool = False,
        after: int = 0,
    ) -> None:
        """Answer the next request (to `path`, after `after` others) with `status` and `body`, without doing it."""
        self._faults.append(
            _Fault(path=path, status=status, body=body, headers=headers or {}, forever=forever, after=after)
        )

    def swallow_answer(self, path: str) -> None:
        """Do the next request to `path`, but never answer it."""
        self._faults.append(_Fault(path=path, swallow=True))

    def recover(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def count(self, resource_type: str) -> int:
        return len(self.store.all(resource_type))

    def requests(self, method: str, path: str) -> list[Seen]:
        return [s for s in self.seen if (s.method, s.path) == (method, path)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(timeout=10)
        self._listener.close()
        if self._thread.is_alive():
            raise RuntimeError("the EMR double did not stop")

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])

    async def _asgi(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        path = scope["path"]
        self.seen.append(Seen(scope["method"], path, scope["query_string"].decode("latin-1"), headers, bytes(body)))
        fault = next((f for f in self._faults if f.path in ("", path)), None)
        if fault is not None and fault.after > 0:
            fault.after -= 1
            fault = None
        if fault is not None and not fault.forever:
            self._faults.remove(fault)
        if fault is not None and fault.status is not None:
            await _respond(send, fault.status, fault.body, fault.headers)
            return
        if self._capability is not None and path == "/fhir/metadata":
            await _respond(send, 200, self._capability, {})
            return

        async def replay() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        async def nowhere(message: MutableMapping[str, Any]) -> None:
            return

        if fault is not None and fault.swallow:
            await self._app(scope, replay, nowhere)
            self.swallowed.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        await self._app(scope, replay, send)


async def _respond(send: _Send, status: int, body: dict[str, Any] | bytes | None, headers: dict[str, str]) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body or {}).encode("utf-8")
    fields = [(b"content-type", b"application/fhir+json"), (b"content-length", str(len(content)).encode())]
    fields += [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": content})
