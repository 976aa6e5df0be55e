"""Pictures of a training: its course, and cases with reference and prediction (matplotlib)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from engine.training_log import EpochRecord

_COLOURS = ("tab:red", "tab:green", "tab:blue", "tab:orange", "tab:purple", "tab:cyan", "tab:pink", "tab:olive")
_WINDOW_PERCENT = (1.0, 99.0)
_PICTURES = 3
_FILL = 0.4


def draw_progress(records: Sequence[EpochRecord], path: Path, *, labels: Sequence[str] = ()) -> None:
    """Loss, Dice and HD95 over the epochs, on patches and, where there is one, on the hold-out; the Dice of each of
    `labels` too."""
    epochs = [record.epoch for record in records]
    judged = [(record.epoch, record.hold_out) for record in records if record.hold_out is not None]
    figure = Figure(figsize=(9, 9), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    loss, dice, hd95 = axes
    # A line through one epoch is nothing to look at.
    single: dict[str, Any] = {"marker": "o", "markersize": 3} if len(records) == 1 else {}
    loss.plot(epochs, [record.train_loss for record in records], label="training", **single)
    loss.plot(epochs, [record.validation_loss for record in records], label="validation", **single)
    loss.set_ylabel("loss")
    dice.plot(epochs, [record.mean_dice for record in records], color="0.7", label="patches")
    dice.plot(epochs, [record.ema_dice for record in records], color="black", label="patches, moving average", **single)
    for index, name in enumerate(labels[: len(_COLOURS)]):
        values = [np.nan if (d := record.dice_per_class[index]) is None else d for record in records]
        dice.plot(epochs, values, color=_COLOURS[index], linewidth=0.7, label=name)
    dice.set_ylabel("Dice")
    dice.set_ylim(-0.02, 1.02)
    hd95.plot(
        epochs, [_number(record.patch_hd95_mm) for record in records], color="black", label="some patches", **single
    )
    hd95.set_ylabel("HD95 (mm)")
    if judged:
        places = [epoch for epoch, _ in judged]
        dice.plot(places, [_number(h.dice) for _, h in judged], "o-", color="tab:brown", ms=3, label="hold-out, cases")
        hd95.plot(
            places, [_number(h.hd95_mm) for _, h in judged], "o-", color="tab:brown", ms=3, label="hold-out, cases"
        )
    for panel in axes:
        panel.grid(alpha=0.3)
        # Where curves that get better are not: to look for the best place takes long, and matplotlib then warns.
        # Each with its name: by themselves those that begin with _ are left out.
        names = [str(line.get_label()) for line in panel.lines]
        panel.legend(
            panel.lines, names, fontsize="small", ncols=2, loc="lower right" if panel is dice else "upper right"
        )
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def draw_overlay(
    image_ZYX: NDArray[Any],
    reference_ZYX: NDArray[Any],
    predicted_ZYX: NDArray[Any],
    spacing_mm: Sequence[float],
    title: str,
    path: Path,
) -> None:
    """Three slices of the reference's fullest stretches: the prediction filled, the reference as an outline."""
    figure = Figure(figsize=(4 * _PICTURES, 4.4), layout="constrained")
    low, high = np.percentile(image_ZYX, _WINDOW_PERCENT)
    aspect = spacing_mm[1] / spacing_mm[2]
    highest = max(int(reference_ZYX.max(initial=0)), int(predicted_ZYX.max(initial=0)))
    chosen = _slices(reference_ZYX if reference_ZYX.any() else predicted_ZYX)
    for panel, z in zip(np.atleast_1d(figure.subplots(1, len(chosen))), chosen, strict=True):
        panel.imshow(image_ZYX[z], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
        for value in range(1, highest + 1):
            colour = _COLOURS[(value - 1) % len(_COLOURS)]
            found, there = predicted_ZYX[z] == value, reference_ZYX[z] == value
            panel.imshow(np.multiply.outer(found, to_rgba(colour, _FILL)), aspect=aspect, interpolation="nearest")
            # contour warns where there is no edge.
            if there.any() and not there.all() and min(there.shape) > 1:
                panel.contour(there, levels=[0.5], colors=[colour], linewidths=1.2)
        panel.set_title(f"slice {z + 1} of {len(image_ZYX)}", fontsize="small")
        panel.set_axis_off()
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def _slices(labels_ZYX: NDArray[Any]) -> list[int]:
    """The slice with most foreground in each third of the foreground; the middle one where there is none."""
    filled = np.count_nonzero(labels_ZYX, axis=(1, 2))
    planes = np.flatnonzero(filled)
    if not planes.size:
        return [len(labels_ZYX) // 2]
    return [int(part[np.argmax(filled[part])]) for part in np.array_split(planes, min(_PICTURES, planes.size))]


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _save(figure: Figure, path: Path) -> None:
    """The whole file or the old one. Names of cases and labels are text: $, ^ and _ are no formula."""
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        figure.savefig(partial, dpi=90)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
