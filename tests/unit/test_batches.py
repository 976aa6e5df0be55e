"""engine.batches: a batch is decided by seed and place, and what is wrong with a case reaches the trainer."""
# ruff: noqa: E402

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.augmentation import draw_batch
from engine.batches import Batch, BatchSource, BatchStream
from engine.errors import DatasetInvalid, TrainingRefused
from engine.stage_predictions import PreviousStage
from engine.training import Trainer
from engine.training_setup import TrainingSetup
from tests.support.tiny_training import CASES, TINY, same_weights, tiny_setup, weights


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    root = tmp_path_factory.mktemp("tiny")
    return Trainer(tiny_setup(root), root / "fold_0")


@pytest.fixture
def source(trainer: Trainer) -> BatchSource:
    return trainer.source("training")


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_batch_has_the_patch_of_the_plans_and_no_negative_label(source: BatchSource) -> None:
    images, labels = source.batch(0, 0)
    assert (images.shape, images.dtype) == ((2, 1, *TINY.patch_size), torch.float32)
    assert (labels.shape, labels.dtype) == ((2, *TINY.patch_size), torch.int16)
    assert labels.min() >= 0
    assert bool(torch.isfinite(images).all())


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_come_in_order_and_are_the_same_on_any_number_of_threads(source: BatchSource, threads: int) -> None:
    expected = [source.batch(2, iteration) for iteration in range(6)]
    with BatchStream(source, threads=threads) as stream:
        assert all(same(*pair) for pair in zip(stream.epoch(2, 6), expected, strict=True))
        # Resumed within the epoch.
        assert all(same(*pair) for pair in zip(stream.epoch(2, 6, first=4), expected[4:], strict=True))
    assert not same(expected[0], expected[1])
    assert not same(expected[0], source.batch(3, 0))


def test_each_process_of_several_makes_its_part_of_the_batch(source: BatchSource) -> None:
    whole = source.batch(0, 5)
    parts = [replace(source, samples=(sample,)).batch(0, 5) for sample in (0, 1)]
    assert same(whole, (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))


def test_validation_is_not_augmented(trainer: Trainer) -> None:
    source = trainer.source("validation")
    images, labels = source.batch(0, 0)
    # Values of the case itself, and the label where they belong.
    case = torch.from_numpy(source._open("case_00").image_CZYX[:, :, :, :].copy())
    assert bool(torch.isin(images[images != 0], case).all())
    assert images[0, 0][labels[0] > 0].mean() > images[0, 0][labels[0] == 0].mean()


def test_batches_are_made_ahead_but_only_so_many(source: BatchSource) -> None:
    made: list[int] = []
    third = Event()

    class Counting(BatchSource):
        def batch(self, epoch: int, iteration: int) -> Batch:
            made.append(iteration)
            if len(made) == 3:
                third.set()
            return super().batch(epoch, iteration)

    fields = {name: getattr(source, name) for name in BatchSource.__dataclass_fields__ if not name.startswith("_")}
    stream = BatchStream(Counting(**fields), threads=1, ahead=2)
    batches = stream.epoch(0, 100)
    next(batches)
    assert third.wait(timeout=30)
    batches.close()  # type: ignore[attr-defined]
    stream.close()
    assert made == [0, 1, 2]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_case_that_cannot_be_read_ends_the_training_with_its_name(source: BatchSource, threads: int) -> None:
    broken = replace(source, names=("case_09",) * 3)
    with BatchStream(broken, threads=threads) as stream, pytest.raises(DatasetInvalid, match="case_09"):
        list(stream.epoch(0, 3))


@pytest.mark.parametrize("value", [7, 300, -2])
def test_a_preprocessed_label_that_is_not_declared_ends_the_training_with_its_case(tmp_path: Path, value: int) -> None:
    setup = tiny_setup(tmp_path)
    source = Trainer(setup, tmp_path / "fold_0").source("training")
    for name in CASES:
        path = setup.folder / f"{name}_seg.npy"
        np.save(path, np.full_like(np.load(path), value))
    with pytest.raises(DatasetInvalid, match=rf"case_0\d: holds label {value}; declared are 0 to 2"):
        source.batch(0, 0)
    with pytest.raises(DatasetInvalid, match=rf"case_0\d: holds label {value}; declared are 0 to 2"):
        source.label_patch(epoch=0, iteration=0, sample=0)


def test_another_number_of_channels_is_refused(source: BatchSource) -> None:
    with pytest.raises(DatasetInvalid, match=r"1 channel\(s\) where the network takes 2; preprocess the dataset"):
        replace(source, channels=2).batch(0, 0)


def test_a_dataset_of_many_cases_does_not_use_up_the_open_files(
    source: BatchSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.batches._OPEN_CASES", 1)
    narrow = replace(source)
    before = _files_open_in(narrow.folder)
    for iteration in range(12):
        narrow.batch(0, iteration)
        assert _files_open_in(narrow.folder) <= before + 2


def _files_open_in(folder: Path) -> int:
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder))
    return found


def _cascade(root: Path, *, exchanged: bool = False) -> TrainingSetup:
    """A cascade whose previous stage found the labels as they are, or each in the other's place."""
    setup = tiny_setup(root)
    folder = root / ("exchanged" if exchanged else "found")
    folder.mkdir(exist_ok=True)
    for name in CASES:
        labels = np.maximum(np.load(setup.folder / f"{name}_seg.npy"), 0).astype(np.uint8)
        np.save(folder / f"{name}.npy", np.array([0, 2, 1], dtype=np.uint8)[labels] if exchanged else labels)
    plan = replace(setup.augmentation, previous_labels=(1, 2))
    return replace(setup, augmentation=plan, previous=PreviousStage(folder=folder, digest=folder.name))


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    root = tmp_path_factory.mktemp("cascade")
    return Trainer(_cascade(root), root / "fold_0")


def test_the_previous_stages_labels_are_read_with_the_images_bounds_and_turned_with_them(cascade: Trainer) -> None:
    """Where the previous stage found what is there, its channels are the target's labels, before and after rotation."""
    source, turned = cascade.source("training"), 0
    for iteration in range(12):
        images, target = source.batch(0, iteration)
        assert images.shape == (2, 3, *TINY.patch_size)
        draws = draw_batch(source.plan, 1, source.samples, seed=7, epoch=0, iteration=iteration)
        for sample, draw in enumerate(draws):
            if not (draw.previous_stage.morphology or draw.previous_stage.removals):
                turned += draw.is_spatial
                assert torch.equal(images[sample, 1:], torch.stack([target[sample] == v for v in (1, 2)]).float())
    assert turned > 2


def test_augmentation_makes_faults_in_the_previous_stages_channels_and_not_in_the_target(cascade: Trainer) -> None:
    source, spoilt, wrong = cascade.source("training"), 0, 0
    for iteration in range(12):
        images, target = source.batch(1, iteration)
        for sample, draw in enumerate(draw_batch(source.plan, 1, (0, 1), seed=7, epoch=1, iteration=iteration)):
            channels = torch.stack([target[sample] == v for v in (1, 2)]).float()
            spoilt += bool(draw.previous_stage.morphology or draw.previous_stage.removals)
            wrong += not torch.equal(images[sample, 1:], channels)
    assert 0 < wrong <= spoilt


def test_validation_gives_the_previous_stage_as_it_is_with_background_where_there_is_no_image(tmp_path: Path) -> None:
    source = Trainer(_cascade(tmp_path, exchanged=True), tmp_path / "fold_0").source("validation")
    for iteration in range(4):
        images, target = source.batch(0, iteration)
        assert torch.equal(images[:, 1:], torch.stack([target == 2, target == 1], dim=1).float())


def test_a_cascade_is_trained_resumed_and_refused_when_the_previous_stage_changed(tmp_path: Path) -> None:
    whole = Trainer(_cascade(tmp_path), tmp_path / "whole")
    assert whole.run()
    stopped = Trainer(_cascade(tmp_path), tmp_path / "stopped")
    assert not stopped.run(stop=lambda: stopped.epoch == 1 and stopped.iteration == 2)
    with pytest.raises(TrainingRefused, match="previous stage: 'found' then, 'exchanged' now"):
        Trainer(_cascade(tmp_path, exchanged=True), tmp_path / "stopped")
    resumed = Trainer(_cascade(tmp_path), tmp_path / "stopped")
    assert (resumed.epoch, resumed.iteration) == (1, 2)
    assert resumed.run()
    assert same_weights(weights(resumed), weights(whole))
    other = Trainer(_cascade(tmp_path, exchanged=True), tmp_path / "other")
    assert other.run()
    assert not same_weights(weights(other), weights(whole)), "what the previous stage found makes no difference"


def test_a_previous_stage_that_does_not_fit_ends_the_training_with_the_cases_name(tmp_path: Path) -> None:
    source = Trainer(_cascade(tmp_path), tmp_path / "fold_0").source("training")
    assert source.previous is not None
    for name in CASES:
        np.save(source.previous.folder / f"{name}.npy", np.zeros((3, 4, 5), dtype=np.uint8))
    with pytest.raises(DatasetInvalid, match=r"case_0\d: the previous stage's prediction has \(3, 4, 5\) voxels"):
        source.batch(0, 0)
