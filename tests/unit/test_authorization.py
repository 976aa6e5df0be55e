"""SMART Backend Services against a token endpoint: the assertion, the cache, the renewal, the refusals."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from emr.authorization import Basic, NoAuthorization, SmartBackendServices, StaticToken
from emr.client import EmrClient, EmrEndpoint
from emr.errors import CredentialsInvalid, Misconfigured, Unavailable

BASE = "https://emr.example/fhir"
TOKEN_URL = "https://auth.example/token"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


def pem(key: PrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode("ascii")


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


class AuthorizationServer:
    """Checks each client assertion as a real one would, and issues numbered tokens."""

    def __init__(self, key: PrivateKey, algorithm: str) -> None:
        self.key = key.public_key()
        self.algorithm = algorithm
        self.now = 1_800_000_000.0
        self.expires_in: Any = 300
        self.answer: httpx.Response | None = None
        self.token_url: Any = TOKEN_URL
        self.jtis: list[str] = []
        self.accepted: set[str] = set()
        self.discoveries = 0
        self.metadata_tokens: list[str | None] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        if str(request.url) == f"{BASE}/.well-known/smart-configuration":
            self.discoveries += 1
            return httpx.Response(200, json={"token_endpoint": self.token_url})
        if str(request.url) == TOKEN_URL:
            return self.answer or self._issue(request)
        token = request.headers.get("authorization")
        self.metadata_tokens.append(token)
        if token not in self.accepted:
            return httpx.Response(401)
        return httpx.Response(200, json={"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"})

    def _issue(self, request: httpx.Request) -> httpx.Response:
        form = {k: v[0] for k, v in parse_qs(request.content.decode()).items()}
        assert form["grant_type"] == "client_credentials"
        assert form["client_assertion_type"] == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
        assert form["scope"] == "system/*.rs"
        assertion = form["client_assertion"]
        header = jwt.get_unverified_header(assertion)
        assert (header["alg"], header["kid"], header["typ"]) == (self.algorithm, "key-1", "JWT")
        claims = jwt.decode(
            assertion,
            self.key,
            algorithms=[self.algorithm],
            audience=TOKEN_URL,
            options={"verify_exp": False, "verify_iat": False},
        )
        assert claims["iss"] == claims["sub"] == "gateway"
        assert 0 < claims["exp"] - self.now <= 300
        assert claims["jti"] not in self.jtis
        self.jtis.append(claims["jti"])
        token = f"token-{len(self.jtis)}"
        self.accepted = {f"Bearer {token}"}
        return httpx.Response(200, json={"access_token": token, "token_type": "bearer", "expires_in": self.expires_in})


def smart(server: AuthorizationServer, key: PrivateKey, **options: Any) -> SmartBackendServices:
    return SmartBackendServices(
        base_url=BASE,
        client_id="gateway",
        private_key_pem=pem(key),
        key_id="key-1",
        scope="system/*.rs",
        clock=lambda: server.now,
        **options,
    )


def http_of(server: AuthorizationServer) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(server.handle))


@pytest.mark.requirement("CARD-04")
@pytest.mark.parametrize("algorithm", ["RS384", "ES384"])
def test_signed_assertion_is_exchanged_for_a_token(
    algorithm: str, rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    key: PrivateKey = rsa_key if algorithm == "RS384" else ec_key
    server = AuthorizationServer(key, algorithm)
    with http_of(server) as http:
        assert smart(server, key).headers(http) == {"Authorization": "Bearer token-1"}
    assert server.discoveries == 1


def test_token_is_kept_until_shortly_before_it_expires(ec_key: ec.EllipticCurvePrivateKey) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    authorization = smart(server, ec_key)
    with http_of(server) as http:
        authorization.headers(http)
        server.now += 239
        assert authorization.headers(http) == {"Authorization": "Bearer token-1"}
        server.now += 2
        assert authorization.headers(http) == {"Authorization": "Bearer token-2"}
    assert server.discoveries == 1


@pytest.mark.parametrize("expires_in", [None, "soon", 0, -5, True])
def test_unusable_lifetime_counts_as_five_minutes(ec_key: ec.EllipticCurvePrivateKey, expires_in: Any) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    server.expires_in = expires_in
    authorization = smart(server, ec_key)
    with http_of(server) as http:
        authorization.headers(http)
        server.now += 239
        assert authorization.headers(http) == {"Authorization": "Bearer token-1"}


def test_rejected_token_is_renewed_once(ec_key: ec.EllipticCurvePrivateKey) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    authorization = smart(server, ec_key)
    endpoint = EmrEndpoint(base_url=BASE, patient_identifier_system="s", authorization=authorization)
    with http_of(server) as http:
        authorization.headers(http)
        server.accepted = set()
        assert EmrClient(endpoint, http).capability().fhir_version == "4.0.1"
        assert server.metadata_tokens == ["Bearer token-1", "Bearer token-2"]


def test_token_that_stays_rejected_waits_for_an_administrator(ec_key: ec.EllipticCurvePrivateKey) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    authorization = smart(server, ec_key)
    endpoint = EmrEndpoint(base_url=BASE, patient_identifier_system="s", authorization=authorization)

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(401) if request.url.path.endswith("/metadata") else server.handle(request)

    with httpx.Client(transport=httpx.MockTransport(handle)) as http, pytest.raises(Misconfigured, match="401"):
        EmrClient(endpoint, http).capability()
    assert len(server.jtis) == 2


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            httpx.Response(400, json={"error": "invalid_client", "error_description": "gateway"}),
            Misconfigured,
            "invalid_client",
        ),
        (httpx.Response(401, text="no"), Misconfigured, "no OAuth error code"),
        (httpx.Response(503), Unavailable, "503"),
        (httpx.Response(200, json={"token_type": "bearer"}), Misconfigured, "access_token"),
        (httpx.Response(200, json={"access_token": "a\r\nb"}), Misconfigured, "access_token"),
        (httpx.Response(200, json={"access_token": "a", "token_type": "mac"}), Misconfigured, "bearer"),
        (httpx.Response(200, text="<html>"), Unavailable, "JSON"),
        (httpx.Response(302, headers={"location": "https://evil.example"}), Misconfigured, "redirects"),
    ],
)
def test_token_endpoint_that_says_no_is_named(
    ec_key: ec.EllipticCurvePrivateKey, answer: httpx.Response, error: type[Exception], message: str
) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    server.answer = answer
    with http_of(server) as http, pytest.raises(error, match=message):
        smart(server, ec_key).headers(http)


def test_configured_token_url_needs_no_discovery(ec_key: ec.EllipticCurvePrivateKey) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    with http_of(server) as http:
        smart(server, ec_key, token_url=TOKEN_URL).headers(http)
    assert server.discoveries == 0


def test_assertion_goes_to_https_only(ec_key: ec.EllipticCurvePrivateKey) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    for token_url, fault in (
        ("http://auth.example/token", "https"),
        ("https://[auth.example/token", "not a valid URL"),
    ):
        server.token_url = token_url
        with http_of(server) as http, pytest.raises(CredentialsInvalid, match=fault):
            smart(server, ec_key).headers(http)
    with pytest.raises(CredentialsInvalid, match="https"):
        smart(server, ec_key, token_url="http://auth.example/token")


@pytest.mark.parametrize("token_url", [None, 7])
def test_discovery_without_token_endpoint_waits_for_an_administrator(
    ec_key: ec.EllipticCurvePrivateKey, token_url: Any
) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    server.token_url = token_url
    with http_of(server) as http, pytest.raises(Misconfigured, match="token_endpoint"):
        smart(server, ec_key).headers(http)


def test_weak_or_foreign_keys_are_refused() -> None:
    server = AuthorizationServer(ec.generate_private_key(ec.SECP384R1()), "ES384")
    for key in (
        ec.generate_private_key(ec.SECP256R1()),
        rsa.generate_private_key(public_exponent=65537, key_size=1024),  # nosec - the weakness is the test
    ):
        with pytest.raises(CredentialsInvalid, match="RSA key of at least 2048 bits"):
            smart(server, key)
    with pytest.raises(CredentialsInvalid, match="PEM"):
        SmartBackendServices(base_url=BASE, client_id="c", private_key_pem="none", key_id="k", scope="s")


def test_simple_credentials_are_checked() -> None:
    for token in ("", "a b", "tökén", "a\nb"):
        with pytest.raises(CredentialsInvalid):
            StaticToken(lambda token=token: token)  # type: ignore[misc]
    for name in ("", "a:b"):
        with pytest.raises(CredentialsInvalid):
            Basic(name, lambda: "x")
    with httpx.Client() as http:
        assert NoAuthorization().headers(http) == {}
        assert StaticToken(lambda: "t").headers(http) == {"Authorization": "Bearer t"}


def test_rejected_secret_is_read_again_and_used_once_it_is_another() -> None:
    """An administrator replaces an expired secret in its file; the gateway needs no restart."""
    secrets = ["old"]
    token, basic = StaticToken(lambda: secrets[-1]), Basic("gateway", lambda: secrets[-1])
    with httpx.Client() as http:
        for authorization in (token, basic):
            assert not authorization.renew(authorization.headers(http))
        rejected = [token.headers(http), basic.headers(http)]
        secrets.append("new")
        assert [token.headers(http), basic.headers(http)] == rejected
        assert token.renew(rejected[0])
        assert basic.renew(rejected[1])
        assert token.headers(http) == {"Authorization": "Bearer new"}
        assert basic.headers(http) == Basic("gateway", lambda: "new").headers(http)


def test_token_endpoint_that_moved_is_discovered_again(ec_key: ec.EllipticCurvePrivateKey) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    authorization = smart(server, ec_key)
    with http_of(server) as http:
        authorization.headers(http)
        server.now += 600
        server.answer = httpx.Response(404)
        with pytest.raises(Misconfigured, match="404"):
            authorization.headers(http)
        server.answer = None
        assert authorization.headers(http) == {"Authorization": "Bearer token-2"}
    assert server.discoveries == 2


def test_assertion_is_not_in_any_message(ec_key: ec.EllipticCurvePrivateKey) -> None:
    server = AuthorizationServer(ec_key, "ES384")
    sent: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sent.append(request.content.decode())
        return httpx.Response(400, content=json.dumps({"error": request.content.decode()}).encode())

    authorization = smart(server, ec_key, token_url=TOKEN_URL)
    with httpx.Client(transport=httpx.MockTransport(handle)) as http, pytest.raises(Misconfigured) as caught:
        authorization.headers(http)
    assertion = parse_qs(sent[0])["client_assertion"][0]
    assert assertion not in str(caught.value)
