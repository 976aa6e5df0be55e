"""Starts the processes of one training on this machine and ends them together (`seggate train --devices N`).

Each runs the command that was typed, with torchrun's variables in its environment, so that torchrun itself can be used
as well. They meet over a file in a private folder and this machine's own network interface.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from gateway.commands.output import say

LAUNCHER = "SEGGATE_LAUNCHER"
"""Environment variable: the process that started this one; a training without it stops."""
GRACE_S = 60.0
_CHECK_S = 0.2


def is_launched() -> bool:
    """Whether this process is already one of several."""
    return "WORLD_SIZE" in os.environ


def is_orphaned() -> bool:
    """Whether the launcher of this process is gone."""
    launcher = os.environ.get(LAUNCHER)
    return launcher is not None and os.getppid() != int(launcher)


@contextmanager
def leaves_at_once() -> Iterator[None]:
    """Ends a process of several with the exit code of the block, without tearing torch down: the threads of its
    connections sometimes abort a process that has done its work or said what is wrong ("terminate called without an
    active exception")."""
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    else:
        code = 0
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(command: Sequence[str], processes: int, stop: threading.Event, *, grace_s: float = GRACE_S) -> int:
    """Runs the command in so many processes until all have ended; 0, or the exit code of the first that failed (1 for a
    signal).

    `stop` asks each to stop, by SIGTERM. When one fails, the others notice by themselves; what still runs after
    `grace_s` is killed.
    """
    with tempfile.TemporaryDirectory(prefix="seggate-training-") as folder:
        children = [_start(command, _environment(rank, processes, folder)) for rank in range(processes)]
        try:
            return _wait(children, stop, grace_s)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()


def _environment(rank: int, processes: int, folder: str) -> Mapping[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "SEGGATE_RENDEZVOUS": f"file://{folder}/rendezvous",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        LAUNCHER: str(os.getpid()),
    }


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # A new session: Ctrl-C in a terminal reaches only this process, which passes it on once.
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _wait(children: Sequence[subprocess.Popen[bytes]], stop: threading.Event, grace_s: float) -> int:
    code, is_asked, deadline = 0, False, float("inf")
    while True:
        is_over = all(child.poll() is not None for child in children)
        if stop.is_set() and not is_asked:
            is_asked = True
            for child in children:
                child.send_signal(signal.SIGTERM)
        # One that a signal ended is the cause; the others that failed may only have noticed.
        failed = min(
            (child for child in children if child.poll()), key=lambda child: child.returncode > 0, default=None
        )
        if failed is not None and not code:
            code = failed.returncode if failed.returncode > 0 else 1
            deadline = time.monotonic() + grace_s
            if failed.returncode < 0:
                rank, name = children.index(failed), signal.Signals(-failed.returncode).name
                say(f"seggate: process {rank} of the training was ended by {name}; the others end as well")
        if is_over:
            return code
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        if is_asked or failed is not None:
            time.sleep(_CHECK_S)
        else:
            stop.wait(_CHECK_S)


def own_command() -> list[str]:
    """What was typed, for another process."""
    return [sys.executable, "-m", "gateway.cli", *sys.argv[1:]]
