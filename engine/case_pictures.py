"""Pictures of a fold's best and worst validated case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.dataset import RawDataset, read_case
from engine.experiment import BEST_CASE, VALIDATION, WORST_CASE
from engine.metrics import CaseMetrics, composite_score
from engine.nifti import read_label_map
from engine.training_plots import draw_overlay


def draw_best_and_worst(dataset: RawDataset, names: Sequence[str], measured: Sequence[CaseMetrics], fold: Path) -> None:
    """By the mean Dice of their labels, into the fold's folder, from the label maps in its validation; nothing where no
    case has a label. Raises InputRejected, OSError."""
    means: dict[str, float] = {}
    for name, metrics in zip(names, measured, strict=True):
        dice = composite_score([metrics]).dice
        if dice is not None:
            means[name] = dice
    if not means:
        return
    cases = {case.name: case for case in dataset.cases}
    best, worst = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
    for name, what, file in ((best, "best", BEST_CASE), (worst, "worst", WORST_CASE)):
        loaded = read_case(cases[name], dataset.json)
        predicted = read_label_map(fold / VALIDATION / f"{name}{dataset.json.file_ending}")
        draw_overlay(
            loaded.volume.array[0],
            loaded.labels.array,
            predicted.reoriented(dataset.json.orientation)[0].array,
            loaded.volume.geometry.spacing_mm,
            f"{what} of {len(means)} cases: {name}, mean Dice {means[name]:.3f}; line: reference",
            fold / file,
        )
