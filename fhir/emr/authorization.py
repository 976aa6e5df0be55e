"""How the gateway proves itself to an EMR: nothing, a static token, basic, or SMART Backend Services.

SMART App Launch 2.2, Backend Services: a JWT signed with our private key (RS384 or ES384) is exchanged at the token
endpoint for an access token, which is kept until shortly before it expires.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from emr.errors import CredentialsInvalid, EmrError, Misconfigured
from emr.exchange import Answer, exchange

_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_LIFETIME_S = 240.0  # the profile allows five minutes; one is left for clocks that differ
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class Authorization(Protocol):
    """What EmrClient asks of any of the classes below."""

    def headers(self, http: httpx.Client) -> dict[str, str]:
        """Header fields for the next request; may fetch a token. Raises Unavailable or Misconfigured."""

    def renew(self, rejected: dict[str, str]) -> bool:
        """After 401 to `rejected` headers: True if the next `headers` can differ, so that one more try makes sense."""

    @property
    def secret(self) -> bool:
        """Whether the headers hold a secret that must not travel unencrypted."""


class NoAuthorization:
    """The EMR lets us in by network address or client certificate at a proxy."""

    secret = False

    def headers(self, http: httpx.Client) -> dict[str, str]:
        return {}

    def renew(self, rejected: dict[str, str]) -> bool:
        return False


class StaticToken:
    """A bearer token that an administrator issued (RFC 6750).

    `read` gives the token; it is called again after HTTP 401, so that a renewed one needs no restart. What it raises
    passes.
    """

    secret = True

    def __init__(self, read: Callable[[], str]) -> None:
        self._read = read
        self._headers = self._read_headers()

    def headers(self, http: httpx.Client) -> dict[str, str]:
        return dict(self._headers)

    def renew(self, rejected: dict[str, str]) -> bool:
        self._headers = self._read_headers()
        return self._headers != rejected

    def _read_headers(self) -> dict[str, str]:
        token = self._read()
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise CredentialsInvalid("the token is empty or holds blanks or non-ASCII characters")
        return {"Authorization": f"Bearer {token}"}


class Basic:
    """User name and password (RFC 7617), encoded as UTF-8. `read` gives the password, as for StaticToken."""

    secret = True

    def __init__(self, username: str, read: Callable[[], str]) -> None:
        if not username or ":" in username:
            raise CredentialsInvalid("the user name is empty or holds a colon (RFC 7617)")
        self._username = username
        self._read = read
        self._headers = self._read_headers()

    def headers(self, http: httpx.Client) -> dict[str, str]:
        return dict(self._headers)

    def renew(self, rejected: dict[str, str]) -> bool:
        self._headers = self._read_headers()
        return self._headers != rejected

    def _read_headers(self) -> dict[str, str]:
        pair = base64.b64encode(f"{self._username}:{self._read()}".encode()).decode("ascii")
        return {"Authorization": f"Basic {pair}"}


class SmartBackendServices:
    """Tokens by signed JWT. Thread-safe; one instance per EMR.

    `private_key_pem` is an RSA key of at least 2048 bits (RS384) or an EC key on P-384 (ES384); `key_id` is its `kid`
    in the key set registered at the EMR. With an empty `token_url` the endpoint is read from
    `<base_url>/.well-known/smart-configuration`. `clock` gives seconds since the epoch.
    """

    secret = True

    def __init__(
        self,
        *,
        base_url: str,
        client_id: str,
        private_key_pem: str,
        key_id: str,
        scope: str,
        token_url: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._key, self._algorithm = _signing_key(private_key_pem)
        self._base_url = base_url.rstrip("/")
        self._client_id = client_id
        self._key_id = key_id
        self._scope = scope
        self._token_url = token_url
        self._discovered_url = ""
        self._clock = clock
        self._lock = threading.Lock()
        self._token = ""
        self._usable_until = 0.0
        if token_url:
            require_encryption(token_url, "smart.token_url")

    def headers(self, http: httpx.Client) -> dict[str, str]:
        with self._lock:
            if not self._token or self._clock() >= self._usable_until:
                self._fetch(http)
            return {"Authorization": f"Bearer {self._token}"}

    def renew(self, rejected: dict[str, str]) -> bool:
        with self._lock:
            if rejected.get("Authorization") == f"Bearer {self._token}":
                self._token = ""
            return True

    def assertion(self, audience: str) -> str:
        """A fresh client assertion: iss = sub = client id, aud = token endpoint, unique jti, at most five minutes."""
        now = int(self._clock())
        claims = {
            "iss": self._client_id,
            "sub": self._client_id,
            "aud": audience,
            "iat": now,
            "exp": now + int(ASSERTION_LIFETIME_S),
            "jti": str(uuid.uuid4()),
        }
        return jwt.encode(claims, self._key, algorithm=self._algorithm, headers={"kid": self._key_id})

    def _fetch(self, http: httpx.Client) -> None:
        try:
            self._exchange_assertion(http, self._endpoint(http))
        except EmrError:
            self._discovered_url = ""  # it may have moved
            raise

    def _exchange_assertion(self, http: httpx.Client, endpoint: str) -> None:
        answer = exchange(
            http,
            "POST",
            endpoint,
            what="SMART token",
            headers={"Accept": "application/json"},
            form={
                "grant_type": "client_credentials",
                "scope": self._scope,
                "client_assertion_type": _ASSERTION_TYPE,
                "client_assertion": self.assertion(endpoint),
            },
        )
        if answer.status != 200:
            raise Misconfigured(
                f"SMART token: HTTP {answer.status}, {_oauth_error(answer)}; check client_id, key_id, scope and the "
                "public key that is registered at the EMR"
            )
        body = answer.json_object("SMART token")
        token, lifetime = body.get("access_token"), body.get("expires_in", 300)
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise Misconfigured("SMART token: the answer holds no access_token")
        if str(body.get("token_type", "bearer")).lower() != "bearer":
            raise Misconfigured("SMART token: token_type is not bearer")
        if isinstance(lifetime, bool) or not isinstance(lifetime, int | float) or not lifetime > 0:
            lifetime = 300
        self._token = token
        self._usable_until = self._clock() + lifetime - min(60.0, lifetime / 5)

    def _endpoint(self, http: httpx.Client) -> str:
        known = self._token_url or self._discovered_url
        if known:
            return known
        what = "SMART configuration"
        url = f"{self._base_url}/.well-known/smart-configuration"
        answer = exchange(http, "GET", url, what=what, headers={"Accept": "application/json"})
        if answer.status != 200:
            raise Misconfigured(f"{what}: HTTP {answer.status}; set smart.token_url")
        endpoint = answer.json_object(what).get("token_endpoint")
        if not isinstance(endpoint, str):
            raise Misconfigured(f"{what}: no token_endpoint; set smart.token_url")
        require_encryption(endpoint, f"{what}: token_endpoint")
        self._discovered_url = endpoint
        return endpoint


def require_encryption(url: str, what: str) -> None:
    """Raises CredentialsInvalid unless `url` is https, or http to this very machine."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise CredentialsInvalid(f"{what}: not a valid URL") from error
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        return
    raise CredentialsInvalid(f"{what}: credentials travel over https only (http is for loopback)")


def _signing_key(pem: str) -> tuple[Any, str]:
    try:
        key = load_pem_private_key(pem.encode("utf-8"), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CredentialsInvalid("smart.key_file: not an unencrypted PEM private key") from error
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return key, "RS384"
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1):
        return key, "ES384"
    raise CredentialsInvalid("smart.key_file: SMART needs an RSA key of at least 2048 bits or an EC key on P-384")


def _oauth_error(answer: Answer) -> str:
    """The OAuth error code (RFC 6749 5.2), never its description, which may quote what we sent."""
    try:
        code = json.loads(answer.body).get("error")
    except (ValueError, AttributeError, RecursionError):
        return "no OAuth error code"
    return code if isinstance(code, str) and re.fullmatch(r"[a-z_]{1,40}", code) else "no OAuth error code"
