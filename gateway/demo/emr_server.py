"""A small FHIR R4 server for the demonstration and the tests: in memory, or kept in a folder; loopback only.

It does what a report needs and refuses the rest: /metadata, create (also conditional), read, search by identifier
(GET and POST _search), and the transaction, all or nothing, with urn:uuid references resolved and ifNoneExist obeyed.

    python -m gateway.demo.emr_server --port 0 --port-file F [--folder DIR] [--patient SYSTEM VALUE]...
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

_MAX_BODY_BYTES = 32 * 1024 * 1024
_TYPES = ("Patient", "Device", "Observation", "DiagnosticReport", "DocumentReference", "ImagingStudy")
Json = dict[str, Any]


class FhirFault(Exception):
    """An answer other than success: HTTP status and OperationOutcome."""

    def __init__(self, status: int, code: str, diagnostics: str) -> None:
        super().__init__(diagnostics)
        self.status = status
        self.outcome = {
            "resourceType": "OperationOutcome",
            "issue": [{"severity": "error", "code": code, "diagnostics": diagnostics}],
        }


class FhirStore:
    """Resources by type and id; thread-safe. With a `folder`, one JSON file per resource, read again at start."""

    def __init__(self, folder: Path | None = None) -> None:
        self._resources: dict[tuple[str, str], Json] = {}
        self._lock = threading.RLock()
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("*.json")):
                resource = json.loads(file.read_text(encoding="utf-8"))
                self._resources[resource["resourceType"], resource["id"]] = resource

    def read(self, resource_type: str, resource_id: str) -> Json:
        with self._lock:
            found = self._resources.get((resource_type, resource_id))
        if found is None:
            raise FhirFault(404, "not-found", f"no such {resource_type}")
        return found

    def all(self, resource_type: str) -> list[Json]:
        with self._lock:
            return [r for (kind, _), r in self._resources.items() if kind == resource_type]

    def search(self, resource_type: str, token: str) -> list[Json]:
        """Resources with the identifier `system|value`, `|value` or `value`; backslash escapes as FHIR says."""
        split = re.fullmatch(r"((?:\\.|[^\\|])*)\|(.*)", token, re.DOTALL)
        system = _unescaped(split.group(1)) if split else None
        value = _unescaped(split.group(2) if split else token)
        return [
            resource
            for resource in self.all(resource_type)
            for i in _identifiers(resource)
            if i.get("value") == value and (system is None or i.get("system", "") == system)
        ]

    def create(self, resource: Json, if_none_exist: str | None = None) -> tuple[Json, bool]:
        """The stored resource and whether it is new. More than one match: 412."""
        with self._lock:
            kind = resource.get("resourceType")
            if kind not in _TYPES:
                raise FhirFault(422, "not-supported", "this resource type is not kept here")
            if if_none_exist:
                matches = self.search(kind, _identifier_parameter(if_none_exist))
                if len(matches) > 1:
                    raise FhirFault(412, "multiple-matches", "the condition matches more than one resource")
                if matches:
                    return matches[0], False
            meta = {"versionId": "1", "lastUpdated": datetime.now(UTC).isoformat(timespec="milliseconds")}
            stored = {**resource, "id": str(uuid.uuid4()), "meta": meta}
            self._resources[kind, stored["id"]] = stored
            return stored, True

    def transaction(self, bundle: Json) -> Json:
        """All entries or none (FHIR R4 3.1.0.11.2); only POST entries are taken."""
        entries = bundle.get("entry")
        if (
            bundle.get("resourceType") != "Bundle"
            or bundle.get("type") != "transaction"
            or not isinstance(entries, list)
        ):
            raise FhirFault(400, "invalid", "a Bundle of type transaction is expected")
        with self._lock:
            before = dict(self._resources)
            try:
                answers = self._apply(entries)
            except BaseException:
                self._resources = before
                raise
            new = [r for key, r in self._resources.items() if key not in before]
        for resource in new:
            self.keep(resource)
        return {"resourceType": "Bundle", "type": "transaction-response", "entry": answers}

    def _apply(self, entries: list[Json]) -> list[Json]:
        placed: list[tuple[Json, bool]] = []
        urls: dict[str, str] = {}
        for entry in entries:
            request, resource = entry.get("request", {}), entry.get("resource", {})
            if request.get("method") != "POST" or request.get("url") != resource.get("resourceType"):
                raise FhirFault(422, "not-supported", "only POST of a resource to its type is supported")
            stored, created = self.create(copy.deepcopy(resource), request.get("ifNoneExist"))
            placed.append((stored, created))
            urls[str(entry.get("fullUrl"))] = f"{stored['resourceType']}/{stored['id']}"
        for stored, created in placed:
            if created:
                _resolve(stored, urls)
                self._check_references(stored)
        return [{"response": {"status": "201 Created" if c else "200 OK", "location": _location(r)}} for r, c in placed]

    def _check_references(self, node: Any) -> None:
        """A literal reference to something that is not here is refused, as real servers do."""
        if isinstance(node, list):
            for item in node:
                self._check_references(item)
        elif isinstance(node, dict):
            reference = node.get("reference")
            if isinstance(reference, str) and tuple(reference.split("/")) not in self._resources:
                raise FhirFault(422, "not-found", "a literal reference has no target on this server")
            for value in node.values():
                self._check_references(value)

    def keep(self, resource: Json) -> None:
        """Write one resource to the folder, if there is one."""
        if self._folder is None:
            return
        target = self._folder / f"{resource['resourceType']}-{resource['id']}.json"
        partial = target.with_suffix(".part")
        partial.write_text(json.dumps(resource, ensure_ascii=False, indent=2), encoding="utf-8")
        os.replace(partial, target)


def create_app(store: FhirStore) -> FastAPI:
    """The server as an ASGI application."""
    app = FastAPI(title="seggate demonstration EMR", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(FhirFault)
    async def fault(request: Request, error: FhirFault) -> Response:
        return _answer(error.outcome, error.status)

    @app.get("/fhir/metadata")
    async def metadata() -> Response:
        return _answer(_capability())

    @app.post("/fhir")
    async def transaction(request: Request) -> Response:
        return _answer(store.transaction(await _body(request)))

    @app.post("/fhir/{resource_type}/_search")
    async def search_by_post(resource_type: str, request: Request) -> Response:
        form = parse_qs((await _limited(request)).decode("utf-8"))
        return _answer(_searchset(store, resource_type, form.get("identifier")))

    @app.get("/fhir/{resource_type}")
    async def search_by_get(resource_type: str, request: Request) -> Response:
        return _answer(_searchset(store, resource_type, request.query_params.getlist("identifier") or None))

    @app.post("/fhir/{resource_type}")
    async def create(resource_type: str, request: Request) -> Response:
        resource = await _body(request)
        if resource.get("resourceType") != resource_type:
            raise FhirFault(400, "invalid", "the resource is not of the type in the URL")
        stored, created = store.create(resource, request.headers.get("if-none-exist"))
        if created:
            store.keep(stored)
        return _answer(stored, 201 if created else 200, {"Location": f"/fhir/{_location(stored)}"})

    @app.get("/fhir/{resource_type}/{resource_id}")
    async def read(resource_type: str, resource_id: str) -> Response:
        return _answer(store.read(resource_type, resource_id))

    return app


def _capability() -> Json:
    interactions = [{"code": code} for code in ("create", "read", "search-type")]
    identifier = [{"name": "identifier", "type": "token"}]
    resources = [
        {"type": kind, "interaction": interactions, "conditionalCreate": True, "searchParam": identifier}
        for kind in _TYPES
    ]
    return {
        "resourceType": "CapabilityStatement",
        "status": "active",
        "date": "2026-01-01",
        "kind": "instance",
        "fhirVersion": "4.0.1",
        "format": ["json"],
        "software": {"name": "seggate demonstration EMR"},
        "implementation": {"description": "in-memory FHIR server for demonstration and tests"},
        "rest": [{"mode": "server", "resource": resources, "interaction": [{"code": "transaction"}]}],
    }


def _searchset(store: FhirStore, resource_type: str, identifiers: list[str] | None) -> Json:
    if identifiers is None or len(identifiers) != 1:
        raise FhirFault(400, "not-supported", "search by exactly one identifier")
    found = store.search(resource_type, identifiers[0])
    entries = [{"resource": resource, "search": {"mode": "match"}} for resource in found]
    return {"resourceType": "Bundle", "type": "searchset", "total": len(found), "entry": entries}


def _identifier_parameter(condition: str) -> str:
    values = parse_qs(condition)
    if set(values) != {"identifier"} or len(values["identifier"]) != 1:
        raise FhirFault(400, "not-supported", "the condition must be one identifier")
    return values["identifier"][0]


def _unescaped(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value)


def _identifiers(resource: Json) -> list[Json]:
    identifiers = resource.get("identifier")
    return [i for i in identifiers if isinstance(i, dict)] if isinstance(identifiers, list) else []


def _resolve(node: Any, urls: dict[str, str]) -> None:
    """Replace the fullUrls of this transaction by literal references, in place."""
    if isinstance(node, list):
        for item in node:
            _resolve(item, urls)
    elif isinstance(node, dict):
        if node.get("reference") in urls:
            node["reference"] = urls[node["reference"]]
        for value in node.values():
            _resolve(value, urls)


def _location(resource: Json) -> str:
    return f"{resource['resourceType']}/{resource['id']}/_history/{resource['meta']['versionId']}"


def _answer(body: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(body, status_code=status, media_type="application/fhir+json", headers=headers)


async def _limited(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise FhirFault(413, "too-long", "the body is too large")
    return bytes(body)


async def _body(request: Request) -> Json:
    try:
        value = json.loads(await _limited(request))
    except (ValueError, RecursionError) as error:
        raise FhirFault(400, "structure", "the body is not JSON") from error
    if not isinstance(value, dict):
        raise FhirFault(400, "structure", "the body is not a JSON object")
    return value


def add_patient(store: FhirStore, system: str, value: str) -> Json:
    """A Patient with one identifier, unless the store has it already."""
    patient: Json = {"resourceType": "Patient", "active": True, "identifier": [{"system": system, "value": value}]}
    found = [p for p in store.all("Patient") if patient["identifier"][0] in _identifiers(p)]
    if found:
        return found[0]
    stored, _ = store.create(patient)
    store.keep(stored)
    return stored


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until terminated; the port is written to the port file once the socket listens."""
    parser = argparse.ArgumentParser(prog="python -m gateway.demo.emr_server", description="A small FHIR R4 server.")
    parser.add_argument("--port", type=int, default=0, help="loopback port; 0 takes a free one")
    parser.add_argument("--port-file", type=Path, help="file that receives the port number")
    parser.add_argument("--folder", type=Path, help="keep the resources in this folder")
    parser.add_argument(
        "--patient", nargs=2, action="append", default=[], metavar=("SYSTEM", "VALUE"), help="create this Patient"
    )
    options = parser.parse_args(arguments)
    store = FhirStore(options.folder)
    for system, value in options.patient:
        add_patient(store, system, value)
    listener = socket.create_server(("127.0.0.1", options.port))
    if options.port_file is not None:
        partial = options.port_file.with_suffix(".part")
        partial.write_text(f"{listener.getsockname()[1]}\n", encoding="ascii")
        os.replace(partial, options.port_file)
    server = uvicorn.Server(uvicorn.Config(create_app(store), log_level="warning", access_log=False, lifespan="off"))
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
