"""Structures painted into one label map, with an answer for voxels that two labels claim."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Overlap = Literal["refuse", "first", "last"]
"""Who gets a voxel that two labels claim: nobody (an error), the label listed first (lower value) or last."""


class LabelPainter:
    """A label map (Z, Y, X), 0 where nothing was painted. The order of painting does not matter.

    `overlaps` counts the voxels that each pair of labels (lower value, higher value) was given both; `painted` are the
    values that have voxels."""

    def __init__(self, shape: tuple[int, int, int], highest: int, overlap: Overlap) -> None:
        self.array: NDArray[Any] = np.zeros(shape, dtype=np.uint8 if highest < 256 else np.uint16)
        self.overlaps: Counter[tuple[int, int]] = Counter()
        self._keep_lower = overlap == "first"

    def paint(self, value: int, z: NDArray[np.intp], y: NDArray[np.intp], x: NDArray[np.intp]) -> None:
        """Gives the voxels at these indices to the label `value` (1 or more)."""
        before = self.array[z, y, x]
        other = (before != 0) & (before != value)
        for found, voxels in zip(*np.unique(before[other], return_counts=True), strict=True):
            self.overlaps[min(int(found), value), max(int(found), value)] += int(voxels)
        kept = other & ((before < value) if self._keep_lower else (before > value))
        self.array[z, y, x] = np.where(kept, before, value)

    @property
    def painted(self) -> frozenset[int]:
        return frozenset(int(value) for value in np.unique(self.array) if value)
