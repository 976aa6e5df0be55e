"""benchmarks.process_tree on processes whose memory and time are known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.process_tree import PeakMemory, descendants, measure, pss_bytes, rss_bytes
from tests.support.waiting import wait_until

# Holds 60 MB, starts a child that holds as much, works for half a second of CPU time each, and does not wait for it.
WORKING = """
import subprocess, sys, time
held = bytearray(b"x" * 60 * 2**20)
if len(sys.argv) < 2:
    subprocess.Popen([sys.executable, __file__, "child"])
while time.process_time() < 0.5:
    pass
time.sleep(0.5)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "working.py"
    path.write_text(WORKING)
    return path


def test_time_and_memory_are_those_of_the_whole_tree(tmp_path: Path, script: Path) -> None:
    log = tmp_path / "log"
    usage = measure([sys.executable, str(script)], log=log, environment=dict(os.environ), memory=True)
    assert usage.exit_code == 0
    # Twice the start of an interpreter comes on top.
    assert 1.0 <= usage.cpu_s < 3.0
    assert 120 <= usage.peak_pss_mb < 200
    assert usage.wall_s >= 0.5
    assert usage.samples_per_s > 1
    assert 0 < usage.sample_ms <= usage.longest_ms
    assert 60 <= usage.peak_rss_mb < 160  # of one of the two, which copies its 60 MB once


def test_what_fails_ends_the_benchmark_with_what_it_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('out of luck'); sys.exit(3)"]
    with pytest.raises(SystemExit, match=r"(?s)ended with 3.*out of luck"):
        measure(command, log=tmp_path / "log", environment=dict(os.environ))


def test_a_measurement_that_is_broken_off_ends_what_it_started(tmp_path: Path) -> None:
    """As SIGTERM to a benchmark does; the command's own child is in another session."""
    code = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', CHILD], start_new_session=True)"
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"""
import signal, sys
from pathlib import Path
from benchmarks.process_tree import measure
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
command = [sys.executable, "-c", {code.replace("CHILD", repr(child))!r}]
measure(command, log=Path({str(tmp_path / "log")!r}), environment={{}})
"""
    with subprocess.Popen([sys.executable, "-c", program]) as one:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", "the child")
        child_pid = int((tmp_path / "pid").read_text())
        one.terminate()
        assert one.wait(timeout=30) == 143
    wait_until(lambda: not Path(f"/proc/{child_pid}").exists(), "the end of the child")


def test_a_process_shares_its_pages_with_what_it_forked() -> None:
    """40 MB in a process and its fork count once."""
    code = (
        "import os, sys; held = bytearray(b'x' * 40 * 2**20); child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "sys.stdin.read()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as one:
        assert one.stdout is not None
        child = int(one.stdout.readline())
        assert descendants(one.pid) == [child]
        both = pss_bytes([one.pid, child])
        assert 40 * 2**20 <= both < 70 * 2**20
        assert pss_bytes([one.pid]) < 0.75 * both
        assert rss_bytes([one.pid, child]) > 80 * 2**20
        with PeakMemory(os.getpid()) as watched:
            wait_until(lambda: watched.samples > 1, "two samples")
        assert watched.peak >= 0.9 * both
        one.communicate("")
    assert pss_bytes([one.pid]) == 0
