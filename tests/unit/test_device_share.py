"""gateway.device_share: who computes now, and with how much memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from gateway.device_share import DeviceShare, Turn
from gateway.durable import Stopped

URGENT, ROUTINE, SHADOW = 1, 100, 200


class Work:
    """An inference in a thread of its own: `windows` are passed when they are allowed, one by one."""

    def __init__(self, pool: ThreadPoolExecutor, share: DeviceShare, urgency: int, needed_bytes: int = 0) -> None:
        self.said: list[str] = []
        self.budget_bytes: int | None = None
        self.begun, self.waits = threading.Event(), threading.Event()
        self._share, self._urgency, self._needed = share, urgency, needed_bytes
        self._window = threading.Semaphore(0)
        self._passed = threading.Semaphore(0)
        self._windows: list[bool] = []
        self.done: Future[None] = pool.submit(self._run)

    def _run(self) -> None:
        with self._share.admitted(
            self._urgency, self._needed, rests=self._rests, goes_on=lambda: self.said.append("goes on")
        ) as turn:
            self.budget_bytes = turn.budget_bytes
            self.begun.set()
            while self._one(turn):
                pass

    def _one(self, turn: Turn) -> bool:
        assert self._window.acquire(timeout=10)
        if not self._windows.pop(0):
            return False
        turn.pass_on()
        self._passed.release()
        return True

    def _rests(self) -> None:
        self.said.append("rests")
        self.waits.set()

    def compute(self) -> None:
        """One window; returns at once, whether it is passed or rests."""
        self._windows.append(True)
        self._window.release()

    def has_passed(self) -> bool:
        return self._passed.acquire(timeout=10)

    def end(self) -> None:
        self._windows.append(False)
        self._window.release()
        self.done.result(timeout=10)


@pytest.fixture
def start() -> Callable[..., Work]:
    pool = ThreadPoolExecutor(8)
    return lambda *arguments: Work(pool, *arguments)


def test_a_routine_inference_rests_between_windows_while_an_urgent_one_is_at_work(start: Callable[..., Work]) -> None:
    share = DeviceShare()
    routine = start(share, ROUTINE)
    routine.compute()
    assert routine.has_passed()
    urgent = start(share, URGENT)
    assert urgent.begun.wait(10)
    routine.compute()
    assert routine.waits.wait(10)
    urgent.compute()
    assert urgent.has_passed()
    assert not routine.done.done()
    urgent.end()
    assert routine.has_passed()
    routine.end()
    assert (routine.said, urgent.said) == (["rests", "goes on"], [])


def test_what_is_as_urgent_runs_beside(start: Callable[..., Work]) -> None:
    share = DeviceShare()
    works = [start(share, ROUTINE) for _ in range(2)]
    for work in works:
        assert work.begun.wait(10)
        work.compute()
        assert work.has_passed()
    for work in works:
        work.end()
        assert work.said == []


def test_a_less_urgent_one_does_not_begin_beside_an_urgent_one(start: Callable[..., Work]) -> None:
    share = DeviceShare()
    urgent = start(share, URGENT)
    assert urgent.begun.wait(10)
    shadow = start(share, SHADOW)
    assert shadow.waits.wait(10)
    routine = start(share, ROUTINE)
    assert routine.waits.wait(10)
    assert not shadow.begun.is_set()
    urgent.end()
    assert routine.begun.wait(10)
    assert not shadow.begun.is_set()
    routine.end()
    assert shadow.begun.wait(10)
    shadow.end()


@pytest.mark.parametrize(
    ("budget_bytes", "free_bytes", "beside"), [(100, 0, True), (99, 1000, False), (None, 100, True), (None, 99, False)]
)
def test_one_whose_memory_does_not_fit_beside_the_other_waits_for_its_end(
    start: Callable[..., Work], budget_bytes: int | None, free_bytes: int, beside: bool
) -> None:
    share = DeviceShare(budget_bytes=budget_bytes, free_bytes=lambda: free_bytes)
    routine = start(share, ROUTINE, 60)
    assert routine.begun.wait(10)
    urgent = start(share, URGENT, 40)
    assert (urgent.begun if beside else urgent.waits).wait(10)
    if beside:
        assert urgent.budget_bytes == (None if budget_bytes is None else budget_bytes - 60)
    else:
        routine.compute()  # nothing urgent is at work yet, so it goes on
        assert routine.has_passed()
        assert not urgent.begun.is_set()
        routine.end()
        assert urgent.begun.wait(10)
        assert urgent.budget_bytes == budget_bytes
    urgent.end()
    if beside:
        routine.end()


def test_alone_it_is_admitted_however_much_it_needs(start: Callable[..., Work]) -> None:
    """Its own check refuses it then, with the figures."""
    work = start(DeviceShare(budget_bytes=10), ROUTINE, 1000)
    assert work.begun.wait(10)
    assert work.budget_bytes == 10
    work.end()


def test_of_two_that_wait_the_first_goes_first(start: Callable[..., Work]) -> None:
    share = DeviceShare(budget_bytes=100)
    first = start(share, ROUTINE, 100)
    assert first.begun.wait(10)
    large = start(share, ROUTINE, 60)
    assert large.waits.wait(10)
    small = start(share, ROUTINE, 1)
    assert small.waits.wait(10)
    assert not small.begun.is_set()
    first.end()
    for work in (large, small):
        assert work.begun.wait(10)
        work.end()


def test_what_fails_makes_room(start: Callable[..., Work]) -> None:
    share = DeviceShare(budget_bytes=100)
    with pytest.raises(ValueError, match="a network"), share.admitted(URGENT, 100):
        raise ValueError("a network")
    work = start(share, ROUTINE, 100)
    assert work.begun.wait(10)
    work.end()


def test_the_end_of_the_worker_lets_who_waits_go_and_who_computes_finish(start: Callable[..., Work]) -> None:
    share = DeviceShare()
    routine = start(share, ROUTINE)
    assert routine.begun.wait(10)
    urgent = start(share, URGENT)
    assert urgent.begun.wait(10)
    waiting = start(share, SHADOW)
    assert waiting.waits.wait(10)
    routine.compute()
    assert routine.waits.wait(10)
    share.close()
    for work in (routine, waiting):
        with pytest.raises(Stopped):
            work.done.result(timeout=10)
    urgent.compute()
    assert urgent.has_passed()
    urgent.end()
    with pytest.raises(Stopped):
        start(share, URGENT).done.result(timeout=10)
