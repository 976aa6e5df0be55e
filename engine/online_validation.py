"""Validation on patches after each epoch: nnU-Net's "pseudo Dice", and an HD95 of the same kind (torch).

Hard counts are summed over all patches before the Dice is taken, so a class that is rare weighs as much as others, and
the value is not that of whole cases (engine/validation.py). Surfaces take longer: they are measured on an epoch's first
patches alone, the same ones on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.labels import LabelManager
from engine.metrics import evaluated_regions, measure_case

SURFACE_PATCHES = 4


@dataclass(frozen=True, kw_only=True)
class PatchFigures:
    """Of an epoch. `dice_per_class`: of each foreground class or region, None where neither network nor reference ever
    had it. `hd95_mm`: mean over patches, then over classes (engine.metrics: one side empty is the patch's diagonal,
    both are left out); None where no patch had any."""

    dice_per_class: tuple[float | None, ...]
    hd95_mm: float | None


class PatchValidation:
    """Collects the batches of an epoch. `samples` are this process's places in the batch of all, which has
    `batch_size`; `spacing_mm` is of the patch's axes."""

    def __init__(
        self, labels: LabelManager, *, spacing_mm: Sequence[float], batch_size: int, samples: Sequence[int]
    ) -> None:
        self._labels = labels
        self._spacing_mm = (1.0,) * (3 - len(spacing_mm)) + tuple(spacing_mm)
        self._regions = evaluated_regions(labels)
        self._samples, self._batch_size, self._batches = samples, batch_size, 0
        self._counts = np.zeros((3, len(labels.foreground)), dtype=np.int64)  # in both, found, there
        self._distances_mm = np.zeros((2, len(self._regions)))  # sum, number

    def add(self, logits: Tensor, target: Tensor) -> None:
        """This process's part of a batch: `logits` (B, K, *patch), `target` (B, *patch)."""
        self._counts += count_overlap(logits, target, self._labels)
        first = self._batches * self._batch_size
        self._batches += 1
        for sample, one, expected in zip(self._samples, logits, target, strict=True):
            if first + sample < SURFACE_PATCHES:
                self._measure(one, expected)

    def join(self, add_up: Callable[[Tensor], object]) -> None:
        """`add_up` adds the tensors of all processes, in place."""
        for array in (self._counts, self._distances_mm):
            add_up(torch.from_numpy(array))

    @property
    def figures(self) -> PatchFigures:
        both, found, there = self._counts
        total_mm, number = self._distances_mm
        known = number > 0
        return PatchFigures(
            dice_per_class=tuple(float(2 * b / s) if s else None for b, s in zip(both, found + there, strict=True)),
            hd95_mm=float(np.mean(total_mm[known] / number[known])) if known.any() else None,
        )

    def _measure(self, logits: Tensor, target: Tensor) -> None:
        shape = (1,) * (3 - target.ndim) + tuple(target.shape)
        heads = logits.float().cpu().numpy().reshape(logits.shape[0], *shape)
        found = measure_case(
            target.cpu().numpy().reshape(shape),
            self._labels.logits_to_labels(heads),
            self._spacing_mm,
            self._regions,
            ignore_label=self._labels.ignore_label,
        )
        for index, region in enumerate(self._regions):
            if (hd95_mm := found[region].hd95_mm) is not None:
                self._distances_mm[:, index] += hd95_mm, 1


def count_overlap(logits: Tensor, target: Tensor, labels: LabelManager) -> NDArray[np.int64]:
    """(3, classes) over a batch: voxels in both, found, there. Ignored voxels count nowhere."""
    known = None if labels.ignore_label is None else target != labels.ignore_label
    winners = None if labels.has_regions else logits.argmax(1)
    counts = []
    for index, label in enumerate(labels.foreground):
        found = winners == label.value if winners is not None else logits[:, index] > 0
        there = torch.isin(target, torch.tensor(label.region, dtype=target.dtype, device=target.device))
        if known is not None:
            found, there = found & known, there & known
        counts.append(torch.stack([(found & there).sum(), found.sum(), there.sum()]))
    overlap: NDArray[np.int64] = torch.stack(counts, dim=1).cpu().numpy()
    return overlap
