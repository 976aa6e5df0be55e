"""A training that is judged on whole cases of a hold-out ends when these get no better, and keeps its best weights."""
# ruff: noqa: E402

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch
from torch import nn

from engine.metrics import CompositeScore
from engine.schedule import Schedule
from engine.training import Trainer, TrainingSetup
from engine.training_checkpoint import BEST, FINAL, LATEST, read_state
from engine.training_log import EpochRecord, best_judged, epochs_without_gain
from tests.support.tiny_training import same_weights, tiny_setup, weights

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


def test_epochs_that_were_not_judged_count_for_the_patience_and_are_never_best() -> None:
    records = [record(0, None), record(1, 0.6), record(2, None), record(3, 0.6), record(4, None)]
    assert best_judged(records) is records[1]
    assert epochs_without_gain(records) == 3
    assert epochs_without_gain(records[:1]) == 0
