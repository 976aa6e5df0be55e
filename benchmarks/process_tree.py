"""Wall time, CPU time and peak memory of a command together with every process that it starts (Linux).

    python -m benchmarks.process_tree --log FILE [--memory] -- COMMAND ...

Prints one JSON object (`Usage`). The command runs below a process of its own that adopts what the command leaves
behind, so that CPU time is complete: fork servers and their workers are nobody's waited-for children.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
# prctl.h
_PR_SET_CHILD_SUBREAPER = 36
# From the start of a sample to the next, and between them at least.
_PERIOD_S = 0.03
_PAUSE_S = 0.005
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# The kernel counts resident pages in batches for each core.
_RSS_SLACK_BYTES = 2**20
# The command's lower priority while it is sampled, so that samples are not late on a busy machine.
_NICE = 5


@dataclass(frozen=True, kw_only=True)
class Usage:
    """`wall_s` until the command itself ended, `cpu_s` user and system time of the whole tree.

    `peak_pss_mb` (MB = 2^20 bytes) is the largest sum of the tree's proportional set sizes, 0 where memory was not
    sampled; `samples_per_s` says how often it was, `sample_ms` the median time from one sample to the next and
    `longest_ms` the longest. `peak_rss_mb` is the kernel's own high-water mark of the largest single process, which
    misses no peak and of one process is never below its proportional set size.
    """

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_pss_mb: float = 0.0
    samples_per_s: float = 0.0
    sample_ms: float = 0.0
    longest_ms: float = 0.0
    peak_rss_mb: float = 0.0


def measure(command: Sequence[str], *, log: Path, environment: Mapping[str, str], memory: bool = False) -> Usage:
    """Runs the command, its output in `log`. Sampling memory takes CPU time of its own, more from a larger tree: take
    times from a run without it. Raises SystemExit when the command fails."""
    options = ["--log", str(log), *(["--memory"] if memory else []), "--", *command]
    words = [sys.executable, "-m", "benchmarks.process_tree", *options]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            answer, _ = process.communicate()
        finally:
            _end_tree(process)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: could not be measured ({process.returncode})")
    usage = Usage(**json.loads(answer))
    if usage.exit_code:
        raise SystemExit(f"{' '.join(command)}: ended with {usage.exit_code}\n{log.read_text()[-2000:]}")
    return usage


def _end_tree(process: subprocess.Popen[str]) -> None:
    """Ends what a measurement that was broken off has started."""
    if process.poll() is not None:
        return
    for pid in (process.pid, *descendants(process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Children, their children and so on; what ends meanwhile is left out."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                for child in map(int, (task / "children").read_text().split()):
                    found += [child, *descendants(child)]
    return found


def pss_bytes(pids: Sequence[int]) -> int:
    """Sum of the proportional set sizes: each page counts once, however many of these processes share it."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def rss_bytes(pids: Sequence[int]) -> int:
    """Sum of the resident set sizes, never less than `pss_bytes`, and much sooner known."""
    total = 0
    for pid in pids:
        with suppress(OSError, IndexError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    return total


class PeakMemory:
    """The largest `pss_bytes` of the descendants of `pid`, looked at again and again while the `with` block runs.

    Summing up takes some 30 ms for each GB; it is left out where the resident sizes say that no new peak is possible.
    """

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self.samples = 0
        self.intervals_s: list[float] = []
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        before, pause_s = time.monotonic(), _PAUSE_S
        while not self._ended.wait(pause_s):
            began = time.monotonic()
            pids = descendants(self._pid)
            if rss_bytes(pids) + _RSS_SLACK_BYTES * len(pids) > self.peak:
                self.peak = max(self.peak, pss_bytes(pids))
            self.samples += 1
            now = time.monotonic()
            self.intervals_s.append(now - before)
            before = now
            pause_s = max(_PAUSE_S, _PERIOD_S - (now - began))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.process_tree", description=__doc__)
    parser.add_argument("--log", type=Path, required=True, help="gets what the command prints")
    parser.add_argument("--memory", action="store_true", help="sample memory too")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this process cannot adopt what the command leaves behind")
    print(json.dumps(asdict(_run(options.command, options.log, memory=options.memory))))
    return 0


def _run(command: Sequence[str], log: Path, *, memory: bool) -> Usage:
    watched = PeakMemory(os.getpid())
    with log.open("wb") as output:
        began = time.monotonic()
        process = subprocess.Popen(
            ["nice", "-n", str(_NICE), *command] if memory else command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    cpu_s, exit_code, wall_s, rss_kb = 0.0, 0, 0.0, 0
    with watched if memory else nullcontext(), suppress(ChildProcessError):  # until there is no child left
        while True:
            pid, status, used = os.wait4(-1, 0)
            cpu_s += used.ru_utime + used.ru_stime
            rss_kb = max(rss_kb, used.ru_maxrss)
            if pid == process.pid:
                wall_s = time.monotonic() - began
                exit_code = process.returncode = os.waitstatus_to_exitcode(status)
    return Usage(
        exit_code=exit_code,
        wall_s=wall_s,
        cpu_s=cpu_s,
        peak_pss_mb=watched.peak / 2**20,
        samples_per_s=watched.samples / (time.monotonic() - began),
        sample_ms=1000 * statistics.median(watched.intervals_s or [0.0]),
        longest_ms=1000 * max(watched.intervals_s, default=0.0),
        peak_rss_mb=rss_kb / 1024,
    )


if __name__ == "__main__":
    sys.exit(main())
