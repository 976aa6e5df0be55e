"""Health, readiness and metrics over HTTP: what they say, and who may ask."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from gateway.settings import GatewaySettings, Settings, SettingsInvalid, WebSettings, load_settings
from gateway.web import make_app, server
from storage.alarms import raise_alarm
from storage.database import Database
from storage.records import Executor, Instance, InstanceState, utc_now
from storage.spool import Spool


def _settings(folder: Path, web: WebSettings | None = None) -> Settings:
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "gateway.toml").write_text("[receiver]\nreserve_mb = 1\n")
    settings = load_settings(folder / "config")
    gateway = GatewaySettings(receiver=settings.gateway.receiver, web=web or WebSettings())
    return settings.model_copy(update={"gateway": gateway})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'web.sqlite'}")
    database.create_all()
    yield database
    database.close()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool", reserve_bytes=1 << 20)
    spool.prepare()
    return spool


def _worker(database: Database) -> None:
    now = utc_now()
    with database.session() as session:
        session.add(Executor(executor_id="worker@x", role="worker", host="x", pid=1, started_at=now, beat_at=now))


def test_ready_only_with_database_spool_and_a_live_worker(tmp_path: Path, database: Database, spool: Spool) -> None:
    with _asking(make_app(_settings(tmp_path), database, spool)) as client:
        assert client.get("/health/live").json() == {"status": "live"}
        waiting = client.get("/health/ready")
        assert waiting.status_code == 503
        assert waiting.json()["checks"]["worker"] == "no worker has reported lately"
        _worker(database)
        assert client.get("/health/ready").json() == {
            "ready": True,
            "checks": {"database": "ok", "worker": "ok", "spool": "ok"},
        }


def test_not_ready_while_the_database_is_away(tmp_path: Path, spool: Spool) -> None:
    (tmp_path / "folder").mkdir()
    away = Database(f"sqlite:///{tmp_path / 'folder'}")
    with _asking(make_app(_settings(tmp_path), away, spool)) as client:
        answer = client.get("/health/ready")
    assert answer.status_code == 503
    assert "did not answer" in answer.json()["checks"]["database"]


@pytest.mark.requirement("ART-18", open="utilisation of a GPU")
def test_metrics_count_what_is_in_the_database(tmp_path: Path, database: Database, spool: Spool) -> None:
    with database.session() as session:
        raise_alarm(session, kind="result-held", subject="study:1", message="m")
        session.add(
            Instance(
                object_id="0" * 32,
                state=InstanceState.CURRENT,
                digest="0" * 64,
                size_bytes=1,
                spool_path="x",
                received_at=utc_now(),
                association_id="a",
                calling_ae="A",
                called_ae="B",
                peer_address="127.0.0.1",
            )
        )
    with _asking(make_app(_settings(tmp_path), database, spool)) as client:
        text = client.get("/metrics").text
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["seggate_database_up",] == 1
    assert samples["seggate_objects_total", "current"] == 1
    assert samples["seggate_alarms_open", "result-held"] == 1
    assert samples["seggate_studies", "failed"] == 0
    assert samples["seggate_spool_free_bytes",] > 0


def test_metrics_are_served_while_the_database_is_away(tmp_path: Path, spool: Spool) -> None:
    (tmp_path / "folder").mkdir()
    away = Database(f"sqlite:///{tmp_path / 'folder'}")
    with _asking(make_app(_settings(tmp_path), away, spool)) as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200
    assert "seggate_database_up 0.0" in answer.text


def test_a_token_guards_everything_but_liveness(tmp_path: Path, database: Database, spool: Spool) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    web = WebSettings(host="0.0.0.0", token_file=tmp_path / "token")
    with _asking(make_app(_settings(tmp_path, web), database, spool)) as client:
        assert client.get("/health/live").status_code == 200
        for path in ("/health/ready", "/metrics", "/nothing"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/metrics", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_an_unreadable_token_is_an_error_not_an_open_door(tmp_path: Path, database: Database, spool: Spool) -> None:
    web = WebSettings(host="0.0.0.0", token_file=tmp_path / "absent")
    with pytest.raises(SettingsInvalid, match="absent"):
        make_app(_settings(tmp_path, web), database, spool)


def test_an_empty_token_is_an_error_not_an_open_door(tmp_path: Path, database: Database, spool: Spool) -> None:
    (tmp_path / "token").write_text("\n")
    web = WebSettings(host="0.0.0.0", token_file=tmp_path / "token")
    with pytest.raises(SettingsInvalid, match="empty"):
        make_app(_settings(tmp_path, web), database, spool)


def test_client_certificates_are_demanded(tmp_path: Path, database: Database, spool: Spool) -> None:
    ca_key, ca = _certificate("CA", None, None)
    server_key, server_certificate = _certificate("localhost", ca_key, ca)
    client_key, client_certificate = _certificate("prometheus", ca_key, ca)
    for name, content in {
        "ca.pem": _pem(ca),
        "server.pem": _pem(server_certificate),
        "server.key": _key(server_key),
        "client.pem": _pem(client_certificate),
        "client.key": _key(client_key),
    }.items():
        (tmp_path / name).write_bytes(content)
    web = WebSettings(
        host="localhost",
        port=0,
        tls_certificate=tmp_path / "server.pem",
        tls_key=tmp_path / "server.key",
        client_ca=tmp_path / "ca.pem",
    )
    app = make_app(_settings(tmp_path, web), database, spool)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with _serving(server(app, web)) as port:
        url = f"https://localhost:{port}/health/live"
        with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
            httpx.get(url, verify=context)
        context.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        assert httpx.get(url, verify=context).status_code == 200


@contextmanager
def _asking(app: FastAPI) -> Iterator[httpx.Client]:
    """The application behind a real server on a free loopback port."""
    with _serving(server(app, WebSettings())) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        yield client


@contextmanager
def _serving(served: uvicorn.Server) -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = int(listening.getsockname()[1])
        thread = threading.Thread(target=served.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield port
        finally:
            served.should_exit = True
            thread.join(timeout=10)


def _certificate(
    name: str, issuer_key: ec.EllipticCurvePrivateKey | None, issuer: x509.Certificate | None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    )
    return key, builder.sign(issuer_key or key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
