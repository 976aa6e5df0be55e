"""How sure the networks are: how far folds and mirrored passes agree, how sharp the borders of segments are, and how
unsure the networks are in and around them.

Counted on the network's grid while the logits are there, so that it costs an argmax and not another export.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engine.labels import LabelManager
from engine.logits_to_labels import winning_labels

FloatArray = NDArray[np.float32]

# Logits of all heads that are looked at together on a border.
_BORDER_VALUES = 2**20
# Places of the box around a segment that are looked at, at most, and how far around it counts, in voxels.
_DILATED_PLACES = 2**15
_REACH = 2


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


def border_entropies(logits: FloatArray, winners: NDArray[Any], labels: LabelManager) -> dict[int, float]:
    """How unsure one network is where its segments end, by segment value; a segment that has no border is absent.

    The mean, over the voxels of a segment with a neighbour by a face that is not in it, of the entropy in bits of "in
    the segment or not": 0 is certain; a voxel with a probability of one half or less has 1. A face that is the edge of
    the image is no border. `logits` (K, Z, Y, X) are the network's, `winners` (Z, Y, X) the labels that they give.
    """
    flat = winners.reshape(-1)
    heads = logits.reshape(logits.shape[0], -1)
    found: dict[int, float] = {}
    if labels.has_regions:
        for head, label in zip(heads, labels.foreground, strict=True):
            inside = np.zeros(winners.shape, dtype=np.bool_)
            for value in label.region:
                inside |= winners == value
            places = np.flatnonzero(_changes(inside) & inside)
            if places.size:
                # Below 0 the entropy is 1 in any case, above 100 it is 0.
                logit = np.clip(head[places].astype(np.float64), 0.0, 100.0)
                found[label.value] = float(_bits(1.0 / (1.0 + np.exp(-logit))).mean())
        return found
    places = np.flatnonzero(_changes(winners) & (winners != 0))
    size = max(labels.values) + 1
    sums, counts = np.zeros(size), np.zeros(size, dtype=np.int64)
    step = max(1, _BORDER_VALUES // heads.shape[0])
    for first in range(0, places.size, step):
        here = places[first : first + step]
        values = heads[:, here].astype(np.float64)
        probability = 1.0 / np.exp(values - values.max(axis=0)).sum(axis=0)
        sums += np.bincount(flat[here], weights=_bits(probability), minlength=size)
        counts += np.bincount(flat[here], minlength=size)
    present = [label.value for label in labels.foreground if counts[label.value]]
    return {value: float(sums[value] / counts[value]) for value in present}


def dilated_entropies(logits: FloatArray, winners: NDArray[Any], labels: LabelManager) -> dict[int, float]:
    """How unsure one network is in and around each segment, by segment value; a segment without voxels is absent.

    The mean, over the segment dilated by 2 voxels along each axis, of the entropy in bits of "in the segment or not":
    0 is certain. It is a mean, so that a large segment counts like a small one, and what lies around it counts, so that
    a border which a network nearly went beyond is seen. In a large box every n-th voxel is taken. `logits` (K, Z, Y, X)
    and `winners` (Z, Y, X) as for `border_entropies`.
    """
    boxes = ndimage.find_objects(winners, max_label=table_size(labels) - 1)
    found: dict[int, float] = {}
    for index, label in enumerate(labels.foreground):
        present = [box for value in set(label.region) if value and (box := boxes[value - 1]) is not None]
        if not present:
            continue
        z, y, x = _in_and_around(winners, label.region, present)
        if labels.has_regions:
            logit = np.abs(logits[index, z, y, x].astype(np.float64))
            probability = 1.0 / (1.0 + np.exp(-logit))
        else:
            values = logits[:, z, y, x].astype(np.float64)
            values = np.exp(values - values.max(axis=0))
            probability = values[label.value] / values.sum(axis=0)
        found[label.value] = float(_bits(np.maximum(probability, 1.0 - probability)).mean())
    return found


def mean_entropy(networks: Iterable[Mapping[int, float]], value: int) -> float | None:
    """The mean over the networks that have the segment; None when none has."""
    found = [entropies[value] for entropies in networks if value in entropies]
    return sum(found) / len(found) if found else None


def _in_and_around(
    winners: NDArray[Any], region: Sequence[int], boxes: Sequence[tuple[slice, ...]]
) -> tuple[NDArray[np.intp], ...]:
    """Places (z, y, x) of the dilated region, on a lattice over its boxes that is so coarse that it has few places."""
    first = [max(0, min(box[axis].start for box in boxes) - _REACH) for axis in range(3)]
    last = [min(winners.shape[axis], max(box[axis].stop for box in boxes) + _REACH) for axis in range(3)]
    sizes, steps = np.subtract(last, first), np.ones(3, dtype=np.int64)
    while np.prod(-(-sizes // steps)) > _DILATED_PLACES:
        steps[np.argmax(sizes / steps)] += 1
    axes = [np.arange(*ends) for ends in zip(first, last, steps, strict=True)]
    inside: NDArray[np.bool_] = np.zeros(tuple(len(axis) for axis in axes), dtype=np.bool_)
    moves = [(0, 0), *((axis, step) for axis in range(3) for step in range(-_REACH, _REACH + 1) if step)]
    for axis, step in moves:
        moved = list(axes)
        moved[axis] = np.clip(axes[axis] + step, 0, winners.shape[axis] - 1)
        near = winners[np.ix_(*moved)]
        for value in set(region):
            inside |= near == value
    if inside.any():
        return tuple(axis[places] for axis, places in zip(axes, np.nonzero(inside), strict=True))
    found = np.nonzero(np.isin(winners, region))  # specks that lie between the places of the lattice
    step = -(-found[0].size // _DILATED_PLACES)
    return tuple(axis[::step] for axis in found)


def _changes(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Voxels that differ from a neighbour by a face."""
    result: NDArray[np.bool_] = np.zeros(values.shape, dtype=np.bool_)
    for axis in range(values.ndim):
        lower = tuple(slice(None, -1) if a == axis else slice(None) for a in range(values.ndim))
        upper = tuple(slice(1, None) if a == axis else slice(None) for a in range(values.ndim))
        differs = values[lower] != values[upper]
        result[lower] |= differs
        result[upper] |= differs
    return result


def _bits(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of a yes with this probability; of one half or less, 1."""
    yes = np.clip(probability, 0.5, 1.0)
    no = np.maximum(1.0 - yes, np.finfo(np.float64).tiny)
    result: NDArray[np.float64] = -(yes * np.log2(yes) + no * np.log2(no))
    return result
