"""engine.compilation: compiled where it proves faster, and a compiler that fails costs one line of the log."""
# ruff: noqa: E402

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch
from torch import Tensor, nn

from engine.compilation import Compile, FastestGradients, Gradients, Way, resolved
from engine.step_gradients import Forward, StepGradients
from engine.training import Trainer
from tests.support.tiny_training import same_weights, tiny_setup, weights

BATCH = torch.zeros(1, 2), torch.zeros(1)
TRIAL = 13
"""Steps for which a way is tried."""


class Steps:
    """Steps that take what the way in use takes: 1 s as they are."""

    def __init__(self, *ways: tuple[str, float | Exception], wanted: bool = False) -> None:
        self.notes: list[str] = []
        self.prepared: list[str] = []
        self.seconds = {"as it is": 1.0, **{name: taken for name, taken in ways if isinstance(taken, float)}}
        self.found = FastestGradients(
            self.named("as it is"),
            [Way(name, self._preparation(name, taken), wanted=wanted) for name, taken in ways],
            note=self.notes.append,
        )

    def named(self, name: str) -> Gradients:
        return lambda images, labels: torch.tensor(self.seconds[name], dtype=torch.float64)

    def _preparation(self, name: str, taken: float | Exception) -> Callable[[Tensor, Tensor], Gradients]:
        def prepare(images: Tensor, labels: Tensor) -> Gradients:
            self.prepared.append(name)
            if isinstance(taken, Exception):
                raise taken
            return self.named(name)

        return prepare

    def run(self, count: int) -> list[str]:
        """The way of each step."""
        seen = []
        for _ in range(count):
            self.found.before_step(*BATCH)
            seen.append(self.found.name)
            taken = float(self.found(*BATCH))
            assert taken == self.seconds[self.found.name]  # what is named is what is computed
            self.found.after_step(taken)
        return seen


def test_a_way_that_is_faster_is_kept() -> None:
    steps = Steps(("compiled", 0.9))
    assert steps.run(2 * TRIAL + 5) == ["as it is"] * TRIAL + ["compiled"] * (TRIAL + 5)
    assert steps.notes == ["a step compiled takes 0.9000 s, as it is 1.0000 s: steps are compiled"]
    assert steps.prepared == ["compiled"]
    assert steps.found.is_settled


@pytest.mark.parametrize("taken", [0.96, 1.4])
def test_one_that_gains_less_than_a_twentieth_is_left_out(taken: float) -> None:
    steps = Steps(("compiled", taken))
    assert steps.run(2 * TRIAL + 5) == ["as it is"] * TRIAL + ["compiled"] * TRIAL + ["as it is"] * 5
    assert steps.notes == [f"a step compiled takes {taken:.4f} s, as it is 1.0000 s: steps are as it is"]
    assert steps.found.is_settled


def test_each_way_is_tried_against_the_best_one_before() -> None:
    steps = Steps(("compiled", 0.5), ("as a graph", 0.8), ("both", 0.3))
    tried = ["as it is", "compiled", "as a graph", "both"]
    assert steps.run(5 * TRIAL) == [name for name in tried for _ in range(TRIAL)] + ["both"] * TRIAL
    assert steps.notes[1:] == [
        "a step as a graph takes 0.8000 s, compiled 0.5000 s: steps are compiled",
        "a step both takes 0.3000 s, compiled 0.5000 s: steps are both",
    ]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to find C compiler.\nPlease specify via CC"), ImportError("no triton"), OSError("disk full")],
)
@pytest.mark.parametrize("wanted", [False, True])
def test_a_way_that_fails_costs_one_line_and_the_next_one_is_tried(error: Exception, wanted: bool) -> None:
    steps = Steps(("compiled", error), ("as a graph", 0.5), wanted=wanted)
    assert steps.run(3 * TRIAL)[-1] == "as a graph"
    assert steps.notes[0] == f"a step compiled failed, steps stay as it is: {str(error).splitlines()[0]}"
    assert steps.prepared == ["compiled", "as a graph"]
    assert steps.found.is_settled


def test_a_way_that_is_wanted_is_kept_from_the_first_step_on() -> None:
    steps = Steps(("compiled", 5.0), wanted=True)
    assert set(steps.run(TRIAL)) == {"compiled"}
    assert steps.notes == ["steps are compiled"]


@pytest.mark.parametrize(
    ("mode", "device", "alone", "names"),
    [
        ("off", "cuda", True, []),
        ("auto", "cuda", True, ["compiled", "as a CUDA graph", "compiled and as a CUDA graph"]),
        ("on", "cuda", True, ["compiled", "compiled and as a CUDA graph"]),
        ("auto", "cuda", False, ["compiled"]),
        ("on", "cpu", True, ["compiled"]),
    ],
)
def test_graphs_are_for_a_gpu_and_a_process_alone(mode: Compile, device: str, alone: bool, names: list[str]) -> None:
    ways = StepGradients(
        nn.Linear(2, 2),
        lambda outputs, labels: outputs[0],
        device=torch.device(device),
        precision="float32",
        memory_format=torch.contiguous_format,
        scaler=None,
    ).ways(mode, alone=alone)
    assert [way.name for way in ways] == names
    assert [way.wanted for way in ways] == [mode == "on" and way.name == "compiled" for way in ways]


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
    compiled._step._compile_network = traced
    compiled._gradients = FastestGradients(
        compiled._step.through(compiled.network), compiled._step.ways("on", alone=True)
    )
    source = plain.source("training")
    for iteration in range(3):
        batch = source.batch(0, iteration)
        assert compiled.step(batch) == pytest.approx(plain.step(batch), abs=1e-6)
    assert compiled._gradients.name == "compiled"
    mine, theirs = weights(compiled), weights(plain)
    assert not any("_orig_mod" in name for name in mine)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-6)
    # The lowest output has no part in the loss: nothing changes its head, compiled or not.
    untrained = weights(Trainer(setup, tmp_path / "untrained"))
    lowest = {name: tensor for name, tensor in untrained.items() if ".seg_layers.0." in name}
    assert same_weights({name: mine[name] for name in lowest}, lowest)
