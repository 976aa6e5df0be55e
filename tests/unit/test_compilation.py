"""engine.compilation: compiled where it proves faster, and a compiler that fails costs one line of the log."""
# ruff: noqa: E402

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch
from torch import Tensor, nn

from engine.compilation import ChosenForward, Compile, Forward, resolved
from engine.training import Trainer
from tests.support.tiny_training import same_weights, tiny_setup, weights

STEPS = 30


class Steps:
    """Steps whose time is that of the forward pass in use: `eager_s`, or `compiled_s` once compiled."""

    def __init__(self, mode: Compile, *, compiled_s: float = 1.0, fails: Exception | None = None) -> None:
        self.network = nn.Linear(2, 2)
        self.notes: list[str] = []
        self.compiled = 0
        self.rehearsed = 0
        self._compiled_s, self._fails = compiled_s, fails
        self.forward = ChosenForward(self.network, mode, note=self.notes.append, compile_network=self._compile)

    def _compile(self, network: nn.Module) -> Forward:
        self.compiled += 1

        def forward(images: Tensor) -> Any:
            if self._fails is not None:
                raise self._fails
            return network(images)

        return forward

    def _rehearse(self, forward: Forward) -> None:
        self.rehearsed += 1
        forward(torch.zeros(1, 2))

    def run(self, count: int = STEPS) -> list[bool]:
        """Whether each step was compiled."""
        seen = []
        for _ in range(count):
            self.forward.before_step(self._rehearse)
            seen.append(self.forward.is_compiled)
            self.forward(torch.zeros(1, 2))
            self.forward.after_step(self._compiled_s if self.forward.is_compiled else 1.0)
        return seen


def test_a_compiled_network_that_is_faster_is_kept() -> None:
    steps = Steps("auto", compiled_s=0.9)
    seen = steps.run()
    assert seen == [False] * 13 + [True] * (STEPS - 13)
    assert steps.notes == ["torch.compile: 0.9000 s a step, 1.0000 s without; the network is compiled"]
    assert (steps.compiled, steps.rehearsed) == (1, 1)


@pytest.mark.parametrize("compiled_s", [0.96, 1.4])
def test_one_that_gains_less_than_a_twentieth_is_left_out(compiled_s: float) -> None:
    steps = Steps("auto", compiled_s=compiled_s)
    seen = steps.run()
    assert seen == [False] * 13 + [True] * 13 + [False] * (STEPS - 26)
    assert steps.notes == [f"torch.compile: {compiled_s:.4f} s a step, 1.0000 s without; the network runs as it is"]


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to find C compiler.\nPlease specify via CC"), ImportError("no triton"), OSError("disk full")],
)
def test_a_compiler_that_fails_costs_one_line(mode: Compile, error: Exception) -> None:
    steps = Steps(mode, fails=error)
    assert not any(steps.run())
    first_line = str(error).splitlines()[0]
    assert steps.notes == [f"torch.compile failed, the network runs as it is: {first_line}"]
    assert steps.compiled == 1


def test_on_compiles_at_the_first_step_and_off_never() -> None:
    on, off = Steps("on", compiled_s=5.0), Steps("off")
    assert all(on.run())
    assert on.notes == ["torch.compile: the network is compiled"]
    assert not any(off.run())
    assert (off.compiled, off.notes) == (0, [])


@pytest.mark.parametrize(
    ("wanted", "device", "deterministic", "mode"),
    [
        ("auto", "cuda", False, "auto"),
        ("auto", "cpu", False, "off"),
        ("on", "cpu", False, "on"),
        ("off", "cuda", False, "off"),
        ("auto", "cuda", True, "off"),
        ("on", "cuda", True, "off"),
    ],
)
def test_auto_is_for_gpus_and_deterministic_mode_never_compiles(
    wanted: Compile, device: str, deterministic: bool, mode: Compile
) -> None:
    assert resolved(wanted, torch.device(device), deterministic=deterministic) == mode


def traced(network: nn.Module) -> Forward:
    """torch.compile as far as it traces the network, without a compiler of machine code."""
    forward: Forward = torch.compile(network, backend="eager")
    return forward


def test_a_compiled_training_is_the_same_training_and_its_checkpoint_has_the_networks_own_names(
    tmp_path: Path,
) -> None:
    setup = replace(tiny_setup(tmp_path), deterministic=False)
    plain, compiled = Trainer(setup, tmp_path / "plain"), Trainer(setup, tmp_path / "compiled")
    compiled._forward = ChosenForward(compiled.network, "on", compile_network=traced)
    source = plain.source("training")
    for iteration in range(3):
        batch = source.batch(0, iteration)
        assert compiled.step(batch) == pytest.approx(plain.step(batch), abs=1e-6)
    assert compiled._forward.is_compiled
    mine, theirs = weights(compiled), weights(plain)
    assert not any("_orig_mod" in name for name in mine)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-6)
    # The lowest output has no part in the loss: nothing changes its head, compiled or not.
    untrained = weights(Trainer(setup, tmp_path / "untrained"))
    lowest = {name: tensor for name, tensor in untrained.items() if ".seg_layers.0." in name}
    assert same_weights({name: mine[name] for name in lowest}, lowest)
