"""TLS towards the EMR: verified against the configured authority, and nothing sent where it does not hold."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from emr.errors import Unavailable
from emr.exchange import exchange, open_http


@dataclass(frozen=True)
class TlsServer:
    url: str
    certificate: Path


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the tests' output quiet."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "emr.test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    with HTTPServer(("127.0.0.1", 0), _Hello) as http:
        http.socket = context.wrap_socket(http.socket, server_side=True)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield TlsServer(url=f"https://127.0.0.1:{http.server_port}/", certificate=folder / "ca.pem")
        http.shutdown()
        thread.join(timeout=10)


def test_configured_authority_is_trusted(server: TlsServer) -> None:
    with open_http(timeout_s=10, ca_file=server.certificate) as http:
        assert exchange(http, "GET", server.url, what="hello", headers={}).json_object("hello") == {}


def test_unknown_authority_is_not_and_the_reason_is_said(server: TlsServer) -> None:
    with open_http(timeout_s=10) as http, pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
        exchange(http, "GET", server.url, what="hello", headers={})


def test_other_host_name_is_not_trusted(server: TlsServer) -> None:
    with (
        open_http(timeout_s=10, ca_file=server.certificate) as http,
        pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        exchange(http, "GET", server.url.replace("127.0.0.1", "localhost"), what="hello", headers={})


def test_proxy_of_the_environment_is_not_used(server: TlsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with open_http(timeout_s=10, ca_file=server.certificate) as http:
        assert exchange(http, "GET", server.url, what="hello", headers={}).status == 200
