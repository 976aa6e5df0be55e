"""A receiver without weight: how fast it starts, and how much memory it holds.

    python -m benchmarks.receiver [--json] [--repeats N]

Starts the receiver process of `seggate serve` on a free loopback port, waits until it accepts a connection, and reads
its memory after 20 objects. `bare_s` is the start of an empty Python process in the same run, for scale. The last
line is one JSON object with medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from gateway.demo.stage import free_ports
from gateway.demo.synthetic_study import write_synthetic_study
from gateway.sending import send_files
from gateway.setting_types import PeerAddress


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.receiver", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    rows = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="seggate-receiver-") as folder:
            rows.append(measure(Path(folder)))
        if not options.json:
            print(json.dumps(rows[-1]), file=sys.stderr)
    report = {key: round(statistics.median(r[key] for r in rows), 3) for key in rows[0]}
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.platform()}
    print(json.dumps({**report, "repeats": options.repeats, "machine": machine}))
    return 0


def measure(folder: Path) -> dict[str, float]:
    """Seconds to the first accepted connection, CPU seconds until then, memory in MB before and after 20 objects."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", ""], check=True)
    bare_s = time.monotonic() - began
    port = free_ports(1)[0]
    (folder / "config").mkdir()
    (folder / "config" / "gateway.toml").write_text(
        f'[receiver]\nport = {port}\nhost = "127.0.0.1"\nreserve_mb = 1\n[[senders]]\nae_title = "BENCH"\n'
    )
    files = write_synthetic_study(folder / "study")[:20]
    command = [sys.executable, "-m", "gateway.role", "receiver", "--config", str(folder / "config")]
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        start_s = time.monotonic() - began
        watched = psutil.Process(process.pid)
        cpu_s = sum(watched.cpu_times()[:2])
        idle_mb = watched.memory_info().rss / 2**20
        report = send_files(files, PeerAddress(ae_title="SEGGATE", host="127.0.0.1", port=port), calling_ae="BENCH")
        if len(report.sent) != len(files):
            raise SystemExit(f"the receiver took {len(report.sent)} of {len(files)} objects")
        used_mb = watched.memory_info().rss / 2**20
    finally:
        process.terminate()
        process.wait(timeout=30)
    return {"start_s": start_s, "cpu_s": cpu_s, "bare_s": bare_s, "idle_mb": idle_mb, "used_mb": used_mb}


def _wait_for(port: int, process: subprocess.Popen[Any], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the receiver ended with code {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.005)
    raise SystemExit("the receiver did not listen in time")


if __name__ == "__main__":
    sys.exit(main())
