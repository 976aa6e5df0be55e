"""torch.compile where it pays: the network of a training, as it is or compiled, whichever is faster (torch).

A compiler costs a minute and may fail for a reason of the machine's (no C compiler, an old driver), so the gain is
measured on the training's own steps, and a failure costs one line of the log.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Compile = Literal["auto", "on", "off"]
Forward = Callable[[Tensor], Any]

MIN_GAIN = 0.05
"""Part of a step's time that compilation must save."""
_WARM_UP = 3  # the first steps look for the fastest convolutions and fill the allocator
_TIMED = 10


def resolved(wanted: Compile, device: torch.device, *, deterministic: bool) -> Compile:
    """`auto` is off on a processor, where a compiled step was slower; deterministic mode never compiles, since that
    changes how sums are formed."""
    if deterministic or (wanted == "auto" and device.type != "cuda"):
        return "off"
    return wanted


class ChosenForward:
    """A network's forward pass in training. `auto` times `_TIMED` steps as the network is and as many compiled, and
    keeps what is faster; `on` compiles at the first step; `off` never does.

    The network itself stays as it is: its state dict has its own names, and what is not a training step uses it
    directly.
    """

    def __init__(
        self,
        network: nn.Module,
        mode: Compile,
        *,
        note: Callable[[str], None] = lambda _text: None,
        compile_network: Callable[[nn.Module], Forward] = torch.compile,
    ) -> None:
        self._network: Forward = network
        self._compile: Callable[[], Forward] = lambda: compile_network(network)
        self._note = note
        self._forward: Forward = network
        self._steps_s: list[float] = []
        self._eager_s: float | None = None
        self._is_settled = mode == "off"
        self._at_once = mode == "on"

    def __call__(self, images: Tensor) -> Any:
        return self._forward(images)

    @property
    def is_compiled(self) -> bool:
        return self._forward is not self._network

    @property
    def is_settled(self) -> bool:
        """Whether what is in use now stays in use."""
        return self._is_settled

    def before_step(self, rehearse: Callable[[Forward], None]) -> None:
        """To be called before each step. `rehearse` runs a forward pass it is given, and backward, without a trace in
        the training: that is when compilation happens, and fails."""
        if self._is_settled or not (self._at_once or len(self._steps_s) == _WARM_UP + _TIMED):
            return
        if self.is_compiled:
            self._decide()
            return
        self._eager_s = statistics.median(self._steps_s[_WARM_UP:]) if self._steps_s else None
        self._steps_s = []
        try:
            forward = self._compile()
            rehearse(forward)
        except (RuntimeError, ImportError, OSError) as error:
            self._is_settled = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._note(f"torch.compile failed, the network runs as it is: {reason[:200]}")
            return
        self._forward, self._is_settled = forward, self._at_once
        if self._at_once:
            self._note("torch.compile: the network is compiled")

    def after_step(self, seconds: float) -> None:
        """To be called after each step, with what it took."""
        if not self._is_settled:
            self._steps_s.append(seconds)

    def _decide(self) -> None:
        compiled_s, eager_s = statistics.median(self._steps_s[_WARM_UP:]), self._eager_s or 0.0
        pays = compiled_s < (1 - MIN_GAIN) * eager_s
        if not pays:
            self._forward = self._network
        self._is_settled = True
        self._note(
            f"torch.compile: {compiled_s:.4f} s a step, {eager_s:.4f} s without; "
            f"{'the network is compiled' if pays else 'the network runs as it is'}"
        )
