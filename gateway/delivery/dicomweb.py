"""A PACS that is reached by DICOMweb: stored by STOW-RS, read back by QIDO-RS (PS3.18 10.5 and 10.6).

One request per object: the answer then speaks of that object even where a server's body says nothing.
"""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

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
from gateway.delivery.status import http_meaning, status_meaning
from gateway.settings import DicomWebDestination, SettingsInvalid, read_secret, secret

_MAX_ANSWER_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 18
_JSON = "application/dicom+json"
_REFUSING = {
    401: "the credentials are not accepted",
    403: "the credentials do not allow this",
    404: "the URL is not a DICOMweb root",
    405: "the URL does not take this method",
}
# Tags of the Store Instances Response Module (PS3.18 Annex I.2) and of QIDO answers.
_SOP_INSTANCE_UID = "00080018"
_REFERENCED_SOP_SEQUENCE, _FAILED_SOP_SEQUENCE, _OTHER_FAILURES_SEQUENCE = "00081199", "00081198", "0008119A"
_REFERENCED_SOP_INSTANCE_UID = "00081155"
_WARNING_REASON, _FAILURE_REASON = "00081196", "00081197"


class DicomWebPacs:
    """`Destination` over DICOMweb."""

    def __init__(self, settings: DicomWebDestination) -> None:
        self._settings = settings

    @property
    def name(self) -> str:
        return self._settings.name

    def send(self, objects: Sequence[OutgoingObject]) -> tuple[ObjectStatus, ...]:
        for item in objects:
            check_file(item)
        statuses: list[ObjectStatus] = []
        with self._client() as client:
            for item in objects:
                try:
                    status = self._store(client, item)
                except (DestinationAway, DestinationRefuses):
                    if statuses:  # what was answered stays known; the rest counts as not sent
                        break
                    raise
                statuses.append(status)
                if status.outcome not in ("stored", "warning"):
                    break
        return tuple(statuses)

    def verify(self, objects: Sequence[OutgoingObject]) -> tuple[Verification, ...]:
        if self._settings.verify == "none":
            return tuple(_not_queryable(o, "verification is switched off (verify = 'none')") for o in objects)
        with self._client() as client:
            return tuple(self._find(client, item) for item in objects)

    def echo(self) -> EchoReport:
        started = time.monotonic()
        asks = self._settings.verify == "qido"
        reachable, accepted, query, problem = False, False, None, ""
        try:
            with self._client() as client:
                # A study that cannot exist: the answer shows nobody's data.
                code, _ = self._get(client, "studies", {"StudyInstanceUID": "2.25.0", "limit": "1"})
                reachable = True
                problem = _echo_problem(code, asks=asks)
                query = code in (200, 204) if asks else None
                accepted = bool(query) if asks else not problem
        except CredentialsMissing as error:
            problem = str(error)
        except DestinationRefuses as error:
            reachable, problem = True, str(error)
        except DestinationAway as error:
            problem = str(error)
        url = self._settings.url
        lines = [f"Allow POST to {url}/studies (STOW-RS) for the configured credentials."]
        if asks:
            lines.append(f"Allow GET of {url}/studies (QIDO-RS) down to instances for the same credentials.")
        return EchoReport(
            name=self.name,
            reachable=reachable,
            accepted=accepted,
            capability=Capability(sop_classes={}),  # no negotiation: what is taken is learned by sending
            query=query,
            problem=problem,
            administrator=tuple(lines),
            seconds=time.monotonic() - started,
        )

    def _store(self, client: httpx.Client, item: OutgoingObject) -> ObjectStatus:
        # Drawn anew: text copied from a hostile source header cannot hold the boundary (RFC 2046 5.1.1).
        boundary = secrets.token_hex(16)
        # No transfer-syntax parameter in the part's type: it is optional (the file meta information
        # has it), and Orthanc's plugin skips parts whose type has one, with HTTP 200.
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode("ascii")
        tail = f"\r\n--{boundary}--\r\n".encode("ascii")
        headers = {
            "Accept": _JSON,
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Content-Length": str(len(head) + item.path.stat().st_size + len(tail)),
        }
        try:
            with client.stream("POST", "studies", headers=headers, content=_body(head, item, tail)) as response:
                code, content = response.status_code, _bounded(response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise DestinationAway(f"{self.name} cannot be reached: {error}") from error
        except httpx.RequestError as error:
            meaning = f"{self.name} broke off or did not answer: {type(error).__name__}"
            return ObjectStatus(sop_instance_uid=item.sop_instance_uid, code=None, outcome="unknown", meaning=meaning)
        if 300 <= code < 400:
            raise DestinationRefuses(f"{self.name} answers STOW-RS with a redirect, which is not followed: check url")
        if code in _REFUSING:
            raise DestinationRefuses(f"{self.name} answers STOW-RS with HTTP {code}: {_REFUSING[code]}")
        return _stow_status(item, code, _parsed(content))

    def _find(self, client: httpx.Client, item: OutgoingObject) -> Verification:
        uid = item.sop_instance_uid
        path = f"studies/{item.study_instance_uid}/series/{item.series_instance_uid}/instances"
        code, answer = self._get(client, path, {"SOPInstanceUID": uid})
        if code == 404:  # no such series, or no QIDO-RS at all
            code, _ = self._get(client, "studies", {"StudyInstanceUID": item.study_instance_uid, "limit": "1"})
            answer = []
        if code in (401, 403) or 300 <= code < 400:
            why = _REFUSING.get(code, "a redirect, which is not followed: check url")
            raise DestinationRefuses(f"{self.name} answers QIDO-RS with HTTP {code}: {why}")
        if code in (400, 404, 405, 501):
            return _not_queryable(item, f"QIDO-RS is not offered (HTTP {code})")
        if code not in (200, 204):
            raise DestinationAway(f"{self.name} answers QIDO-RS with HTTP {code}")
        if not isinstance(answer, list):
            raise DestinationAway(f"{self.name} answers QIDO-RS with something that is not DICOM JSON")
        if any(_value(entry, _SOP_INSTANCE_UID) == uid for entry in answer):
            return Verification(sop_instance_uid=uid, outcome="verified", detail="found by QIDO-RS")
        return Verification(sop_instance_uid=uid, outcome="absent", detail="QIDO-RS found nothing")

    def _get(self, client: httpx.Client, path: str, query: Mapping[str, str]) -> tuple[int, Any]:
        """HTTP status and DICOM JSON; an answer without a body is one without matches."""
        try:
            with client.stream("GET", path, params=dict(query), headers={"Accept": _JSON}) as response:
                content = _bounded(response)
                return response.status_code, _parsed(content) if content else []
        except httpx.RequestError as error:
            raise DestinationAway(f"{self.name} cannot be reached: {error or type(error).__name__}") from error

    @contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        """A client that follows no redirect, trusts no proxy from the environment, and has every timeout set.

        Secrets are read anew each time. Raises CredentialsMissing.
        """
        settings = self._settings
        headers, auth = {}, None
        try:
            token = secret(file=settings.token_file, env=settings.token_env, key="token")
            if token:
                headers["Authorization"] = f"Bearer {token}"
            if settings.username and settings.password_file:
                auth = httpx.BasicAuth(settings.username, read_secret(settings.password_file, "password_file"))
            tls = _tls(settings)
        except SettingsInvalid as error:
            raise CredentialsMissing(f"nothing is sent to {self.name}: {error}") from error
        with httpx.Client(
            base_url=settings.url.rstrip("/") + "/",
            headers=headers,
            auth=auth,
            timeout=settings.timeout_s,
            verify=tls,
            follow_redirects=False,
            trust_env=False,
        ) as client:
            yield client


def _echo_problem(code: int, *, asks: bool) -> str:
    """What stands against delivering, told from the answer to a query; `asks`: whether results are to be read back.

    Where they are not, a server without QIDO-RS is fine: STOW-RS itself cannot be tried without storing something.
    """
    if 300 <= code < 400:
        return f"redirects (HTTP {code}), which is not followed: check url"
    if code in (401, 403) or (asks and code in _REFUSING):
        return f"{_REFUSING[code]} (HTTP {code})"
    if asks and code not in (200, 204):
        return f"QIDO-RS answers HTTP {code}; deliveries will end at 'stored'"
    return f"answers HTTP {code}" if code >= 500 and code != 501 else ""


def _tls(settings: DicomWebDestination) -> ssl.SSLContext | bool:
    if settings.ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        raise SettingsInvalid(f"ca_file: cannot read {settings.ca_file}: {error.strerror or error}") from error


def _body(head: bytes, item: OutgoingObject, tail: bytes) -> Iterator[bytes]:
    yield head
    with item.path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
    yield tail


def _bounded(response: httpx.Response) -> bytes:
    """The body up to the limit; more than that is cut off, and then it is no JSON."""
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > _MAX_ANSWER_BYTES:
            break
    return bytes(content[:_MAX_ANSWER_BYTES])


def _parsed(content: bytes) -> Any:
    """The DICOM JSON of an answer; None where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _stow_status(item: OutgoingObject, code: int, answer: Any) -> ObjectStatus:
    """The object's own entry where the answer has one, else what the HTTP status says (PS3.18 10.5.3)."""
    uid = item.sop_instance_uid
    if isinstance(answer, list):  # some servers wrap the data set
        answer = answer[0] if answer else None
    failures = [
        *_entries(answer, _FAILED_SOP_SEQUENCE, uid),
        *(entry for entry in _items(answer, _OTHER_FAILURES_SEQUENCE)),
    ]
    if failures:
        reason = _value(failures[0], _FAILURE_REASON)
        meaning = status_meaning(reason) if isinstance(reason, int) else status_meaning(0x0110)
        return ObjectStatus(
            sop_instance_uid=uid, code=meaning.code, outcome=meaning.outcome, meaning=f"Failure Reason {meaning.text}"
        )
    for entry in _entries(answer, _REFERENCED_SOP_SEQUENCE, uid):
        reason = _value(entry, _WARNING_REASON)
        if isinstance(reason, int) and reason != 0:
            text = f"Warning Reason {status_meaning(reason).text}"
            return ObjectStatus(sop_instance_uid=uid, code=reason, outcome="warning", meaning=text)
        return ObjectStatus(sop_instance_uid=uid, code=code, outcome="stored", meaning=f"HTTP {code} success")
    if code == 202 or (200 <= code < 300 and isinstance(answer, dict)):
        # An answer that speaks of objects, but not of this one: it cannot be called stored, so it is asked for.
        return ObjectStatus(
            sop_instance_uid=uid, code=code, outcome="unknown", meaning=f"HTTP {code} without a word on this object"
        )
    http = http_meaning(code)
    return ObjectStatus(sop_instance_uid=uid, code=code, outcome=http.outcome, meaning=f"HTTP {code} {http.words}")


def _items(answer: Any, tag: str) -> list[Any]:
    sequence = answer.get(tag) if isinstance(answer, dict) else None
    values = sequence.get("Value") if isinstance(sequence, dict) else None
    return values if isinstance(values, list) else []


def _entries(answer: Any, tag: str, sop_instance_uid: str) -> list[Any]:
    return [i for i in _items(answer, tag) if _value(i, _REFERENCED_SOP_INSTANCE_UID) == sop_instance_uid]


def _value(entry: Any, tag: str) -> Any:
    """First value of an attribute in DICOM JSON (PS3.18 F.2); None where it is missing or malformed."""
    values = _items(entry, tag)
    return values[0] if values else None


def _not_queryable(item: OutgoingObject, detail: str) -> Verification:
    return Verification(sop_instance_uid=item.sop_instance_uid, outcome="not-queryable", detail=detail)
