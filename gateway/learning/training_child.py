"""Runs one command of a training as a process of its own: lowly, watched, and giving way to studies.

A crash or a lack of memory ends that process and nothing else. It has a low priority and few threads; while studies
wait for a model, a training is asked to write a checkpoint and wait (engine/training_pause.py). When this process is
gone, the training notices and stops at its next step; when it is told to stop, it passes that on and waits for the
checkpoint.

The command inherits a lock, so that whoever takes this work over waits until a command that was left behind has ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from gateway.durable import Stopped
from gateway.errors import Permanent, Transient
from gateway.training_launcher import LAUNCHER
from storage.errors import DatabaseAway

_log = structlog.get_logger(__name__)
NICENESS = 15
GRACE_S = 120.0
_POLL_S = 0.5
_LOOK_S = 2.0  # for studies that wait
_ANSWER_BYTES = 1 << 20


class TrainingChild:
    """`stop` ends what runs. `studies_wait` is asked every two seconds of a command that can pause. `program` is
    `seggate`."""

    def __init__(
        self,
        *,
        stop: threading.Event,
        studies_wait: Callable[[], bool],
        threads: int = 0,
        program: Sequence[str] = (sys.executable, "-m", "gateway.cli"),
    ) -> None:
        self._program = program
        self._stop = stop
        self._studies_wait = studies_wait
        self._threads = threads or max(1, (os.cpu_count() or 2) // 2)

    def run(
        self,
        arguments: Sequence[str],
        *,
        log: Path,
        pause_file: Path | None = None,
        wanted: Callable[[], bool] = lambda: True,
        fine: Sequence[int] = (0,),
    ) -> dict[str, Any]:
        """The JSON document that `seggate ARGUMENTS --json` ends with; its exit code, one of `fine`, is "exit_code".

        What it says on the way goes to the end of `log`. A command with a `pause_file` pauses while that exists, and is
        asked to stop when it is no longer `wanted`.
        Raises Stopped when `stop` was set (the command has been asked to stop and has ended), Transient when it was
        killed, Permanent with the command's own words when it failed.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        answer = log.with_suffix(".json")
        command = [*self._program, *arguments, "--json"]
        with log.open("ab") as said, log.with_suffix(".lock").open("ab") as lock:
            self._take(lock.fileno())
            with answer.open("wb") as out:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=said,
                    env=self._environment(),
                    pass_fds=(lock.fileno(),),
                )
            # Never a higher one than our own, which would not be allowed.
            os.setpriority(os.PRIO_PROCESS, child.pid, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
            try:
                self._watch(child, pause_file, wanted)
            finally:
                if pause_file is not None:
                    pause_file.unlink(missing_ok=True)
                if child.poll() is None:
                    child.kill()
                child.wait()
        if self._stop.is_set():
            raise Stopped
        document = _document(answer)
        if child.returncode < 0:
            raise Transient(f"{' '.join(arguments[:2])}: {_ending(child.returncode, log)}")
        if child.returncode not in fine:
            raise Permanent(f"{' '.join(arguments[:2])}: {document.get('error') or _ending(child.returncode, log)}")
        return {**document, "exit_code": child.returncode}

    def _take(self, lock: int) -> None:
        """Waits for a command that a process before this one has left behind. Raises Stopped."""
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._stop.wait(_POLL_S):
                    raise Stopped from None

    def _watch(self, child: subprocess.Popen[bytes], pause_file: Path | None, wanted: Callable[[], bool]) -> None:
        since_look_s, pausing = _LOOK_S, False
        while not self._stop.is_set():
            if _ended(child, _POLL_S):
                return
            since_look_s += _POLL_S
            if pause_file is not None and since_look_s >= _LOOK_S:
                since_look_s = 0.0
                try:
                    if not wanted():
                        break
                    waits = self._studies_wait()
                except DatabaseAway:  # nobody knows: it goes on as it is
                    continue
                if waits != pausing:
                    pausing = waits
                    _log.info("training pauses for studies" if waits else "training goes on", pid=child.pid)
                if not waits:
                    pause_file.unlink(missing_ok=True)
                elif pause_file.parent.is_dir():
                    pause_file.touch()
        child.send_signal(signal.SIGTERM)
        _ended(child, GRACE_S)

    def _environment(self) -> dict[str, str]:
        threads = str(self._threads)
        return {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            LAUNCHER: str(os.getpid()),
        }


def _ended(child: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _document(answer: Path) -> dict[str, Any]:
    """The last JSON document of a command's output; empty where there is none."""
    text = answer.read_bytes()[-_ANSWER_BYTES:].decode("utf-8", errors="replace")
    start = text.find("{")
    try:
        document = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _ending(returncode: int, log: Path) -> str:
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}; see {log.name} of the run"
    return f"exit code {returncode}; see {log.name} of the run"
