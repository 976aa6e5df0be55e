"""A training waits while the file `pause` is there, and ends as if it had not."""
# ruff: noqa: E402

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.batches import Batch
from engine.training import Trainer
from engine.training_checkpoint import FINAL, LATEST, read_state
from engine.training_pause import PAUSE, TrainingPause
from tests.support.tiny_training import SCHEDULE, same_weights, tiny_setup, weights
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_nothing_waits_where_nobody_asks(tmp_path: Path) -> None:
    pause = TrainingPause(tmp_path, note=lambda text: pytest.fail(text))
    pause.wait(lambda: False)
    assert abs(pause.now() - time.monotonic()) < 1


def test_the_clock_stands_still_while_it_waits_and_the_log_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    pause = TrainingPause(tmp_path, note=lines.append, poll_s=0.01)
    (tmp_path / PAUSE).touch()
    asked = iter(range(20))

    def stop() -> bool:
        if next(asked) == 10:
            (tmp_path / PAUSE).unlink()
        return False

    before, started = pause.now(), time.monotonic()
    pause.wait(stop)
    assert time.monotonic() - started >= 0.1
    assert pause.now() - before < (time.monotonic() - started) / 2
    assert [line.split()[0] for line in lines] == ["paused;", "paused"]


class Pausing(Trainer):
    """Asks itself to pause after some steps: in the middle of an epoch, or before its validation."""

    steps, pauses_after = 0, 3

    def step(self, batch: Batch) -> float:
        loss = super().step(batch)
        self.steps += 1
        if self.steps == self.pauses_after:
            (self.folder / PAUSE).touch()
        return loss


@pytest.mark.requirement("ART-21", open="whoever supervises the training writes the file")
@pytest.mark.parametrize("steps", [3, SCHEDULE.iterations])
def test_a_paused_training_has_a_checkpoint_and_ends_with_the_same_weights(tmp_path: Path, steps: int) -> None:
    setup = tiny_setup(tmp_path)
    undisturbed = Trainer(setup, tmp_path / "undisturbed")
    assert undisturbed.run()
    folder = tmp_path / "paused"
    lines: list[str] = []
    trainer = Pausing(setup, folder, note=lines.append, pause=TrainingPause(folder, note=lines.append, poll_s=0.01))
    trainer.pauses_after = steps
    running = threading.Thread(target=trainer.run)
    running.start()
    try:
        wait_until(lambda: lines, "the pause")
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 0.3, "a while of the pause")
        assert trainer.steps == steps
        state = read_state(folder / LATEST)
        assert (state.epoch, state.own["iteration"]) == (0, steps)
    finally:
        (folder / PAUSE).unlink(missing_ok=True)
        running.join(timeout=60)
    assert (folder / FINAL).exists()
    assert same_weights(weights(trainer), weights(undisturbed))


def test_a_pause_counts_neither_for_the_budget_nor_in_the_log(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path)
    folder = tmp_path / "fold_0"
    trainer = Pausing(setup, folder, pause=TrainingPause(folder, poll_s=0.01))
    began: list[float] = []

    def stop() -> bool:
        if (folder / PAUSE).exists():
            began.append(time.monotonic())
            if began[-1] - began[0] > 1.0:
                (folder / PAUSE).unlink()
        return False

    started = time.monotonic()
    assert trainer.run(stop=stop)
    assert sum(record.seconds for record in trainer.records) < time.monotonic() - started - 0.9


def test_a_stop_ends_a_pause(tmp_path: Path) -> None:
    folder = tmp_path / "fold_0"
    setup = tiny_setup(tmp_path)
    trainer = Pausing(setup, folder, pause=TrainingPause(folder, poll_s=0.01))
    assert not trainer.run(stop=lambda: (folder / PAUSE).exists())
    (folder / PAUSE).unlink()
    resumed = Trainer(setup, folder)
    assert (resumed.epoch, resumed.iteration) == (0, 3)
