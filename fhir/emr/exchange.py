"""One HTTP exchange with the EMR: bounded size, no redirects, no address or identifier in any message.

httpx.Client is opened here (`open_http`) so that its safety settings are in one place.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from emr.errors import CredentialsInvalid, Misconfigured, Unavailable

# Largest answer that is read; a CapabilityStatement of a full server has a few megabytes.
MAX_RESPONSE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Status, header fields (lower case) and body of one HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json_object(self, what: str) -> dict[str, Any]:
        """The body as a JSON object; raises Unavailable if it is none (a proxy's error page, a cut answer)."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            raise Unavailable(f"{what}: the answer (HTTP {self.status}) is not JSON") from None
        if not isinstance(value, dict):
            raise Unavailable(f"{what}: the answer (HTTP {self.status}) is not a JSON object")
        return value


def open_http(*, timeout_s: float, ca_file: Path | None = None) -> httpx.Client:
    """A client for one EMR: TLS verified against the system's authorities or `ca_file`; proxies of the environment
    are not used, so that patient data goes to the configured address and nowhere else.

    Raises CredentialsInvalid if `ca_file` cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except (OSError, ssl.SSLError) as error:
        raise CredentialsInvalid(f"ca_file {ca_file}: not readable as PEM certificates") from error
    return httpx.Client(timeout=timeout_s, verify=context, follow_redirects=False, trust_env=False)


def exchange(
    http: httpx.Client,
    method: str,
    url: str,
    *,
    what: str,
    headers: Mapping[str, str],
    content: bytes | None = None,
    form: Mapping[str, str] | None = None,
) -> Answer:
    """Send one request and read at most MAX_RESPONSE_BYTES. `what` names the step in messages.

    Raises Unavailable when nothing or only a part arrives and for 408, 425, 429 and 5xx; Misconfigured for a redirect,
    an answer that is too large, or a `url` that is none. Every other status is returned.
    """
    try:
        with http.stream(method, url, headers=dict(headers), content=content, data=form) as response:
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_RESPONSE_BYTES:
                    raise Misconfigured(f"{what}: the answer is larger than {MAX_RESPONSE_BYTES} bytes")
            answer = Answer(status=response.status_code, headers=dict(response.headers), body=bytes(body))
    except httpx.TimeoutException as error:
        raise Unavailable(f"{what}: no answer in time ({type(error).__name__})") from None
    except httpx.ConnectError as error:
        # Its text is about host names and certificates only; a certificate that is not trusted has to be seen.
        raise Unavailable(f"{what}: no connection: {str(error)[:200]}") from None
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise Unavailable(f"{what}: {type(error).__name__}") from None
    except httpx.InvalidURL:
        raise Misconfigured(f"{what}: the address is not a valid URL") from None
    if 300 <= answer.status < 400:
        raise Misconfigured(f"{what}: the server redirects (HTTP {answer.status}); configure the final base URL")
    if answer.status in {408, 425, 429} or (answer.status >= 500 and answer.status != 501):
        raise Unavailable(f"{what}: HTTP {answer.status}")
    return answer
