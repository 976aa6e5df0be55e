"""Validation on patches after each epoch: nnU-Net's "pseudo Dice" (torch).

Hard counts are summed over all patches before the Dice is taken, so a class that is rare weighs as much as others, and
the value is not that of whole cases (engine/validation.py).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.labels import LabelManager


class OnlineDice:
    """Collects batches; `per_class` is their Dice. `counts` (3, classes) are voxels in both, found, there."""

    def __init__(self, labels: LabelManager) -> None:
        self._labels = labels
        self.counts = np.zeros((3, len(labels.foreground)), dtype=np.int64)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """`logits` (B, K, *patch), `target` (B, *patch)."""
        self.counts += count_overlap(logits, target, self._labels)

    @property
    def per_class(self) -> tuple[float | None, ...]:
        """Per foreground class or region; None where neither network nor reference ever had it."""
        both, found, there = self.counts
        size = found + there
        return tuple(float(2 * b / s) if s else None for b, s in zip(both, size, strict=True))


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
