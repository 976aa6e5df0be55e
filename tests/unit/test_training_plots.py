"""engine.training_plots: pictures whatever labels and cases are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.training_log import EpochRecord
from engine.training_plots import draw_overlay, draw_progress

# Valid in no formula: matplotlib raises where it takes them for one.
NAMES = ["$x_{$", "cost $\\frac$", "a_b^c"]


@pytest.mark.parametrize("name", NAMES)
def test_a_label_may_have_any_name(tmp_path: Path, name: str) -> None:
    record = EpochRecord(
        epoch=0, learning_rate=0.01, train_loss=0.1, validation_loss=0.2, dice_per_class=(0.5,), mean_dice=0.5,
        ema_dice=0.5, seconds=1.0,
    )  # fmt: skip
    draw_progress([record], tmp_path / "progress.png", labels=[name])
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_a_case_may_have_any_name(tmp_path: Path, name: str) -> None:
    labels = np.zeros((3, 8, 8), dtype=np.uint8)
    labels[1, 2:5, 2:5] = 1
    image = np.random.default_rng(0).normal(size=labels.shape)
    draw_overlay(image, labels, labels, (1.0, 1.0, 1.0), name, tmp_path / "overlay.png")
    assert [path.name for path in tmp_path.iterdir()] == ["overlay.png"]
