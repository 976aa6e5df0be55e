"""What is kept of one network's logits when they are gone: the label of each voxel, and how unsure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.labels import LabelManager
from engine.logit_kernels import ENTROPY_SCALE, judge_regions, judge_rows
from engine.logit_rows import LogitRows
from engine.resampling import Shape


@dataclass(frozen=True, eq=False)
class CertaintyMaps:
    """On the network's grid. `winners` (Z, Y, X): labels. `entropies`: uint16, ENTROPY_SCALE is one bit, of "the winner
    or not" (1, Z, Y, X) or, for regions, of "in the region or not" (K, Z, Y, X), the lowest bit of which says whether
    the region's own head is above 0."""

    winners: NDArray[Any]
    entropies: NDArray[np.uint16]

    @classmethod
    def empty(cls, shape: Shape, labels: LabelManager) -> CertaintyMaps:
        heads = labels.num_heads if labels.has_regions else 1
        return cls(np.zeros(shape, dtype=labels.dtype), np.zeros((heads, *shape), dtype=np.uint16))

    def judge(
        self, rows: LogitRows, labels: LabelManager, z: int, lines: tuple[int, int], offset: tuple[int, int, int]
    ) -> None:
        """Fills `lines` (first, last) of plane z from the logits that `rows` has for them at `offset` (z, y, x)."""
        first, last = lines
        slot, top, left = rows.slot(z + offset[0]), first + offset[1], offset[2]
        winners, entropies = self.winners[z, first:last], self.entropies[:, z, first:last]
        if not labels.has_regions:
            judge_rows(rows.values, slot, (top, left), winners, entropies[0])
            return
        values = rows.values[slot, top : top + last - first, :-1, left : left + winners.shape[1]]
        winners[...] = labels.logits_to_labels(values.transpose(1, 0, 2))
        judge_regions(rows.values, slot, (top, left), entropies)

    def bits(self, head: int, places: Any) -> float:
        """The mean entropy at some places (an index into (Z, Y, X))."""
        return float(self.entropies[head][places].mean(dtype=np.float64)) / ENTROPY_SCALE
