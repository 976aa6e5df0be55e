"""The entry of one process of `seggate serve`: `python -m gateway.role receiver --config DIR …`.

Each group imports only what it needs: a receiver starts in under a second and never sees the engine.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.stop_signal import set_on_stop_signals

if TYPE_CHECKING:
    from gateway.settings import Settings

_PR_SET_PDEATHSIG = 1
CANNOT_START = 4  # exit code: another program has what this process needs for itself alone


class CannotStart(Exception):
    """The lock or the address that this process needs is taken; the message says which and what to do."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway.role")
    parser.add_argument("group", choices=("receiver", "indexer", "worker", "services"))
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--roles", default="")
    parser.add_argument("--parent", type=int, default=0)
    options = parser.parse_args(arguments)
    _end_with_parent(options.parent)
    if options.group == "receiver":
        _without_heavy_libraries()
    from gateway.logs import configure
    from gateway.settings import SettingsInvalid, load_settings
    from storage.errors import StorageError

    try:
        settings = load_settings(options.config)
    except SettingsInvalid as error:
        print(error, file=sys.stderr)  # noqa: T201 - logging is not configured yet
        return 2
    configure(settings.logging, process=options.group)
    stop = threading.Event()
    set_on_stop_signals(stop)
    log = logging.getLogger(__name__)
    roles = tuple(r for r in options.roles.split(",") if r)
    try:
        # Delivery, scheduler and web may run apart, in several processes of the group "services".
        with _only_one(settings, roles if options.group == "services" else (options.group,)):
            run(options.group, settings, roles=roles, stop=stop)
    except CannotStart as error:
        log.error("%s", error)
        return CANNOT_START
    except SettingsInvalid as error:
        log.error("%s", error)
        return 2
    except StorageError as error:
        log.error("%s", error)
        return 1
    return 0


@contextmanager
def _only_one(settings: Settings, whats: Sequence[str]) -> Iterator[None]:
    """Hold the locks of these roles on this host and state; a second gateway beside the first would redo its work.

    SEGGATE_EXECUTOR tells several on one host apart. The locks end with the process, however it ends. Raises
    CannotStart when another process has one, SettingsInvalid where none can be made.
    """
    from gateway.settings import SettingsInvalid

    folder = settings.state_dir / "locks"
    with ExitStack() as held:
        for what in whats:
            name = "-".join(filter(None, (what, socket.gethostname(), os.environ.get("SEGGATE_EXECUTOR", ""))))
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context((folder / f"{name}.lock").open("w"))
            except OSError as error:
                raise SettingsInvalid(f"state_dir: {folder} cannot be written: {error.strerror}") from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CannotStart(
                    f"the {what} already runs here for {settings.state_dir}; stop the other gateway first"
                ) from error
        yield


def run(group: str, settings: Settings, *, roles: tuple[str, ...], stop: threading.Event) -> None:
    """Run one group until `stop` is set."""
    if group == "receiver":
        from gateway.intake.scp import run_receiver

        own = settings.gateway.receiver
        try:
            run_receiver(settings, stop=stop)
        except OSError as error:
            raise CannotStart(
                f"the receiver cannot listen on {own.host}:{own.port}: {error.strerror}; end the other program, or "
                "choose another receiver.host and receiver.port"
            ) from error
        return
    if group == "indexer":
        run_indexer(settings, stop=stop)
        return
    from gateway import app

    if group == "worker":
        app.run_worker(settings, stop=stop)
    else:
        app.run_services(settings, roles=roles, stop=stop)


def run_indexer(settings: Settings, *, stop: threading.Event) -> None:
    """Spool → rows, until `stop`."""
    from gateway.intake.indexer import Indexer
    from gateway.intake.own_results import is_own_result
    from gateway.state import open_database, open_spool

    database = open_database(settings)
    try:
        Indexer(open_spool(settings), database, settings, is_own_result=is_own_result).run(stop)
    finally:
        database.close()


def _without_heavy_libraries() -> None:
    """A receiver decodes no pixels, downloads nothing and prints no tables, but pydicom and structlog import what
    they find for all three.

    Marking these as absent halves the import time and saves 40 MB in a process that must start fast; both libraries
    do without them.
    """
    for name in ("numpy", "PIL", "gdcm", "pylibjpeg", "openjpeg", "libjpeg", "rle", "jpeg_ls", "requests", "rich"):
        sys.modules[name] = None  # type: ignore[assignment]


def _end_with_parent(parent: int) -> None:
    """A supervisor that is killed must not leave processes behind that nobody tends (Linux, prctl(2))."""
    if not parent:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
