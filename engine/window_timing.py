"""How fast each choice runs the windows of a model: in turns, so that what else the machine does falls on all."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import psutil
from numpy.typing import NDArray

from engine.backends import Backend, BackendChoice, open_backend
from engine.bundle import Bundle
from engine.bundle_networks import network_of
from engine.errors import BackendFailed, BundleInvalid
from engine.memory import available_bytes

FloatArray = NDArray[np.float32]
Clock = Callable[[], float]

ROUNDS, MIN_ROUNDS = 7, 3
"""Runs of each window after one to warm up; fewer, but the second number, where time is up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TimedChoice:
    """Seconds are medians, for one window through one network of each configuration. `logits` (K, *patch) are what came
    out of it. `reason` says why there is nothing of it."""

    choice: BackendChoice
    version: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    logits: Mapping[str, FloatArray] = field(default_factory=dict)
    reason: str | None = None

    @property
    def seconds_per_window(self) -> float | None:
        """The mean over the configurations."""
        return statistics.fmean(self.seconds.values()) if self.seconds else None

    def seconds_per_position(self, bundle: Bundle, *, mirrored: bool) -> float | None:
        """All networks that one position of the window goes through: folds of all configurations, and as many mirrored
        passes as the subsets of their axes."""
        if not self.seconds:
            return None
        return sum(
            len(configuration.folds)
            * (2 ** len(configuration.mirror_axes) if mirrored else 1)
            * self.seconds[configuration.name]
            for configuration in bundle.configurations
        )


def time_choices(
    bundle: Bundle,
    choices: Sequence[BackendChoice],
    windows: Mapping[str, FloatArray],
    *,
    out_of_time: Callable[[], bool],
    clock: Clock,
    advance: Callable[[], None] = lambda: None,
) -> tuple[TimedChoice, ...]:
    """Each choice on the first fold of each configuration, in the order given. They are open together and run in turns,
    as far as memory allows; the rest follows. `advance` is called for each choice that was opened, and again for each
    that was timed."""
    found: list[TimedChoice] = []
    waiting = deque(choices)
    largest = 0
    while waiting:
        with ExitStack() as stack:
            opened: list[_Opened] = []
            # As much again as the largest has taken: a runtime takes more while it runs than when it was opened.
            while waiting and (not opened or available_bytes() > 2 * largest):
                before = _resident_bytes()
                opened.append(_Opened(bundle, waiting.popleft(), windows, stack))
                largest = max(largest, _resident_bytes() - before)
                advance()
            for number in range(ROUNDS):
                for candidate in opened:
                    candidate.run_once(clock)
                if number + 1 >= MIN_ROUNDS and out_of_time():
                    break
            for candidate in opened:
                found.append(candidate.figures())
                advance()
    return tuple(found)


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


class _Opened:
    """One choice, open on every configuration; what it raises ends it with the reason."""

    def __init__(
        self, bundle: Bundle, choice: BackendChoice, windows: Mapping[str, FloatArray], stack: ExitStack
    ) -> None:
        self._choice = choice
        self._windows = {name: np.repeat(window, choice.batch, axis=0) for name, window in windows.items()}
        self._backends: dict[str, Backend] = {}
        self._samples: dict[str, list[float]] = {name: [] for name in windows}
        self._logits: dict[str, FloatArray] = {}
        self._version = ""
        self._reason: str | None = None
        try:
            for configuration in bundle.configurations:
                backend = open_backend(network_of(bundle, configuration, configuration.folds[0]), choice)
                stack.callback(backend.close)
                self._backends[configuration.name] = backend
                self._version = backend.version
                answer = backend.run(self._windows[configuration.name])[0]
                if not np.isfinite(answer).all():
                    raise BackendFailed(f"{choice} gives values that are not finite")
                self._logits[configuration.name] = answer
        except (BackendFailed, BundleInvalid) as error:
            self._reason = str(error)

    def run_once(self, clock: Clock) -> None:
        if self._reason is not None:
            return
        try:
            for name, backend in self._backends.items():
                began = clock()
                backend.run(self._windows[name])
                self._samples[name].append((clock() - began) / self._choice.batch)
        except BackendFailed as error:
            self._reason = str(error)

    def figures(self) -> TimedChoice:
        if self._reason is not None:
            return TimedChoice(choice=self._choice, version=self._version, reason=self._reason)
        return TimedChoice(
            choice=self._choice,
            version=self._version,
            seconds=MappingProxyType({name: statistics.median(times) for name, times in self._samples.items()}),
            logits=MappingProxyType(self._logits),
        )
