"""Logits on the network's grid → labels on the image's grid, row by row as the logits become final.

Gives the labels that nnU-Net gives: its array of resampled logits is half precision, so values are rounded to half
precision before they are compared. Never holds all classes of the whole volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import BundleInvalid
from engine.labels import LabelManager
from engine.logit_kernels import interpolate_rows, label_rows
from engine.logit_source import Block, LogitSource, NetworkLogits, StoredLogits
from engine.plans import ResamplingKwargs
from engine.resampling import LinearAxis, Shape, linear_axis, separate_axis
from engine.row_threads import RowThreads

FloatArray = NDArray[np.float32]
HalfArray = NDArray[np.float16]

# Interpolated values of all heads that are held at a time where they are joined with others.
_JOINT_VALUES = 2**20
# Rows of a plane that one thread labels at a time.
_ROWS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmented:
    """Labels (Z, Y, X) on the image's (cropped) grid with the probabilities behind them.

    `probabilities` is float16. Labels: (1, Z, Y, X), the probability of the winning label, 0 where that is background.
    Regions: (K, Z, Y, X), the probability of each region. `ties`: voxels where two labels are the highest once rounded
    to half precision, so that nnU-Net's rounding and not the network decided; the lower label has them.
    """

    labels: NDArray[Any]
    probabilities: HalfArray
    ties: int


def check_rule(rule: ResamplingKwargs) -> None:
    """BundleInvalid for ways of resampling logits that nnU-Net's planners never write and this module does not know."""
    if rule.function == "default" and (rule.order != 1 or rule.order_z not in (0, 1)):
        raise BundleInvalid(
            f"plans.json: resampling_fn_probabilities_kwargs: order {rule.order} with order_z {rule.order_z} is not "
            "supported; order 1 with order_z 0 or 1 is"
        )


def winning_labels(logits: FloatArray, labels: LabelManager) -> NDArray[Any]:
    """The rule of LabelManager.logits_to_labels for float32 (K, ...), without an index array of 8 bytes a voxel."""
    if labels.has_regions:
        return labels.logits_to_labels(logits)
    winners: NDArray[Any] = np.zeros(logits.shape[1:], dtype=labels.dtype)
    best = logits[0].copy()
    for head in range(1, logits.shape[0]):
        better = (logits[head] > best).view(np.uint8)
        # Heads ascend, so the larger number is the later winner.
        np.maximum(winners, better * winners.dtype.type(head), out=winners)
        np.maximum(best, logits[head], out=best)
    return winners


def segment(
    outputs: Sequence[NetworkLogits],
    shape: Shape,
    spacing_mm: Sequence[float],
    labels: LabelManager,
) -> Segmented:
    """`label_image` from arrays."""
    with RowThreads(1) as threads:
        return label_image([StoredLogits(output) for output in outputs], shape, spacing_mm, labels, threads)


def label_image(
    sources: Sequence[LogitSource],
    shape: Shape,
    spacing_mm: Sequence[float],
    labels: LabelManager,
    threads: RowThreads,
) -> Segmented:
    """Labels on the grid of `shape` and `spacing_mm` (network axes) from one configuration or an ensemble.

    One: the highest logit, the lowest head in a tie; regions: logit above 0, later regions overwrite earlier ones.
    Several: the same on the mean of their probabilities (regions: above 0.5), as nnU-Net's ensemble does.
    """
    result = np.zeros(shape, dtype=labels.dtype)
    maps = labels.num_heads if labels.has_regions else 1
    probabilities = np.zeros((maps, *shape), dtype=np.float16)
    grids = [_GridMap(source, shape, spacing_mm) for source in sources]
    if len(grids) == 1 and not labels.has_regions:
        ties = 0
        for part in grids[0].parts(by_bands=True):
            ties += _label_part(grids[0], part, result, probabilities[0], threads)
        return Segmented(labels=result, probabilities=probabilities, ties=ties)
    planes = [grid.planes() for grid in grids]
    for z in range(shape[0]):
        for each in planes:
            next(each)
        _label_plane(grids, z, result[z], probabilities[:, z], labels, threads)
    for each in planes:
        for _ in each:  # windows after the last plane that the image needs
            pass
    return Segmented(labels=result, probabilities=probabilities, ties=0)


def image_logits(source: LogitSource, shape: Shape, spacing_mm: Sequence[float], threads: RowThreads) -> FloatArray:
    """All logits float32 (K, Z, Y, X) on the grid of `shape` and `spacing_mm`, rounded to half precision where nnU-Net
    is: for those who need every class of every voxel."""
    grid = _GridMap(source, shape, spacing_mm)
    heads = grid.values.shape[2] - 1
    result = np.empty((heads, *shape), dtype=np.float32)

    def work(z: int) -> None:
        result[:, z] = _interpolated(grid, z, 0, shape[1], heads, shape[2])

    for part in grid.parts(by_bands=False):
        threads.each(work, range(part.first_z, part.last_z))
    return result


class _GridMap:
    """From one source's grid to the image's: which rows of the image its blocks allow, and what these are made of."""

    def __init__(self, source: LogitSource, shape: Shape, spacing_mm: Sequence[float]) -> None:
        self._source = source
        same = source.shape == shape
        self.is_halved = source.rule.function == "default" and not same
        apart = separate_axis(source.spacing_mm, spacing_mm, source.rule.force_separate_z)
        if same or (source.rule.function == "default" and source.rule.order_z == 1):
            apart = None
        self._z, self._y, self._x = (
            linear_axis(size, new, nearest=axis == apart)
            for axis, (size, new) in enumerate(zip(source.shape, shape, strict=True))
        )
        self._needed_z, self._needed_y = _last_needed(self._z), _last_needed(self._y)
        _, above, left = source.offset
        self._along_y, self.along_x = _indices(self._y, above), _indices(self._x, left)

    @property
    def values(self) -> FloatArray:
        return self._source.rows.values

    def slots(self, z: int) -> tuple[int, int]:
        """Of the two planes that plane z of the image lies between."""
        rows, below = self._source.rows, self._source.offset[0]
        return rows.slot(int(self._z.low[z]) + below), rows.slot(int(self._z.high[z]) + below)

    def weight(self, z: int) -> float:
        return float(self._z.weight[z])

    def along_y(self, first: int, last: int) -> _Indices:
        low, high, weight = self._along_y
        return low[first:last], high[first:last], weight[first:last]

    def parts(self, *, by_bands: bool) -> Iterator[Block]:
        """Rows of the image that can be read, in order; what is no longer needed for others is released when the next
        part is asked for."""
        first_z = kept_z = first_y = kept_y = 0
        for block in self._source.blocks(by_bands=by_bands):
            last_z = int(np.searchsorted(self._needed_z, block.last_z))
            last_y = int(np.searchsorted(self._needed_y, block.last_y))
            if first_z < last_z and first_y < last_y:
                yield Block(first_z, last_z, first_y, last_y)
            keep_z, keep_y = _first_needed(self._z, last_z, block.last_z), _first_needed(self._y, last_y, block.last_y)
            self._source.release(Block(kept_z, keep_z, kept_y, keep_y))
            first_y, kept_y = last_y, keep_y
            if block.last_y == self._source.shape[1]:
                first_z, kept_z, first_y, kept_y = last_z, keep_z, 0, 0

    def planes(self) -> Iterator[int]:
        """The planes of the image, one after the other; a plane can be read until the next is asked for."""
        for part in self.parts(by_bands=False):
            yield from range(part.first_z, part.last_z)


_Indices = tuple[NDArray[np.uint32], NDArray[np.uint32], FloatArray]


def _indices(axis: LinearAxis, offset: int) -> _Indices:
    return (axis.low + offset).astype(np.uint32), (axis.high + offset).astype(np.uint32), axis.weight


def _last_needed(axis: LinearAxis) -> NDArray[np.intp]:
    """The last sample of the source that each new one is made of; ascending."""
    return np.where(axis.weight > 0, axis.high, axis.low)


def _first_needed(axis: LinearAxis, index: int, final: int) -> int:
    """The first of the final samples that new ones from `index` on are made of."""
    return min(final, int(axis.low[index])) if index < len(axis.low) else final


def _label_part(
    grid: _GridMap, part: Block, labels: NDArray[Any], probabilities: HalfArray, threads: RowThreads
) -> int:
    """Labels of some rows of the image, and the probability of each; how many are tied."""
    heads, width = grid.values.shape[2] - 1, labels.shape[2]
    ties: list[int] = []

    def work(where: tuple[int, int]) -> None:
        z, first = where
        last = min(first + _ROWS, part.last_y)
        wide = np.empty((heads, width), dtype=np.float32)
        certain = np.empty((last - first, width), dtype=np.float32)
        ties.append(
            label_rows(
                grid.values,
                grid.slots(z),
                grid.weight(z),
                grid.along_y(first, last),
                grid.along_x,
                grid.is_halved,
                wide,
                wide.view(np.uint32),
                labels[z, first:last],
                certain,
            )
        )
        probabilities[z, first:last] = certain

    threads.each(work, product(range(part.first_z, part.last_z), range(part.first_y, part.last_y, _ROWS)))
    return sum(ties)


def _label_plane(
    grids: Sequence[_GridMap],
    z: int,
    result: NDArray[Any],
    probabilities: HalfArray,
    labels: LabelManager,
    threads: RowThreads,
) -> None:
    """Labels (Y, X) and probabilities (maps, Y, X) of plane z where those of regions, or of several sources, are to be
    known."""
    heads = labels.num_heads
    height, width = result.shape
    rows = max(1, _JOINT_VALUES // (heads * width))

    def work(first: int) -> None:
        last = min(first + rows, height)
        values = _interpolated(grids[0], z, first, last, heads, width)
        if len(grids) == 1:
            winners = winning_labels(values, labels)
            values = labels.probabilities(values)
        else:
            values = labels.probabilities(values)
            for grid in grids[1:]:
                values += labels.probabilities(_interpolated(grid, z, first, last, heads, width))
            values /= np.float32(len(grids))
            winners = labels.probabilities_to_labels(values) if labels.has_regions else winning_labels(values, labels)
        result[first:last] = winners
        if labels.has_regions:
            probabilities[:, first:last] = values
        else:
            probabilities[0, first:last] = np.where(winners > 0, values.max(axis=0), np.float32(0))

    threads.each(work, range(0, height, rows))


def _interpolated(grid: _GridMap, z: int, first: int, last: int, heads: int, width: int) -> FloatArray:
    """float32 (K, rows, X) of plane z of the image, rounded to half precision where nnU-Net is."""
    values = np.empty((heads, last - first, width), dtype=np.float32)
    interpolate_rows(
        grid.values,
        grid.slots(z),
        grid.weight(z),
        grid.along_y(first, last),
        grid.along_x,
        grid.is_halved,
        values,
        values.view(np.uint32),
    )
    return values
