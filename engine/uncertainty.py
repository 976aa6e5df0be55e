"""How sure the networks are: how far folds and mirrored passes agree, how sharp the borders of segments are, and how
unsure the networks are in and around them.

Counted on the network's grid, from what is kept of the logits as they pass (engine/certainty_maps.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engine.certainty_maps import CertaintyMaps
from engine.labels import LabelManager
from engine.logit_kernels import ENTROPY_SCALE, count_pairs
from engine.logits_to_labels import winning_labels

FloatArray = NDArray[np.float32]

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

    def count_logits(self, first: FloatArray, second: FloatArray, weights: FloatArray) -> None:
        """Adds the winning heads of logits (K, z, y, x), each voxel with its weight (z, y, x)."""
        count_pairs(first, second, weights, self._table)

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
        if not self._labels.has_regions:
            self.agreement.count_logits(plain, mirrored, weights)
            return
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


def border_entropies(maps: CertaintyMaps, labels: LabelManager) -> dict[int, float]:
    """How unsure one network is where its segments end, by segment value; a segment that has no border is absent.

    The mean, over the voxels of a segment with a neighbour by a face that is not in it, of the entropy in bits of "in
    the segment or not": 0 is certain; a voxel with a probability of one half or less has 1. A face that is the edge of
    the image is no border.
    """
    size = table_size(labels)
    heads = len(labels.foreground) if labels.has_regions else 1
    sums, counts = np.zeros((heads, size)), np.zeros((heads, size), dtype=np.int64)
    # Plane by plane, with its neighbours: in the worst of results every voxel lies on a border.
    for z in range(len(maps.winners)):
        for head in range(heads):
            region = labels.foreground[head].region if labels.has_regions else None
            border = _border(maps.winners, z, region)
            here = np.zeros(np.count_nonzero(border), np.uint8) if region else maps.winners[z][border]
            entropies = maps.entropies[head, z][border]
            if region:
                # Inside by another region that lies in this one, while its own head says no: wholly unsure.
                entropies[entropies & 1 == 0] = ENTROPY_SCALE
            counts[head] += np.bincount(here, minlength=size)
            sums[head] += np.bincount(here, weights=entropies, minlength=size)
    found: dict[int, float] = {}
    for index, label in enumerate(labels.foreground):
        place = (index, 0) if labels.has_regions else (0, label.value)
        if counts[place]:
            found[label.value] = float(sums[place] / counts[place] / ENTROPY_SCALE)
    return found


def dilated_entropies(maps: CertaintyMaps, labels: LabelManager) -> dict[int, float]:
    """How unsure one network is in and around each segment, by segment value; a segment without voxels is absent.

    The mean, over the segment dilated by 2 voxels along each axis, of the entropy in bits of "the winner or not" (of a
    region: "in it or not"): 0 is certain. It is a mean, so that a large segment counts like a small one, and what lies
    around it counts, so that a border which a network nearly went beyond is seen. In a large box every n-th voxel is
    taken.
    """
    winners = maps.winners
    boxes = ndimage.find_objects(winners, max_label=table_size(labels) - 1)
    found: dict[int, float] = {}
    for index, label in enumerate(labels.foreground):
        present = [box for value in set(label.region) if value and (box := boxes[value - 1]) is not None]
        if present:
            places = _in_and_around(winners, label.region, present)
            found[label.value] = maps.bits(index if labels.has_regions else 0, places)
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


def _border(winners: NDArray[Any], z: int, region: Sequence[int] | None) -> NDArray[np.bool_]:
    """Voxels (Y, X) of plane z that are foreground (in the region) and have a neighbour by a face that is another label
    (not in it)."""
    planes = winners[max(z - 1, 0) : z + 2]
    inside = None if region is None else np.isin(planes, region)
    values = planes if inside is None else inside
    middle = min(z, 1)
    plane = values[middle]
    result: NDArray[np.bool_] = np.zeros(plane.shape, dtype=np.bool_)
    for other in (*range(middle), *range(middle + 1, len(values))):
        result |= values[other] != plane
    for axis in range(2):
        lower = tuple(slice(None, -1) if a == axis else slice(None) for a in range(2))
        upper = tuple(slice(1, None) if a == axis else slice(None) for a in range(2))
        differs = plane[lower] != plane[upper]
        result[lower] |= differs
        result[upper] |= differs
    result &= plane != 0
    return result
