"""Is this host's part of the gateway alive? The health check of containers: `python -m gateway.probe receiver …`.

| part | question |
| --- | --- |
| `receiver` | does it answer a C-ECHO (PS3.4 Annex A)? |
| `worker`, `delivery` | has this host's executor written a heartbeat within `worker.takeover_s`? |
| `web` | does `/health/live` answer 200? (where client certificates are needed: does it listen?) |

The answer is the exit code (0 or 1), with the reason on standard error. Nothing is changed, sent on or recorded:
an association that only echoes leaves no trace in the spool.
"""

from __future__ import annotations

import argparse
import os
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

from gateway.setting_types import PeerAddress
from gateway.settings import Settings, SettingsInvalid, load_settings

CALLING_AE_TITLE = "SEGGATE-PROBE"
_TIMEOUT_S = 5.0
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - read, not bound


class Unwell(Exception):
    """A part does not answer as it should; the message says what to look at."""


def main(arguments: list[str] | None = None) -> int:
    """Probe the parts named on the command line; 0 when all are well, 1 otherwise, 2 for a bad configuration."""
    parser = argparse.ArgumentParser(prog="python -m gateway.probe")
    parser.add_argument("parts", nargs="+", choices=sorted(PROBES))
    parser.add_argument("--config", type=Path, default=Path(os.environ.get("SEGGATE_CONFIG", "config")))
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.config)
        reasons = probe(settings, options.parts)
    except SettingsInvalid as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for part, reason in reasons.items():
        sys.stderr.write(f"{part}: {reason}\n")
    return 1 if reasons else 0


def probe(settings: Settings, parts: list[str]) -> dict[str, str]:
    """What is wrong, by part; empty when all are well. Raises SettingsInvalid when a secret cannot be read."""
    reasons: dict[str, str] = {}
    for part in parts:
        try:
            PROBES[part](settings)
        except Unwell as unwell:
            reasons[part] = str(unwell)
    return reasons


def _receiver(settings: Settings) -> None:
    from pynetdicom.presentation import build_context
    from pynetdicom.sop_class import Verification

    from gateway.delivery.association import associated
    from gateway.delivery.destination import DestinationAway, DestinationRefuses

    own = settings.gateway.receiver
    host = _LOOPBACK_OF.get(own.host, own.host)
    peer = PeerAddress(ae_title=own.ae_title, host=host, port=own.port)
    contexts = [build_context(Verification)]
    try:
        with associated(
            peer, contexts, calling_ae_title=CALLING_AE_TITLE, timeout_s=_TIMEOUT_S, name="receiver"
        ) as association:
            status = association.send_c_echo()
    except DestinationRefuses as error:
        raise Unwell(
            f"{CALLING_AE_TITLE} may not call; allow it in gateway.toml: "
            f'[[senders]] ae_title = "{CALLING_AE_TITLE}", addresses = ["{host}"]'
        ) from error
    except DestinationAway as error:
        raise Unwell(str(error)) from error
    if getattr(status, "Status", None) != 0:
        raise Unwell(f"C-ECHO was not answered with Success by {own.ae_title} at {host}:{own.port}")


def _executor(role: str) -> Callable[[Settings], None]:
    def ask(settings: Settings) -> None:
        from gateway.heartbeat import executor_id
        from storage.database import Database
        from storage.errors import DatabaseAway
        from storage.records import Executor, utc_now

        database = Database(settings.database_url, pool_size=1)
        try:
            with database.reading() as session:
                row = session.get(Executor, executor_id(role))
        except DatabaseAway as error:
            raise Unwell(str(error)) from error
        finally:
            database.close()
        if row is None or row.stopped_at is not None:
            raise Unwell(f"{executor_id(role)} has not started")
        silent = utc_now() - row.beat_at
        if silent > timedelta(seconds=settings.gateway.worker.takeover_s):
            raise Unwell(f"{executor_id(role)} has been silent for {silent.total_seconds():.0f} s")

    return ask


def _web(settings: Settings) -> None:
    web = settings.gateway.web
    host = _LOOPBACK_OF.get(web.host, web.host)
    if web.client_ca is not None:
        # Only clients with a certificate are answered, and the probe has none: it listens, more cannot be asked.
        try:
            socket.create_connection((host, web.port), timeout=_TIMEOUT_S).close()
        except OSError as error:
            raise Unwell(f"nothing listens at {host}:{web.port}: {error.strerror}") from error
        return
    scheme = "https" if web.tls_certificate else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{web.port}/health/live"
    # This host asks itself: the certificate is for the name that others use.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            status = answer.status
    except (OSError, urllib.error.URLError) as error:
        raise Unwell(f"{url}: {error}") from error
    if status != 200:
        raise Unwell(f"{url}: answered {status}")


PROBES: Mapping[str, Callable[[Settings], None]] = {
    "receiver": _receiver,
    "worker": _executor("worker"),
    "delivery": _executor("delivery"),
    "web": _web,
}


if __name__ == "__main__":
    sys.exit(main())
