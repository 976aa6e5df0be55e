"""The HTTP server beside other roles: what keeps it from running is alarmed, and is its own trouble only."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from gateway.app import run_services
from gateway.settings import Settings, load_settings
from gateway.state import prepare_state
from gateway.web_server import ALARM
from storage.alarms import open_alarms
from storage.database import Database
from storage.records import Executor
from tests.support.config_folder import write_config
from tests.support.waiting import wait_until


@pytest.fixture
def services() -> Iterator[Callable[..., threading.Thread]]:
    """Starts the given roles as one process does; ended at the end of the test."""
    with ExitStack() as running:

        def start(settings: Settings, *roles: str) -> threading.Thread:
            stop = threading.Event()
            thread = threading.Thread(target=run_services, args=(settings,), kwargs={"roles": roles, "stop": stop})
            thread.start()
            running.callback(thread.join, 60)
            running.callback(stop.set)
            return thread

        yield start


def _alarms(database: Database) -> list[str]:
    with database.reading() as session:
        return [a.message for a in open_alarms(session) if a.kind == ALARM]


def _delivers(database: Database) -> bool:
    with database.reading() as session:
        return session.query(Executor).filter_by(role="delivery", stopped_at=None).count() == 1


def _lives(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/live", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
def test_a_taken_web_port_stops_no_delivery_and_is_alarmed_until_it_is_free(
    tmp_path: Path, services: Callable[..., threading.Thread]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = load_settings(write_config(tmp_path, web_port=port))
        database = prepare_state(settings)
        process = services(settings, "delivery", "web")
        (message,) = wait_until(lambda: _alarms(database), "the alarm")
        assert f"127.0.0.1:{port}" in message
        assert "is the port taken?" in message
        assert _delivers(database)
    wait_until(lambda: _lives(port), "the web server has its port")
    wait_until(lambda: not _alarms(database), "the alarm is cleared")
    assert process.is_alive()
    database.close()


def test_a_web_token_that_cannot_be_read_stops_no_other_role_and_is_waited_for(
    tmp_path: Path, services: Callable[..., threading.Thread]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    config = write_config(tmp_path, web_port=port)
    text = (config / "gateway.toml").read_text()
    (config / "gateway.toml").write_text(text.replace("[web]", f'[web]\ntoken_file = "{tmp_path / "token"}"'))
    settings = load_settings(config)
    database = prepare_state(settings)
    process = services(settings, "scheduler", "web")
    (message,) = wait_until(lambda: _alarms(database), "the alarm")
    assert "web.token: cannot read" in message
    (tmp_path / "token").write_text("s3cret")
    wait_until(lambda: _lives(port), "the web server runs")
    wait_until(lambda: not _alarms(database), "the alarm is cleared")
    assert process.is_alive()
    database.close()
