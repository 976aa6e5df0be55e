"""An Orthanc that is reached by its REST interface, through orthanc-api-client.

What the client does not do by itself is set once, in `_Client`: timeouts, no repetition behind our back, no redirects,
no proxies from the environment. Its upload() drops the Status of the answer, so instances go out by post(); and its
methods return None where requests fails in a way that it does not translate.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from orthanc_api_client import OrthancApiClient, exceptions
from requests.adapters import HTTPAdapter

from gateway.delivery.destination import (
    Capability,
    CredentialsMissing,
    DestinationAway,
    DestinationRefuses,
    EchoReport,
    ObjectStatus,
    OutgoingObject,
    Verification,
    check_file,
)
from gateway.delivery.status import Outcome, http_meaning
from gateway.settings import OrthancDestination, SettingsInvalid, read_secret

_HASH_BLOCK_BYTES = 1 << 20

# "Status" in Orthanc's answer to POST /instances, which comes with HTTP 200 in all cases.
_STATUSES: Mapping[str, tuple[Outcome, str]] = {
    "Success": ("stored", "Orthanc: success"),
    "AlreadyStored": ("stored", "Orthanc: it was there already"),
    "FilteredOut": ("refused", "Orthanc: a filter of this server (Lua or plugin) does not let it in"),
    "StorageFull": ("failed", "Orthanc: its storage is full"),
    "Failure": ("doubtful", "Orthanc: failure without a reason"),
}


class OrthancPacs:
    """`Destination` over Orthanc's REST interface."""

    def __init__(self, settings: OrthancDestination) -> None:
        self._settings = settings

    @property
    def name(self) -> str:
        return self._settings.name

    def send(self, objects: Sequence[OutgoingObject]) -> tuple[ObjectStatus, ...]:
        for item in objects:
            check_file(item)
        statuses: list[ObjectStatus] = []
        with self._client() as client:
            self._system(client)  # tells "away" from "broke off in the middle"
            for item in objects:
                status = self._store(client, item)
                statuses.append(status)
                if status.outcome not in ("stored", "warning"):
                    break
        return tuple(statuses)

    def verify(self, objects: Sequence[OutgoingObject]) -> tuple[Verification, ...]:
        """By SOP Instance UID and by the MD5 of the stored file, which Orthanc computed when it took it."""
        with self._client() as client:
            return tuple(self._find(client, item) for item in objects)

    def echo(self) -> EchoReport:
        started = time.monotonic()
        reachable, accepted, problem = False, False, ""
        try:
            with self._client() as client:
                self._system(client)
                reachable = accepted = True
        except CredentialsMissing as error:
            problem = str(error)
        except DestinationRefuses as error:
            reachable, problem = True, str(error)
        except DestinationAway as error:
            problem = str(error)
        user = self._settings.username or "(no user)"
        return EchoReport(
            name=self.name,
            reachable=reachable,
            accepted=accepted,
            capability=Capability(sop_classes={}),  # takes every SOP class; what a filter refuses is learned by sending
            query=accepted if reachable else None,
            problem=problem,
            administrator=(f"Allow {user} to use GET /system, POST /instances, POST /tools/lookup, GET /instances/…",),
            seconds=time.monotonic() - started,
        )

    def _system(self, client: _Client) -> None:
        try:
            answer = client.get("system")
        except exceptions.HttpError as error:
            raise self._trouble("GET /system", error) from error
        except exceptions.OrthancApiException as error:
            raise DestinationAway(f"{self.name} cannot be reached: {type(error).__name__}") from error
        if answer is None:
            raise DestinationAway(f"{self.name} does not answer as an Orthanc does (redirect or broken answer)")

    def _store(self, client: _Client, item: OutgoingObject) -> ObjectStatus:
        code: int | None = 200
        try:
            with item.path.open("rb") as file:
                response = client.post("instances", data=file, headers={"Content-Type": "application/dicom"})
            outcome, meaning = _stored(response)
        except exceptions.NotAuthorized as error:
            raise self._trouble("POST /instances", error) from error
        except exceptions.HttpError as error:
            http = http_meaning(error.http_status_code)
            code, outcome, meaning = http.code, http.outcome, f"HTTP {http.code} {http.words}"
        except exceptions.OrthancApiException as error:
            code, outcome = None, "unknown"
            meaning = f"{self.name} broke off or did not answer: {type(error).__name__}"
        return ObjectStatus(sop_instance_uid=item.sop_instance_uid, code=code, outcome=outcome, meaning=meaning)

    def _find(self, client: _Client, item: OutgoingObject) -> Verification:
        uid = item.sop_instance_uid
        try:
            found = _instances(client.post("tools/lookup", data=uid))
            if found is None:
                raise DestinationAway(f"{self.name} does not answer /tools/lookup as an Orthanc does")
            digests = [client.get(f"instances/{i}/attachments/dicom/md5") for i in found]
            syntaxes = [client.get(f"instances/{i}/metadata/TransferSyntax") for i in found]
        except exceptions.HttpError as error:
            raise self._trouble("reading back", error) from error
        except exceptions.OrthancApiException as error:
            raise DestinationAway(f"{self.name} broke off while reading back: {type(error).__name__}") from error
        if not found:
            return Verification(sop_instance_uid=uid, outcome="absent", detail="Orthanc does not know this UID")
        if None in digests or None in syntaxes:
            raise DestinationAway(f"{self.name} broke off while reading back")
        if _md5(item.path) in {d.text.strip() for d in digests}:
            return Verification(sop_instance_uid=uid, outcome="verified", detail="found in Orthanc, same MD5")
        check_file(item)  # where it is our own file that changed, nothing is to be said of Orthanc's
        if any(s.text.strip() != item.transfer_syntax_uid for s in syntaxes):
            detail = "found in Orthanc, which keeps it in another transfer syntax"
            return Verification(sop_instance_uid=uid, outcome="verified", detail=detail)
        return Verification(
            sop_instance_uid=uid,
            outcome="differs",
            detail="Orthanc holds another content under this UID; compare the two by hand",
        )

    def _trouble(self, what: str, error: exceptions.HttpError) -> DestinationAway | DestinationRefuses:
        code = error.http_status_code  # the error's text may quote the answer's body, so it is not used
        if code in (401, 403, 404):
            return DestinationRefuses(f"{self.name} answers {what} with HTTP {code}: check url, user and password")
        return DestinationAway(f"{self.name} answers {what} with HTTP {code}")

    @contextmanager
    def _client(self) -> Iterator[_Client]:
        settings = self._settings
        password = None
        if settings.password_file is not None:
            try:
                password = read_secret(settings.password_file, "password_file")
            except SettingsInvalid as error:
                raise CredentialsMissing(f"nothing is sent to {self.name}: {error}") from error
        # Without the final slash the client would drop the last part of the path.
        client = _Client(settings.url.rstrip("/") + "/", user=settings.username or None, pwd=password)
        client.restrain(settings.timeout_s)
        try:
            yield client
        finally:
            client.close()


class _Client(OrthancApiClient):  # type: ignore[misc]
    """orthanc-api-client with bounds; its session is only within reach of a subclass."""

    def restrain(self, timeout_s: float) -> None:
        session: requests.Session = self._http_session
        session.trust_env = False
        session.max_redirects = 0
        for scheme in ("http://", "https://"):
            session.mount(scheme, _Bounded(timeout_s))


class _Bounded(HTTPAdapter):
    """One try per request, each with a timeout for connecting and for every read."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(max_retries=0)
        self._timeout_s = timeout_s

    def send(self, request: requests.PreparedRequest, *arguments: Any, **named: Any) -> requests.Response:
        named["timeout"] = self._timeout_s
        return super().send(request, *arguments, **named)


def _stored(response: requests.Response | None) -> tuple[Outcome, str]:
    try:
        answer = response.json() if response is not None else None
    except requests.JSONDecodeError:
        answer = None
    status = answer.get("Status") if isinstance(answer, dict) else None
    return _STATUSES.get(str(status), ("unknown", "the answer is not one of an Orthanc"))


def _instances(response: requests.Response | None) -> list[str] | None:
    """Orthanc's identifiers of the instances that /tools/lookup found; None where the answer is not one of an Orthanc.

    The client's own lookup() breaks on such an answer.
    """
    try:
        answer = response.json() if response is not None else None
    except requests.JSONDecodeError:
        answer = None
    if not isinstance(answer, list) or not all(isinstance(entry, dict) for entry in answer):
        return None
    return [str(entry.get("ID")) for entry in answer if entry.get("Type") == "Instance"]


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
