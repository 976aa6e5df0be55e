"""How far the networks agree with themselves: between folds, and with and without mirroring.

Counted on the network's grid while the logits are there, so that it costs an argmax and not another export.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.labels import LabelManager
from engine.logits_to_labels import winning_labels

FloatArray = NDArray[np.float32]


class Agreement:
    """A table of label pairs over two label maps, from which the Dice of any set of labels follows."""

    def __init__(self, size: int) -> None:
        """`size` is the highest label value plus 1."""
        self._size = size
        self._table: NDArray[np.float64] = np.zeros((size, size), dtype=np.float64)

    def count(self, first: NDArray[Any], second: NDArray[Any], weights: FloatArray | None = None) -> None:
        """Adds two label maps of the same shape, each voxel with its weight (1 without weights)."""
        pairs = first.astype(np.int32).ravel()
        pairs *= self._size
        pairs += second.ravel()
        flat = None if weights is None else np.broadcast_to(weights, first.shape).ravel()
        self._table += np.bincount(pairs, weights=flat, minlength=self._size**2).reshape(self._size, self._size)

    def dice(self, values: Iterable[int]) -> float | None:
        """Dice of the set of label values in the two maps; None when neither map holds one of them."""
        chosen = np.asarray(sorted(values))
        sizes = float(self._table[chosen].sum() + self._table[:, chosen].sum())
        if sizes == 0:
            return None
        return 2.0 * float(self._table[np.ix_(chosen, chosen)].sum()) / sizes


def table_size(labels: LabelManager) -> int:
    """Rows that a table of label pairs needs."""
    return max(*labels.values, *(labels.regions_class_order or (0,))) + 1


class MirrorAgreement:
    """Compares the unmirrored pass with the mean of the mirrored passes, window by window.

    Each voxel counts with the weight that its window has in the result. An instance is a `MirrorObserver`.
    """

    def __init__(self, labels: LabelManager) -> None:
        self._labels = labels
        self.agreement = Agreement(table_size(labels))

    def __call__(self, plain: FloatArray, mirrored: FloatArray, weights: FloatArray) -> None:
        self.agreement.count(winning_labels(plain, self._labels), winning_labels(mirrored, self._labels), weights)


def fold_agreements(fold_labels: Sequence[NDArray[Any]], labels: LabelManager) -> tuple[Agreement, ...]:
    """One table for each pair of folds, from their label maps on the network's grid; none for a single fold."""
    tables = []
    for first, second in combinations(fold_labels, 2):
        table = Agreement(table_size(labels))
        table.count(first, second)
        tables.append(table)
    return tuple(tables)


def lowest_dice(agreements: Iterable[Agreement], values: Iterable[int]) -> float | None:
    """The lowest Dice among the tables; None when there is none, or no table holds one of the labels."""
    chosen = tuple(values)
    found = [dice for table in agreements if (dice := table.dice(chosen)) is not None]
    return min(found, default=None)
