"""A tiny training (tests/support/tiny_training.py) in several processes, or what they say to each other; needs torch.

    python -m tests.support.tiny_processes train FOLDER CASE
    python -m tests.support.tiny_processes talk FOLDER -

Each is one process of several, which gateway/training_launcher.py or torchrun started.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.batches import Batch
from engine.errors import EngineError
from engine.schedule import Schedule
from engine.training import Trainer
from engine.training_processes import TrainingProcesses, joined_processes
from engine.training_setup import TrainingSetup
from gateway.training_launcher import leaves_at_once
from tests.support.nnunet_results import TrainedModel
from tests.support.tiny_training import TINY, tiny_setup

SCHEDULE = Schedule(epochs=2, iterations=4, validation_iterations=2)
MODELS: dict[str, tuple[TrainedModel, bool]] = {
    "labels": (TINY, False),
    "ignore label, batch Dice": (replace(TINY, labels={**TINY.labels, "ignore": 3}), True),
}
FAILED = 3
"""Exit code where the engine raised an error on purpose; standard error has its class and message."""


def setup_of(root: Path, name: str, **changes: Any) -> TrainingSetup:
    """A batch of three, which two processes cannot divide evenly."""
    model, batch_dice = MODELS[name]
    setup = tiny_setup(root, model, schedule=SCHEDULE, batch_dice=batch_dice, **changes)
    return replace(setup, configuration=replace(setup.configuration, batch_size=3))


class DyingTrainer(Trainer):
    """One process gets a signal in the middle of an epoch."""

    def __init__(self, *arguments: Any, rank: int, number: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._dies, self._number = self.processes.rank == rank, number

    def step(self, batch: Batch) -> float:
        if self._dies and self.iteration == 2:
            os.kill(os.getpid(), self._number)
        return super().step(batch)


def train(folder: Path, case: str, processes: TrainingProcesses) -> None:
    name, _, what = case.partition(":")
    setup = setup_of(folder, name, deterministic=what == "deterministic")
    if what in ("SIGKILL", "SIGSTOP"):
        number = signal.Signals[what].value
        trainer: Trainer = DyingTrainer(setup, folder / "fold_0", processes=processes, rank=1, number=number)
    else:
        trainer = Trainer(setup, folder / "fold_0", processes=processes)
    asked = iter(range(10**6))
    # The second process alone is told to stop.
    trainer.run(stop=lambda: what == "stop" and processes.rank == 1 and next(asked) >= 2)
    print(f"{processes.rank} at {trainer.epoch} {trainer.iteration}", flush=True)


def talk(processes: TrainingProcesses) -> None:
    rank, size = processes.rank, processes.size
    assert processes.gather({"rank": rank, "text": "é" * rank}) == [{"rank": r, "text": "é" * r} for r in range(size)]
    assert processes.on_first(lambda: [1.5, None, "first"] if rank == 0 else []) == [1.5, None, "first"]
    assert processes.first_number(float(rank) + 0.1) == 0.1
    assert processes.agreed(lambda: rank == size - 1)()
    assert not processes.agreed(lambda: False)()
    names = [f"case_{index}" for index in range(5)]
    assert processes.in_order(processes.gather(list(processes.part_of(names)))) == names
    total = torch.arange(3.0) * (rank + 1)
    processes.add_up(total)
    assert torch.equal(total, torch.arange(3.0) * sum(range(1, size + 1)))
    print("talked", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with leaves_at_once():
        verb, where, chosen = sys.argv[1:]
        try:
            with joined_processes(on_gpus=False, timeout_s=15.0 if "SIGSTOP" in chosen else 300.0) as joined:
                if verb == "talk":
                    talk(joined)
                else:
                    train(Path(where), chosen, joined)
        except EngineError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            sys.exit(FAILED)
