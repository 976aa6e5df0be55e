"""A training that is judged on whole cases of a hold-out ends when these get no better, and keeps its best weights."""
# ruff: noqa: E402

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch
from torch import nn

from engine.batches import Batch
from engine.errors import TrainingRefused
from engine.metrics import CompositeScore
from engine.schedule import Schedule
from engine.training import Trainer
from engine.training_checkpoint import BEST, FINAL, LATEST, read_state
from engine.training_log import EpochRecord, best_judged, epochs_without_gain
from engine.training_setup import TrainingSetup
from tests.support.tiny_training import same_weights, tiny_setup, weights


class Clock:
    """In the place of the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


class Ticking(Trainer):
    """A step takes a second of `clock`."""

    clock: Clock

    def step(self, batch: Batch) -> float:
        self.clock.now += 1.0
        return super().step(batch)


DICE = (0.5, 0.8, 0.7, 0.6, 0.9, 0.9)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> TrainingSetup:
    schedule = Schedule(epochs=6, iterations=1, validation_iterations=1, patience=2)
    return tiny_setup(tmp_path_factory.mktemp("tiny"), schedule=schedule)


def whole(dice: float | None) -> CompositeScore:
    return CompositeScore(dice=dice, hd95_mm=None if dice is None else 5.0, surface_dice=dice)


def scripted(dice: Sequence[float | None]) -> Callable[[nn.Module, int], CompositeScore | None]:
    return lambda _network, epoch: whole(dice[epoch])


def record(epoch: int, dice: float | None) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        learning_rate=0.01,
        train_loss=0.0,
        validation_loss=0.0,
        dice_per_class=(0.5,),
        mean_dice=0.5,
        ema_dice=0.5,
        seconds=1.0,
        hold_out=None if dice is None else whole(dice),
    )


@pytest.mark.requirement("ART-10")
def test_a_training_ends_when_its_patience_does_and_its_final_weights_are_the_best(
    tmp_path: Path, setup: TrainingSetup
) -> None:
    trainer = Trainer(setup, tmp_path)
    at_best: dict[str, torch.Tensor] = {}

    def judge(network: nn.Module, epoch: int) -> CompositeScore | None:
        if epoch == 1:
            at_best.update(weights(trainer))
        return scripted(DICE)(network, epoch)

    assert trainer.run(judge=judge)
    assert [r.hold_out and r.hold_out.dice for r in trainer.records] == [0.5, 0.8, 0.7, 0.6]
    assert trainer.records[1].score == pytest.approx(0.7 * 0.2 + 0.3 * 0.5)
    assert read_state(tmp_path / BEST).epoch == 2
    assert same_weights(read_state(tmp_path / FINAL).weights, at_best)
    assert same_weights(weights(trainer), at_best)
    again = Trainer(setup, tmp_path)
    assert again.is_finished
    assert again.records == trainer.records


def test_a_judged_training_that_was_stopped_goes_on_with_the_scores_it_had(
    tmp_path: Path, setup: TrainingSetup
) -> None:
    asked: list[int] = []

    def judge(network: nn.Module, epoch: int) -> CompositeScore | None:
        asked.append(epoch)
        return scripted(DICE)(network, epoch)

    stopped = Trainer(setup, tmp_path / "stopped")
    assert not stopped.run(judge=judge, stop=lambda: len(asked) >= 3)
    assert [r.epoch for r in stopped.records] == [0, 1]
    assert (tmp_path / "stopped" / LATEST).exists()
    resumed = Trainer(setup, tmp_path / "stopped")
    assert resumed.run(judge=judge)
    assert asked == [0, 1, 2, 2, 3]
    whole_run = Trainer(setup, tmp_path / "whole")
    assert whole_run.run(judge=scripted(DICE))
    assert same_weights(weights(resumed), weights(whole_run))


def test_a_hold_out_without_any_score_ends_with_the_last_weights(tmp_path: Path, setup: TrainingSetup) -> None:
    trainer = Trainer(replace(setup, schedule=replace(setup.schedule, epochs=2)), tmp_path)
    assert trainer.run(judge=scripted([None, None]))
    assert not (tmp_path / BEST).exists()
    assert same_weights(read_state(tmp_path / FINAL).weights, weights(trainer))


def test_the_best_checkpoint_of_another_training_is_never_taken(tmp_path: Path, setup: TrainingSetup) -> None:
    assert Trainer(replace(setup, seed=8), tmp_path / "other").run(judge=scripted(DICE))
    folder = tmp_path / "fold_0"
    folder.mkdir()
    shutil.copy(tmp_path / "other" / BEST, folder)
    trainer = Trainer(replace(setup, schedule=replace(setup.schedule, epochs=2)), folder)
    assert trainer.run(judge=scripted([None, None]))
    assert same_weights(read_state(folder / FINAL).weights, weights(trainer))
    assert not (folder / BEST).exists()


def test_a_best_checkpoint_that_was_exchanged_meanwhile_is_refused_and_the_latest_stays(
    tmp_path: Path, setup: TrainingSetup
) -> None:
    assert Trainer(replace(setup, seed=8), tmp_path / "other").run(judge=scripted(DICE))
    trainer = Trainer(setup, tmp_path / "fold_0")

    def judge(network: nn.Module, epoch: int) -> CompositeScore | None:
        if epoch == 3:
            shutil.copy(tmp_path / "other" / BEST, tmp_path / "fold_0")
        return scripted(DICE)(network, epoch)

    with pytest.raises(TrainingRefused, match=r"checkpoint_best\.pth is of another training \(seed: 8 then, 7 now\)"):
        trainer.run(judge=judge)
    assert {path.name for path in (tmp_path / "fold_0").iterdir()} == {BEST, LATEST}


@pytest.mark.parametrize("iterations", [10, 100_000])
def test_a_budget_keeps_time_for_the_hold_out(
    tmp_path: Path, setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch, iterations: int
) -> None:
    """With epochs that are short beside the budget and with one that is longer. By a clock that only steps (1 s) and
    judgements (20 s, as said before) move."""
    clock = Clock()
    monkeypatch.setattr("engine.training.time", clock)
    schedule = Schedule(epochs=1000, iterations=iterations, validation_iterations=1, budget_s=100.0)
    trainer = Ticking(replace(setup, schedule=schedule, deterministic=False), tmp_path, save_every_s=1e9)
    trainer.clock = clock

    def judge(_network: nn.Module, _epoch: int) -> CompositeScore | None:
        clock.now += 20.0
        return whole(0.5)

    assert trainer.run(judge=judge, judge_batches=40)
    assert 80 <= sum(record.seconds for record in trainer.records) <= 101
    assert trainer.records[-1].hold_out is not None


def test_epochs_that_were_not_judged_count_for_the_patience_and_are_never_best() -> None:
    records = [record(0, None), record(1, 0.6), record(2, None), record(3, 0.6), record(4, None)]
    assert best_judged(records) is records[1]
    assert epochs_without_gain(records) == 3
    assert epochs_without_gain(records[:1]) == 0
