"""A PostgreSQL server for a test: its own data folder, a Unix socket and a free loopback port, an unprivileged user.

PostgreSQL refuses to run as root. Where the tests do, the server runs as the user `postgres` of Debian's package.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.support.pacs import free_port
from tests.support.peers import postgresql_bin, require_peer
from tests.support.waiting import wait_until


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of an empty database on a server of its own, which ends with the block."""
    require_peer("postgresql")
    programs = postgresql_bin()
    assert programs is not None
    user, group = _unprivileged()
    # Not in tmp_path: pytest's folders are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="seggate-postgresql-"))
    try:
        if user is not None and group is not None:
            os.chown(folder, user, group)
        data, port = folder / "data", free_port()
        made = subprocess.run(
            [str(programs / "initdb"), "-D", str(data), "-U", "seggate", "-A", "trust", "-E", "UTF8", "--no-sync"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
            user=user,
            group=group,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        # Durability is not under test here: no fsync.
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-p", str(port), "-k", str(folder)]
        with (folder / "server.log").open("wb") as log:
            server = subprocess.Popen(
                [str(programs / "postgres"), "-D", str(data), *options],
                stdout=log,
                stderr=log,
                cwd=folder,
                user=user,
                group=group,
            )
        try:
            url = f"postgresql://seggate@127.0.0.1:{port}/postgres"
            wait_until(lambda: server.poll() is not None or _answers(url), "PostgreSQL answers")
            assert server.poll() is None, (folder / "server.log").read_text(errors="replace")
            yield url
        finally:
            # A fast shutdown: SIGTERM would wait for every client that forgot to leave.
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged() -> tuple[int | None, int | None]:
    """User and group that run the server: None for ourselves."""
    if os.geteuid() != 0:
        return None, None
    try:
        found = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    return found.pw_uid, found.pw_gid


def _answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=2):
            return True
    except psycopg.OperationalError:
        return False
