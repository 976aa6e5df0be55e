"""gateway.stop_signal: a signal ends the wait for it, at whatever moment it arrives."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.peers import ROOT

# The lock that `Event.wait` holds for a moment whenever it begins, ends or times out.
SCRIPT = """
import signal, threading
from gateway.stop_signal import set_on_stop_signals

stop = threading.Event()
set_on_stop_signals(stop)
with stop._cond:
    signal.raise_signal(signal.{number})
    signal.raise_signal(signal.{number})
assert stop.wait(10)
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_between_two_instructions_of_the_wait_does_not_hang_the_process(number: str) -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT.format(number=number)], cwd=ROOT, timeout=30)
    assert ran.returncode == 0
