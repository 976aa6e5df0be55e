"""engine.training: what a training gives is decided by its setup alone, however often it was stopped."""
# ruff: noqa: E402

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.peers import ROOT, require_peer

require_peer("torch")

import torch

from engine.batches import Batch
from engine.errors import TrainingDiverged, TrainingRefused
from engine.schedule import Schedule
from engine.training import Trainer
from engine.training_checkpoint import BEST, FINAL, LATEST, read_state
from engine.training_log import EpochRecord
from engine.training_setup import TrainingSetup, default_precision
from tests.support.nnunet_results import TrainedModel
from tests.support.raw_datasets import write_array
from tests.support.tiny_training import CASES, SCHEDULE, TINY, same_weights, tiny_setup, weights

STEPS = SCHEDULE.epochs * SCHEDULE.iterations


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> TrainingSetup:
    return tiny_setup(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def uninterrupted(setup: TrainingSetup, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    torch.set_num_threads(1)
    trainer = Trainer(setup, tmp_path_factory.mktemp("fold_0"))
    assert trainer.run()
    return trainer


def after(calls: int) -> Callable[[], bool]:
    """A `stop` that says so at its `calls`-th question."""
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= calls


def without_time(trainer: Trainer) -> list[EpochRecord]:
    return [replace(record, seconds=0.0) for record in trainer.records]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_two_deterministic_trainings_give_the_same_weights_bit_for_bit(
    tmp_path: Path, setup: TrainingSetup, precision: str
) -> None:
    setup = replace(setup, precision=precision)  # type: ignore[arg-type]
    trainers = [Trainer(setup, tmp_path / name) for name in ("one", "two")]
    started = weights(trainers[0])
    for trainer in trainers:
        assert trainer.run()
    assert same_weights(weights(trainers[0]), weights(trainers[1]))
    assert not same_weights(weights(trainers[0]), started)
    assert without_time(trainers[0]) == without_time(trainers[1])


def test_another_seed_gives_other_weights(tmp_path: Path, setup: TrainingSetup, uninterrupted: Trainer) -> None:
    other = Trainer(replace(setup, seed=8), tmp_path)
    assert not same_weights(weights(other), weights(Trainer(setup, tmp_path / "untrained")))
    assert other.run()
    assert not same_weights(weights(other), weights(uninterrupted))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_loader_threads_changes_nothing(
    tmp_path: Path, setup: TrainingSetup, uninterrupted: Trainer, threads: int
) -> None:
    trainer = Trainer(replace(setup, loader_threads=threads), tmp_path)
    assert trainer.run()
    assert same_weights(weights(trainer), weights(uninterrupted))


# In the first epoch, between two epochs, in an epoch's validation.
@pytest.mark.parametrize("calls", [3, SCHEDULE.iterations + SCHEDULE.validation_iterations + 1, 9 + 2])
def test_a_training_stopped_and_resumed_is_that_which_was_not(
    tmp_path: Path, setup: TrainingSetup, uninterrupted: Trainer, calls: int
) -> None:
    assert not Trainer(setup, tmp_path).run(stop=after(calls))
    assert (tmp_path / LATEST).exists()
    assert not (tmp_path / FINAL).exists()
    resumed = Trainer(setup, tmp_path)
    assert resumed.run()
    assert same_weights(weights(resumed), weights(uninterrupted))
    assert without_time(resumed) == without_time(uninterrupted)
    assert {path.name for path in tmp_path.iterdir()} == {BEST, FINAL}


def test_a_finished_training_does_nothing_when_run_again(uninterrupted: Trainer, setup: TrainingSetup) -> None:
    written = (uninterrupted.folder / FINAL).stat().st_mtime_ns
    again = Trainer(setup, uninterrupted.folder)
    assert again.is_finished
    assert again.run(stop=lambda: pytest.fail("it trains"))
    assert again.records == uninterrupted.records
    assert (uninterrupted.folder / FINAL).stat().st_mtime_ns == written


def test_a_training_killed_at_any_moment_ends_with_the_same_weights(tmp_path: Path, uninterrupted: Trainer) -> None:
    """In another process, which saves after every step, killed four times without a warning."""
    tiny_setup(tmp_path)
    draw = random.Random(int(os.environ.get("PYTEST_SEED", "20")))
    command = [sys.executable, "-m", "tests.support.tiny_training", str(tmp_path), "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    places: list[str] = []
    for kill in (True, True, True, True, False):
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for steps, line in enumerate(process.stdout):
                places.append(line.strip())
                if kill and steps >= 1:
                    # Somewhere in the step, its checkpoint, a validation or the next step.
                    time.sleep(draw.uniform(0, 0.05))
                    process.send_signal(signal.SIGKILL)
                    break
            process.stdout.read()
            assert process.wait(timeout=60) == (-signal.SIGKILL if kill else 0)
    resumed_at = [places[index] for index in range(len(places)) if places.count(places[index]) > 1]
    assert len(set(places)) == STEPS
    assert len(resumed_at) < STEPS, "it began anew each time"
    state = read_state(tmp_path / "fold_0" / FINAL)
    assert same_weights(dict(state.weights), weights(uninterrupted))


def test_another_number_of_threads_is_refused_in_deterministic_mode(tmp_path: Path, setup: TrainingSetup) -> None:
    Trainer(setup, tmp_path / "strict").run(stop=after(2))
    free = replace(setup, deterministic=False)
    Trainer(free, tmp_path / "free").run(stop=after(2))
    torch.set_num_threads(2)
    with pytest.raises(TrainingRefused, match=r"trained with 1 thread\(s\); deterministic mode needs as many again"):
        Trainer(setup, tmp_path / "strict")
    assert Trainer(free, tmp_path / "free").iteration == 1


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 9}, "seed"),
        ({"batch_dice": True}, "plans"),
        ({"training_cases": CASES[2:]}, "training cases"),
        ({"schedule": replace(SCHEDULE, learning_rate=0.001)}, "learning rate"),
        ({"precision": "bf16"}, "precision"),
        ({"deterministic": False}, "deterministic"),
    ],
)
def test_another_training_in_the_same_folder_is_refused_with_what_differs(
    tmp_path: Path, setup: TrainingSetup, changes: dict[str, object], key: str
) -> None:
    Trainer(setup, tmp_path).run(stop=after(2))
    kept = (tmp_path / LATEST).read_bytes()
    with pytest.raises(TrainingRefused, match=f"of another training \\({key}: .*train into another folder"):
        Trainer(replace(setup, **changes), tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / LATEST).read_bytes() == kept


def test_a_half_trained_fold_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path)
    Trainer(setup, tmp_path / "fold_0").run(stop=after(2))
    label = tmp_path / "raw" / "Dataset901_Tiny" / "labelsTr" / f"{CASES[1]}.nii.gz"
    labels = np.zeros((10, 16, 18), dtype=np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    write_array(label, labels, (1.0, 1.0, 1.0))
    with pytest.raises(TrainingRefused, match="of another training \\(training data: "):
        Trainer(tiny_setup(tmp_path), tmp_path / "fold_0")


def test_a_training_goes_on_in_a_copy_of_everything_made_anew(tmp_path: Path) -> None:
    """Other paths, other times, preprocessed again."""
    here, there = tmp_path / "here", tmp_path / "there"
    Trainer(tiny_setup(here), here / "fold_0").run(stop=after(2))
    for name in ("raw", "fold_0"):
        shutil.copytree(here / name, there / name, copy_function=shutil.copyfile)
    assert Trainer(tiny_setup(there), there / "fold_0").iteration == 1


class Patient(Trainer):
    """Steps that cost time."""

    def step(self, batch: Batch) -> float:
        time.sleep(0.02)
        return super().step(batch)


@pytest.mark.parametrize("iterations", [5, 100_000])
def test_a_budget_of_time_is_kept_and_the_rate_falls_to_zero_in_it(
    tmp_path: Path, setup: TrainingSetup, iterations: int
) -> None:
    """With epochs far shorter than the budget, and with one that is far longer."""
    budget_s = 3.0
    schedule = Schedule(epochs=1000, iterations=iterations, validation_iterations=2, budget_s=budget_s)
    trainer = Patient(replace(setup, schedule=schedule, deterministic=False), tmp_path)
    started = time.monotonic()
    assert trainer.run()
    assert 0.5 * budget_s < time.monotonic() - started < 1.5 * budget_s
    rates = [record.learning_rate for record in trainer.records]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.15 * schedule.learning_rate
    assert trainer.records[-1].validation_loss is not None
    assert (tmp_path / FINAL).exists()


def test_a_stop_after_the_last_step_of_a_budget_leaves_its_epoch_to_be_validated(
    tmp_path: Path, setup: TrainingSetup
) -> None:
    schedule = Schedule(epochs=10, iterations=100_000, validation_iterations=2, budget_s=1.0)
    setup = replace(setup, schedule=schedule, deterministic=False)
    trainer = Patient(setup, tmp_path)
    assert not trainer.run(stop=lambda: not trainer.network.training)
    assert trainer.iteration > 1
    resumed = Trainer(setup, tmp_path)
    assert resumed.iteration == trainer.iteration
    assert resumed.progress() == 1
    assert resumed.run()
    assert [record.epoch for record in resumed.records] == [0]


def test_a_full_disk_leaves_the_last_checkpoint_valid(tmp_path: Path, setup: TrainingSetup) -> None:
    """No file may grow beyond 20 kB: that ends a write as a full disk does."""
    Trainer(setup, tmp_path).run(stop=after(3))
    kept = (tmp_path / LATEST).read_bytes()
    assert len(kept) > 20_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            Trainer(setup, tmp_path).run(stop=after(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [LATEST]
    assert (tmp_path / LATEST).read_bytes() == kept
    assert Trainer(setup, tmp_path).iteration == 2


def test_a_loss_that_is_not_finite_is_named_with_its_place_and_the_last_checkpoint_stays(
    tmp_path: Path, setup: TrainingSetup
) -> None:
    Trainer(setup, tmp_path).run(stop=after(3))
    kept = (tmp_path / LATEST).read_bytes()
    trainer = Trainer(setup, tmp_path)
    with torch.no_grad():
        next(trainer.network.parameters())[0] = torch.inf
    with pytest.raises(TrainingDiverged, match=r"epoch 0, iteration 2: the loss is nan.*lower learning rate"):
        trainer.run()
    assert (tmp_path / LATEST).read_bytes() == kept


REGIONS = replace(
    TINY,
    labels={"background": 0, "both": [1, 2], "inner": [2]},
    regions_class_order=(1, 2),
    heads=2,
)
VARIANTS = {
    "3d": TINY,
    "2d": replace(
        TINY,
        name="2d",
        dimensions=2,
        strides=((2, 2), (2, 2)),
        kernels=((3, 3),) * 3,
        patch_size=(12, 12),
        spacing=(1.0, 1.0),
    ),
    "regions": REGIONS,
    "ignore label": replace(TINY, labels={**TINY.labels, "ignore": 3}),
    "regions and ignore label": replace(REGIONS, labels={**REGIONS.labels, "ignore": 3}),
    "three channels": replace(TINY, channels=("T1", "T2", "CT")),
    "residual encoder": replace(TINY, network="ResidualEncoderUNet"),
    "two stages": replace(TINY, features=(4, 6), strides=((2, 2, 2),), kernels=((3, 3, 3),) * 2),
}


@pytest.mark.requirement("ART-07")
@pytest.mark.requirement("ART-08")
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_learns(tmp_path: Path, name: str, batch_dice: bool) -> None:
    model: TrainedModel = VARIANTS[name]
    schedule = Schedule(epochs=6, iterations=10, validation_iterations=3)
    trainer = Trainer(tiny_setup(tmp_path, model, schedule=schedule, batch_dice=batch_dice), tmp_path / "fold_0")
    assert trainer.run()
    first, last = trainer.records[0], trainer.records[-1]
    assert last.train_loss < first.train_loss - 0.15
    assert last.validation_loss < first.validation_loss - 0.05
    assert last.mean_dice > 0.3
    assert len(last.dice_per_class) == 2


def test_records_have_nnunets_moving_average_and_the_rate_of_the_schedule(uninterrupted: Trainer) -> None:
    records = uninterrupted.records
    assert [record.epoch for record in records] == [0, 1, 2]
    assert [r.learning_rate for r in records] == pytest.approx([0.01 * (1 - e / 3) ** 0.9 for e in range(3)])
    ema = records[0].mean_dice
    for record in records[1:]:
        ema = 0.9 * ema + 0.1 * record.mean_dice
        assert record.ema_dice == pytest.approx(ema)
    best = read_state(uninterrupted.folder / BEST)
    assert best.best_ema == max(record.ema_dice for record in records)


def test_bf16_on_a_processor_learns_what_float32_does(tmp_path: Path) -> None:
    """On any processor: bf16 is computed everywhere, fast or not. The training losses of all epochs are within 0.05 of
    each other; those of the end within 0.03, and its Dice within 0.02."""
    schedule = Schedule(epochs=14, iterations=12, validation_iterations=4)
    setup = tiny_setup(tmp_path, schedule=schedule)
    exact, half = (
        Trainer(replace(setup, precision="float32"), tmp_path / "float32"),
        Trainer(replace(setup, precision="bf16"), tmp_path / "bf16"),
    )
    assert exact.run()
    assert half.run()
    assert exact.records[-1].mean_dice > 0.85
    for one, other in zip(half.records, exact.records, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=0.05)
    last, expected = half.records[-1], exact.records[-1]
    assert last.train_loss == pytest.approx(expected.train_loss, abs=0.03)
    assert last.validation_loss == pytest.approx(expected.validation_loss, abs=0.03)
    assert last.mean_dice == pytest.approx(expected.mean_dice, abs=0.02)


def test_a_processor_trains_in_bf16_where_it_computes_in_it() -> None:
    assert default_precision(torch.device("cuda")) == "fp16"
    assert default_precision(torch.device("cpu")) in ("bf16", "float32")
