"""engine.training_plots: names of cases and labels are text, whatever they hold."""
# ruff: noqa: E402

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch")

from matplotlib.figure import Figure
from matplotlib.text import Text

from engine.training_log import EpochRecord
from engine.training_plots import draw_overlay, draw_progress

NAMES = ["a$^$b", "cost$1_a$", "_hidden", "x_^", r"\frac{"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text of the figures that are saved."""
    found: list[str] = []
    save = Figure.savefig

    def note(self: Figure, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        found.extend(text.get_text() for text in self.findobj(Text) if isinstance(text, Text))

    monkeypatch.setattr(Figure, "savefig", note)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_case_is_no_formula(tmp_path: Path, shown: list[str], name: str) -> None:
    labels = np.zeros((3, 8, 8), np.uint8)
    labels[1, 2:5, 2:5] = 1
    draw_overlay(np.zeros((3, 8, 8)), labels, labels, (1, 1, 1), f"worst: {name}, Dice 0.5", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert f"worst: {name}, Dice 0.5" in shown


def test_the_names_of_labels_are_no_formulas_and_all_in_the_legend(tmp_path: Path, shown: list[str]) -> None:
    record = EpochRecord(
        epoch=0,
        train_loss=0.5,
        validation_loss=0.4,
        dice_per_class=(0.1,) * len(NAMES),
        mean_dice=0.1,
        ema_dice=0.1,
        learning_rate=0.01,
        seconds=1.0,
    )
    draw_progress([record], tmp_path / "a.png", labels=NAMES)
    assert set(NAMES) <= set(shown)
