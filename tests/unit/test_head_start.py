"""engine.head_start: before the first step a network says how frequent each label is."""
# ruff: noqa: E402

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch
from torch import nn

from engine.batches import BatchSource
from engine.head_start import LEAST, label_frequencies, start_heads
from engine.training import Trainer
from tests.support.nnunet_results import TWO_D, TrainedModel
from tests.support.tiny_training import TINY, same_weights, tiny_setup, weights

REGIONS = replace(
    TINY, labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=(1, 2), heads=2, channels=("CT",)
)
IGNORE = replace(TINY, labels={**TINY.labels, "ignore": 3})


def made(root: Path, model: TrainedModel = TINY, **changes: Any) -> Trainer:
    return Trainer(tiny_setup(root, model, **changes), root / "fold_0")


def biases(trainer: Trainer) -> list[torch.Tensor]:
    return [v for name, v in trainer.network.state_dict().items() if "seg_layers" in name and name.endswith("bias")]


@pytest.mark.parametrize("model", [TINY, replace(TWO_D, labels=TINY.labels, channels=("MRI",))])
def test_frequencies_are_those_of_the_patches_that_are_trained_on(tmp_path: Path, model: TrainedModel) -> None:
    trainer = made(tmp_path, model)
    source = trainer.source("training")
    found = label_frequencies(source, trainer.setup.labels)
    assert found is not None
    assert found.sum() == pytest.approx(1)
    batches = [source.batch(0, iteration)[1] for iteration in range(60)]
    seen = np.bincount(torch.cat(batches).flatten(), minlength=3)
    # Augmentation turns and scales them.
    np.testing.assert_allclose(found, seen / seen.sum(), rtol=0.35)


def test_softmax_of_the_start_is_the_frequency_of_each_label(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    source, labels = trainer.source("training"), trainer.setup.labels
    found = label_frequencies(source, labels)
    assert found is not None
    start_heads(trainer.network.decoder.seg_layers, source, labels)  # type: ignore[union-attr, arg-type]
    for bias in biases(trainer):
        np.testing.assert_allclose(bias.softmax(0), found, rtol=1e-5)


def test_sigmoid_of_the_start_is_the_frequency_of_each_region(tmp_path: Path) -> None:
    trainer = made(tmp_path, REGIONS)
    source, labels = trainer.source("training"), trainer.setup.labels
    found = label_frequencies(source, labels)
    assert found is not None
    assert found[0] > found[1] > LEAST  # the core is a part of the whole
    start_heads(trainer.network.decoder.seg_layers, source, labels)  # type: ignore[union-attr, arg-type]
    for bias in biases(trainer):
        np.testing.assert_allclose(bias.sigmoid(), found, rtol=1e-5)


def test_ignored_voxels_count_for_nothing_and_an_absent_label_starts_low(tmp_path: Path) -> None:
    trainer = made(tmp_path, IGNORE)
    found = label_frequencies(trainer.source("training"), trainer.setup.labels)
    assert found is not None
    assert found.shape == (3,)
    assert found.sum() == pytest.approx(1)
    for path in trainer.setup.folder.glob("*_seg.npy"):
        labels = np.load(path, allow_pickle=False)
        np.save(path, np.where(labels == 2, 0, labels))
    head = nn.Conv3d(4, 3, 1)
    start_heads([head], trainer.source("training"), trainer.setup.labels)
    assert head.bias is not None
    assert float(head.bias.detach()[2]) == pytest.approx(np.log(LEAST))


def test_where_all_is_ignored_the_start_is_nnunets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made(tmp_path, IGNORE)
    monkeypatch.setattr(BatchSource, "label_patch", lambda *_, **__: np.full(TINY.patch_size, 3, dtype=np.int16))
    start_heads(trainer.network.decoder.seg_layers, trainer.source("training"), trainer.setup.labels)  # type: ignore[union-attr, arg-type]
    assert not any(bias.any() for bias in biases(trainer))


def test_a_training_starts_there_and_nowhere_else_and_one_that_goes_on_does_not(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    before = weights(trainer)
    assert not trainer.run(stop=lambda: True)
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "seg_layers" in name and name.endswith("bias")}
    # Stopped before the first step, it may start once more: the same.
    again = made(tmp_path)
    assert not again.run(stop=lambda: True)
    assert same_weights(weights(again), after)
    asked = iter((False, False, True))
    assert not again.run(stop=lambda: next(asked))
    trained = weights(again)
    resumed = made(tmp_path)
    assert not resumed.run(stop=lambda: True)
    assert same_weights(weights(resumed), trained)


def test_the_first_loss_is_lower_and_a_small_network_finds_its_labels_sooner(tmp_path: Path) -> None:
    """What it is for: 60 steps with and without it, from the same weights."""
    losses = []
    for starts in (False, True):
        trainer = made(tmp_path, seed=3)
        source = trainer.source("training")
        if starts:
            start_heads(trainer.network.decoder.seg_layers, source, trainer.setup.labels)  # type: ignore[union-attr, arg-type]
        losses.append([trainer.step(source.batch(0, iteration)) for iteration in range(60)])
    without, with_it = losses
    assert np.mean(with_it[:10]) < np.mean(without[:10])
    assert np.mean(with_it) < np.mean(without)
