"""gateway.stop_signal: a signal is noticed, at whatever moment it arrives."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from gateway.stop_signal import StopRequested, raised_when_stopped, stop_requests
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


def test_the_first_signal_is_a_request_and_the_second_what_it_was() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.wait(10)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_work_that_looks_at_no_event_is_left_by_an_exception_that_no_handler_of_errors_takes() -> None:
    stop, reached = threading.Event(), []
    with pytest.raises(StopRequested), raised_when_stopped(stop):  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGINT)
        except Exception:  # noqa: BLE001
            reached.append("handler")
        reached.append("went on")
    assert stop.wait(10)
    assert reached == []
    with pytest.raises(StopRequested), raised_when_stopped(stop):
        reached.append("begun after a request")
    assert reached == []
