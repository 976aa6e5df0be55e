"""What is measured on each segment of a result: size, certainty, intensity, components, borders, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engine.component_count import count_components
from engine.manifest import LabelSpec
from engine.uncertainty import Agreement, lowest_dice, mean_entropy
from engine.volume import LabelMap, Volume

_AXES = ("z", "y", "x")


@dataclass(frozen=True, kw_only=True)
class SegmentStatistics:
    """One segment of a result. A segment of a region model holds the voxels whose label is in its region.

    `confidence`: mean probability of the segment inside it, None when empty. `mean_intensity`: per channel, in the
    units of the source image, None when empty. `components`: number of parts that do not touch, not even by a corner.
    `touches_border`: faces of the image that the segment reaches, "z-first" ... "x-last" on the source grid; an axis
    of one voxel has none. `fold_dice`: lowest Dice between two folds; `mirror_dice`: lowest Dice between the plain
    and the mirrored passes; None without several folds or mirroring, or when the segment is in none of them.
    `border_entropy`: how unsure a network is at the segment's border, in bits, in the mean over the networks
    (engine.uncertainty.border_entropies); `dilated_entropy`: the same in and around the whole segment
    (`dilated_entropies`); None when none of them has the segment.
    """

    value: int
    name: str
    voxels: int
    volume_ml: float
    confidence: float | None
    mean_intensity: tuple[float, ...] | None
    components: int
    touches_border: tuple[str, ...]
    fold_dice: float | None
    mirror_dice: float | None
    border_entropy: float | None
    dilated_entropy: float | None


def measure_segments(
    volume: Volume,
    labels: LabelMap,
    specs: Sequence[LabelSpec],
    *,
    confidences: Mapping[int, float | None],
    fold_tables: Sequence[Agreement] = (),
    mirror_tables: Sequence[Agreement] = (),
    border_entropies: Sequence[Mapping[int, float]] = (),
    dilated_entropies: Sequence[Mapping[int, float]] = (),
) -> tuple[SegmentStatistics, ...]:
    """One entry per label of the bundle, in its order, measured on the source grid.

    `confidences` and each network's entropies are by segment value. `volume` and `labels` share one grid.
    """
    array = labels.array
    size = max([int(array.max()), *(value for spec in specs for value in (spec.value, *spec.region))]) + 1
    boxes = ndimage.find_objects(array, max_label=size - 1)
    counts = np.zeros(size, dtype=np.int64)
    sums = np.zeros((len(volume.array), size))
    # Plane by plane: bincount makes copies of 8 bytes a voxel.
    for z, plane in enumerate(array):
        found = np.flatnonzero(plane)
        values = plane.ravel()[found]
        counts += np.bincount(values, minlength=size)
        for channel, total in zip(volume.array, sums, strict=True):
            total += np.bincount(values, weights=channel[z].ravel()[found], minlength=size)

    result = []
    for spec in specs:
        values = tuple(dict.fromkeys(spec.region))
        voxels = int(sum(counts[value] for value in values))
        box = _union([boxes[value - 1] for value in values if value > 0])
        components = 0
        if box is not None:
            chosen = np.zeros(size, dtype=np.bool_)
            chosen[list(values)] = True
            components = count_components(array[box], chosen)
        result.append(
            SegmentStatistics(
                value=spec.value,
                name=spec.name,
                voxels=voxels,
                volume_ml=voxels * labels.geometry.voxel_volume_ml,
                confidence=confidences.get(spec.value),
                mean_intensity=(
                    tuple(float(sum(channel[value] for value in values)) / voxels for channel in sums)
                    if voxels
                    else None
                ),
                components=components,
                touches_border=() if box is None else _borders(box, array.shape),
                fold_dice=lowest_dice(fold_tables, values),
                mirror_dice=lowest_dice(mirror_tables, values),
                border_entropy=mean_entropy(border_entropies, spec.value),
                dilated_entropy=mean_entropy(dilated_entropies, spec.value),
            )
        )
    return tuple(result)


def mean_probabilities(
    labels: NDArray[Any], probabilities: NDArray[np.float16], specs: Sequence[LabelSpec]
) -> dict[int, float | None]:
    """Mean probability inside each segment, by segment value; None for an empty one.

    `labels` (Z, Y, X) and `probabilities` (heads of the regions in the order of `specs`, or 1 for labels, Z, Y, X) as
    in engine.logits_to_labels.Segmented.
    """
    result: dict[int, float | None] = {}
    if probabilities.shape[0] == 1 and all(spec.region == (spec.value,) for spec in specs):
        size = max(spec.value for spec in specs) + 1
        counts, sums = np.zeros(size, dtype=np.int64), np.zeros(size)
        for plane, certain in zip(labels, probabilities[0], strict=True):
            found = np.flatnonzero(plane)
            values = plane.ravel()[found]
            counts += np.bincount(values, minlength=size)
            sums += np.bincount(values, weights=certain.ravel()[found].astype(np.float64), minlength=size)
        for spec in specs:
            result[spec.value] = float(sums[spec.value] / counts[spec.value]) if counts[spec.value] else None
        return result
    for spec, probability in zip(specs, probabilities, strict=True):
        voxels, total = 0, 0.0
        for plane, certain in zip(labels, probability, strict=True):
            here = certain[np.isin(plane, spec.region)]
            voxels, total = voxels + here.size, total + float(here.sum(dtype=np.float64))
        result[spec.value] = total / voxels if voxels else None
    return result


def _union(boxes: Sequence[tuple[slice, slice, slice] | None]) -> tuple[slice, slice, slice] | None:
    present = [box for box in boxes if box is not None]
    if not present:
        return None
    z, y, x = (
        slice(min(box[axis].start for box in present), max(box[axis].stop for box in present)) for axis in range(3)
    )
    return z, y, x


def _borders(box: tuple[slice, slice, slice], shape: Sequence[int]) -> tuple[str, ...]:
    reached = []
    for name, side, size in zip(_AXES, box, shape, strict=True):
        if size > 1 and side.start == 0:
            reached.append(f"{name}-first")
        if size > 1 and side.stop == size:
            reached.append(f"{name}-last")
    return tuple(reached)
