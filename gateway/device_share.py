"""How the inferences of one worker share its device and memory: urgent ones first, between two windows.

An inference is admitted when nothing more urgent is at work or waits, and its estimated memory fits beside that of
those at work; alone it is always admitted, and its own check decides. From then on it passes its turn on between
windows: while a more urgent one is at work, it rests where it is and keeps what it has computed (QUE-31). Inferences of
one urgency run side by side, as many as the settings allow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from engine.memory import available_bytes
from gateway.durable import Stopped

_Hook = Callable[[], object]


@dataclass(eq=False, kw_only=True)
class Turn:
    """One inference that is at work. `budget_bytes`: the memory that it may use, None for what is free."""

    urgency: int  # less is more urgent
    needed_bytes: int
    number: int
    budget_bytes: int | None = None
    share: DeviceShare = field(repr=False)
    rests: _Hook
    goes_on: _Hook

    def pass_on(self) -> None:
        """To be called between two windows: returns when nothing more urgent is at work. Raises Stopped where the
        worker ends meanwhile, and what `goes_on` raises."""
        self.share._rest(self)


class DeviceShare:
    """`budget_bytes`: the memory that all inferences of this process may use together, None for what is free."""

    def __init__(self, *, budget_bytes: int | None = None, free_bytes: Callable[[], int] = available_bytes) -> None:
        self._budget_bytes = budget_bytes
        self._free_bytes = free_bytes
        self._changed = threading.Condition()
        self._waiting: list[Turn] = []
        self._at_work: list[Turn] = []
        self._numbers = count()
        self._is_closed = False

    @contextmanager
    def admitted(
        self, urgency: int, needed_bytes: int, *, rests: _Hook = lambda: None, goes_on: _Hook = lambda: None
    ) -> Iterator[Turn]:
        """A turn, as soon as it may begin. `rests` is told when it has to wait, `goes_on` when that is over. Raises
        Stopped where the worker ends meanwhile."""
        turn = Turn(
            urgency=urgency,
            needed_bytes=needed_bytes,
            number=next(self._numbers),
            share=self,
            rests=rests,
            goes_on=goes_on,
        )
        with self._changed:
            self._waiting.append(turn)
        try:
            self._wait(turn, self._may_begin, lambda: self._begin(turn))
            yield turn
        finally:
            with self._changed:
                for turns in (self._waiting, self._at_work):
                    if turn in turns:
                        turns.remove(turn)
                self._changed.notify_all()

    def close(self) -> None:
        """The worker ends: whoever waits or rests is let go with Stopped, and nothing begins any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _rest(self, turn: Turn) -> None:
        self._wait(turn, self._may_go_on, lambda: None)

    def _begin(self, turn: Turn) -> None:
        turn.budget_bytes = self._left(turn)
        self._waiting.remove(turn)
        self._at_work.append(turn)

    def _wait(self, turn: Turn, may: Callable[[Turn], bool], then: Callable[[], None]) -> None:
        with self._changed:
            if may(turn):
                return then()
        turn.rests()
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or may(turn))
            if not may(turn):
                raise Stopped
            then()
        turn.goes_on()

    def _may_go_on(self, turn: Turn) -> bool:
        return all(other.urgency >= turn.urgency for other in self._at_work)

    def _may_begin(self, turn: Turn) -> bool:
        before = (turn.urgency, turn.number)
        if self._is_closed or any(other.urgency < turn.urgency for other in self._at_work):
            return False
        if any((other.urgency, other.number) < before for other in self._waiting):
            return False
        if not self._at_work:
            return True
        left = self._left(turn)
        return turn.needed_bytes <= (self._free_bytes() - self._taken(turn) if left is None else left)

    def _left(self, turn: Turn) -> int | None:
        return None if self._budget_bytes is None else self._budget_bytes - self._taken(turn)

    def _taken(self, turn: Turn) -> int:
        """By the others, at their peak: what they use of it already is counted twice where no budget is set."""
        return sum(other.needed_bytes for other in self._at_work if other is not turn)
