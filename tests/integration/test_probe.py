"""The health check of containers: what it asks, and what it says when the answer is not good."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gateway import probe
from gateway.heartbeat import executor_id
from gateway.intake.scp import Receiver
from gateway.settings import Settings, load_settings
from gateway.state import open_spool
from storage.database import Database
from storage.records import Executor, utc_now


def settings_in(folder: Path, text: str) -> Settings:
    config = folder / "config"
    config.mkdir(exist_ok=True)
    (config / "gateway.toml").write_text(text, encoding="utf-8")
    return load_settings(config)


@contextmanager
def receiving(folder: Path, sender: str) -> Iterator[Settings]:
    head = f'state_dir = "{folder}"\n[receiver]\nhost = "127.0.0.1"\nreserve_mb = 0\ndrain_timeout_s = 1\nport = '
    tail = f'\n[[senders]]\nae_title = "{sender}"\naddresses = ["127.0.0.1"]\n'
    settings = settings_in(folder, f"{head}0{tail}")
    receiver = Receiver(settings, open_spool(settings))
    receiver.start()
    try:
        yield settings_in(folder, f"{head}{receiver.port}{tail}")
    finally:
        receiver.stop()


def test_a_receiver_that_answers_an_echo_is_well_and_keeps_no_trace(tmp_path: Path) -> None:
    with receiving(tmp_path, probe.CALLING_AE_TITLE) as settings:
        spool = open_spool(settings)
        before = [entry.id for entry in spool.incoming()]
        assert probe.probe(settings, ["receiver"]) == {}
        assert [entry.id for entry in spool.incoming()] == before
    reasons = probe.probe(settings, ["receiver"])
    assert "cannot be reached" in reasons["receiver"], "it has stopped"


def test_a_receiver_that_refuses_the_probe_says_what_to_configure(tmp_path: Path) -> None:
    with receiving(tmp_path, "CT1") as settings:
        reasons = probe.probe(settings, ["receiver"])
    assert f'[[senders]] ae_title = "{probe.CALLING_AE_TITLE}"' in reasons["receiver"]


def test_a_worker_is_well_while_its_heart_beats(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f'state_dir = "{tmp_path}"\n[worker]\ntakeover_s = 30\n')
    assert "did not answer" in probe.probe(settings, ["worker"])["worker"], "there is no database yet"
    database = Database(settings.database_url)
    database.create_all()

    def beat(age_s: float, *, stopped: bool = False) -> None:
        now = utc_now()
        with database.session() as session:
            session.merge(
                Executor(
                    executor_id=executor_id("worker"),
                    role="worker",
                    host="h",
                    pid=1,
                    started_at=now,
                    beat_at=now - timedelta(seconds=age_s),
                    stopped_at=now if stopped else None,
                )
            )

    try:
        assert "has not started" in probe.probe(settings, ["worker"])["worker"]
        beat(1)
        assert probe.probe(settings, ["worker"]) == {}
        assert "has not started" in probe.probe(settings, ["delivery"])["delivery"], "each role has its own"
        beat(31)
        assert "silent for 31 s" in probe.probe(settings, ["worker"])["worker"]
        beat(1, stopped=True)
        assert "has not started" in probe.probe(settings, ["worker"])["worker"]
    finally:
        database.close()


@pytest.mark.parametrize(("status", "well"), [(200, True), (503, False)])
def test_the_web_server_is_well_when_it_says_so(status: int, well: bool, tmp_path: Path) -> None:
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        settings = settings_in(tmp_path, f"[web]\nport = {server.server_port}\n")
        reasons = probe.probe(settings, ["web"])
        server.shutdown()
        thread.join(timeout=5)
    assert asked == ["/health/live"]
    assert (reasons == {}) is well


def test_the_exit_code_and_the_reason_are_for_the_container_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings_in(tmp_path, f'state_dir = "{tmp_path}"\n[web]\nport = 1\n')
    assert probe.main(["web", "--config", str(tmp_path / "config")]) == 1
    assert "web: http://127.0.0.1:1/health/live" in capsys.readouterr().err
    assert probe.main(["web", "--config", str(tmp_path / "nowhere")]) == 2
    assert "gateway.toml" in capsys.readouterr().err
