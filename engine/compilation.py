"""The fastest of several ways to compute a training step's gradients, found by trying them in the training (torch).

A compiler costs a minute and may fail for a reason of the machine's (no C compiler, an old driver), and a CUDA graph
needs memory, so what they gain is measured on the training's own steps, and a failure costs one line of the log.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Compile = Literal["auto", "on", "off"]
Gradients = Callable[[Tensor, Tensor], Tensor]
"""Images and labels of a batch → its loss, 0-dim and without a graph; the gradients are the parameters' `grad`."""

MIN_GAIN = 0.05
"""Part of a step's time that a way must save."""
_WARM_UP = 3  # the first steps look for the fastest convolutions and fill the allocator
_TIMED = 10


def resolved(wanted: Compile, device: torch.device, *, deterministic: bool) -> Compile:
    """`auto` is off on a processor, where a compiled step was slower; deterministic mode never compiles, since that
    changes how sums are formed."""
    if deterministic or (wanted == "auto" and device.type != "cuda"):
        return "off"
    return wanted


@dataclass(frozen=True)
class Way:
    """`prepare` is given a batch and leaves no trace in the training; what it raises (RuntimeError, ImportError,
    OSError) is noted. A way that is `wanted` is kept without being timed against the one before."""

    name: str
    prepare: Callable[[Tensor, Tensor], Gradients]
    wanted: bool = False


class FastestGradients:
    """`plain` at first; then each of the ways in turn for a few steps, and it stays where it saves `MIN_GAIN` of the
    time of the best one before. `note` gets one line for each way."""

    def __init__(
        self, plain: Gradients, ways: Sequence[Way] = (), *, note: Callable[[str], None] = lambda _text: None
    ) -> None:
        self._compute = plain
        self._ways = deque(ways)
        self._note = note
        self.name = "as it is"
        self._best: tuple[Gradients, str, float] | None = None  # while another one is tried
        self._steps_s: list[float] = []

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._compute(images, labels)

    @property
    def is_settled(self) -> bool:
        """Whether what is in use now stays in use."""
        return not self._ways and self._best is None

    def before_step(self, images: Tensor, labels: Tensor) -> None:
        """To be called before each step with its batch: this is when the next way is prepared."""
        while self._ways and self._ways[0].wanted:
            self._prepare(self._ways.popleft(), images, labels)
        if self.is_settled or len(self._steps_s) < _WARM_UP + _TIMED:
            return
        taken_s = statistics.median(self._steps_s[_WARM_UP:])
        if self._best is not None:
            taken_s = self._decide(taken_s)
        self._steps_s = []
        while self._ways:
            best = (self._compute, self.name, taken_s)
            if self._prepare(self._ways.popleft(), images, labels):
                self._best = best
                return

    def after_step(self, seconds: float) -> None:
        """To be called after each step, with what it took."""
        if not self.is_settled:
            self._steps_s.append(seconds)

    def _prepare(self, way: Way, images: Tensor, labels: Tensor) -> bool:
        try:
            compute = way.prepare(images, labels)
        except (RuntimeError, ImportError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._note(f"a step {way.name} failed, steps stay {self.name}: {reason[:200]}")
            return False
        if way.wanted:
            self._note(f"steps are {way.name}")
        self._compute, self.name = compute, way.name
        return True

    def _decide(self, taken_s: float) -> float:
        """The seconds of the one that stays."""
        assert self._best is not None
        (compute, name, before_s), self._best = self._best, None
        pays = taken_s < (1 - MIN_GAIN) * before_s
        kept = self.name if pays else name
        self._note(f"a step {self.name} takes {taken_s:.4f} s, {name} {before_s:.4f} s: steps are {kept}")
        if pays:
            return taken_s
        self._compute, self.name = compute, name
        return before_s
