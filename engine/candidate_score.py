"""By what candidates are ranked: the Dice of the labels that the references have (nnU-Net's mean where they have all).

A label that no reference has says nothing of how well it is found. nnU-Net's foreground mean is NaN where a label is
nowhere, and 0 counts into it where a model invents the label in one case.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any


def mean_dice(summary: Mapping[str, Any]) -> float | None:
    """Over labels that occur in a reference of `summary` (engine/metrics.py); None where none does."""
    known = [entry["Dice"] for key, entry in summary["mean"].items() if _voxels(summary, key, "n_ref")]
    return fmean(known) if known else None


def invented_voxels(summary: Mapping[str, Any]) -> int:
    """Predicted voxels of labels that no reference has."""
    return sum(_voxels(summary, key, "n_pred") for key in summary["mean"] if not _voxels(summary, key, "n_ref"))


def _voxels(summary: Mapping[str, Any], key: str, what: str) -> int:
    return sum(int(entry["metrics"][key][what]) for entry in summary["metric_per_case"])
