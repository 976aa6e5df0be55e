"""Logits on the network's grid → labels on the image's grid, a slab of rows at a time.

Gives the labels that nnU-Net gives: its array of resampled logits is half precision, so values are rounded to half
precision before they are compared. Never holds all classes of the whole volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import BundleInvalid
from engine.labels import LabelManager
from engine.plans import ResamplingKwargs
from engine.resampling import LinearAxis, Shape, linear_axis, separate_axis

FloatArray = NDArray[np.float32]
HalfArray = NDArray[np.float16]

# Interpolated values of all heads that are held at a time; small enough to stay in the cache of a core.
_SLAB_VALUES = 262_144
# Rows and columns that are interpolated by one small matrix: of a larger one nearly all entries would be 0. These sizes
# also stay below 262144 multiplications, from where OpenBLAS starts threads that cost more than the product itself.
_TILE = 32
_WIDE_TILE = 128
# Above this share of foreground the softmax of a whole slab is cheaper than picking voxels.
_DENSE = 0.3
_HALF_MAXIMUM = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkLogits:
    """Mean logits of one configuration: float16 (K, Z, Y, X) on its network's grid with `spacing_mm`."""

    logits: HalfArray
    spacing_mm: tuple[float, float, float]
    rule: ResamplingKwargs


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmented:
    """Labels (Z, Y, X) on the image's (cropped) grid with the probabilities behind them.

    `probabilities` is float16. Labels: (1, Z, Y, X), the probability of the winning label, 0 where that is background.
    Regions: (K, Z, Y, X), the probability of each region.
    """

    labels: NDArray[Any]
    probabilities: HalfArray


def to_half(logits: FloatArray) -> HalfArray:
    """Half precision as nnU-Net stores logits, without its overflow: what is too large becomes the largest value."""
    half: HalfArray = np.clip(logits, -_HALF_MAXIMUM, _HALF_MAXIMUM).astype(np.float16)
    return half


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
    """Labels on the grid of `shape` and `spacing_mm` (network axes) from one configuration or an ensemble.

    One: the highest logit, the lowest head in a tie; regions: logit above 0, later regions overwrite earlier ones.
    Several: the same on the mean of their probabilities (regions: above 0.5), as nnU-Net's ensemble does.
    """
    sources = [_Slabs(output, shape, spacing_mm) for output in outputs]
    heads = labels.num_heads
    result = np.zeros(shape, dtype=labels.dtype)
    probabilities = np.zeros((heads if labels.has_regions else 1, *shape), dtype=np.float16)
    rows = max(1, min(shape[1], _TILE, _SLAB_VALUES // (heads * shape[2])))
    for z in range(shape[0]):
        for first in range(0, shape[1], rows):
            here = (z, slice(first, first + rows))
            values = sources[0].rows(z, first, rows)
            if len(sources) == 1:
                winners = winning_labels(values, labels)
                if labels.has_regions:
                    values = labels.probabilities(values)
            else:
                values = labels.probabilities(values)
                for source in sources[1:]:
                    values += labels.probabilities(source.rows(z, first, rows))
                values /= np.float32(len(sources))
                winners = (
                    labels.probabilities_to_labels(values) if labels.has_regions else winning_labels(values, labels)
                )
            result[here] = winners
            if labels.has_regions:
                probabilities[(slice(None), *here)] = values
                continue
            probabilities[(0, *here)] = _certainty(values, winners, are_logits=len(sources) == 1)
    return Segmented(labels=result, probabilities=probabilities)


def _certainty(values: FloatArray, winners: NDArray[Any], *, are_logits: bool) -> FloatArray:
    """Probability of the winning label (rows, X) from logits or probabilities (K, rows, X); 0 in the background."""
    result = np.zeros(winners.shape, dtype=np.float32)
    found = np.flatnonzero(winners)
    if found.size == 0:
        return result
    dense = found.size > _DENSE * winners.size
    there = values if dense else values.reshape(values.shape[0], -1).take(found, axis=1)
    certain = there.max(axis=0)
    if are_logits:
        # Only the winner's softmax is needed: 1 over the sum of all heads relative to it.
        certain = 1.0 / np.exp(there - certain).sum(axis=0)
    if dense:
        return np.where(winners > 0, certain, result)
    result.ravel()[found] = certain
    return result


def _round_to_half(values: FloatArray) -> None:
    """Rounds contiguous float32 values in place to the 11 significant bits of half precision, ties to even."""
    bits = values.view(np.uint32)
    carry = bits >> np.uint32(13)
    carry &= np.uint32(1)
    carry += np.uint32(0xFFF)
    bits += carry
    bits &= np.uint32(0xFFFFE000)


@dataclass(frozen=True, eq=False)
class _Tile:
    """Columns `to` of the result as a matrix product of the columns `source`."""

    to: slice
    source: slice
    matrix: FloatArray


def _tiles(axis: LinearAxis) -> tuple[_Tile, ...]:
    tiles = []
    for first in range(0, len(axis.low), _TILE):
        to = slice(first, min(first + _TILE, len(axis.low)))
        start, stop = int(axis.low[first]), int(axis.high[to.stop - 1]) + 1
        part = LinearAxis(axis.low[to] - start, axis.high[to] - start, axis.weight[to])
        tiles.append(_Tile(to, slice(start, stop), part.matrix(stop - start)))
    return tuple(tiles)


class _Slabs:
    """Interpolates rows of one plane of all heads, in float32, rounded to half precision where nnU-Net is."""

    def __init__(self, output: NetworkLogits, shape: Shape, spacing_mm: Sequence[float]) -> None:
        self._logits = output.logits
        source = output.logits.shape[1:]
        self._same = source == shape
        self._halved = output.rule.function == "default"
        if self._same:
            return
        apart = separate_axis(output.spacing_mm, spacing_mm, output.rule.force_separate_z)
        if output.rule.function == "default" and output.rule.order_z == 1:
            apart = None
        self._z, self._y, x = (
            linear_axis(size, new, nearest=axis == apart)
            for axis, (size, new) in enumerate(zip(source, shape, strict=True))
        )
        self._width = shape[2]
        self._columns = () if source[2] == shape[2] else _tiles(x)

    def rows(self, z: int, first: int, count: int) -> FloatArray:
        """float32 (K, rows, X) of plane z, contiguous."""
        if self._same:
            return self._logits[:, z, first : first + count].astype(np.float32)
        y = self._y
        low, high = y.low[first : first + count], y.high[first : first + count]
        same = self._logits.shape[2] == len(y.low)
        # The upper neighbour of a row that lies on a row of the logits counts for nothing and is not a row to return.
        start, stop = int(low[0]), int(low[-1] if same else high[-1]) + 1
        block = self._blend(z, start, stop)
        heads, height, _ = block.shape
        if self._columns:
            wide = np.empty((heads, height, self._width), dtype=np.float32)
            for tile in self._columns:
                np.matmul(block[:, :, tile.source], tile.matrix, out=wide[:, :, tile.to])
            block = wide
        if same:
            result = block
        else:
            part = LinearAxis(low - start, high - start, y.weight[first : first + count])
            matrix = np.ascontiguousarray(part.matrix(height).T)
            result = np.empty((heads, len(low), self._width), dtype=np.float32)
            for column in range(0, self._width, _WIDE_TILE):
                to = slice(column, column + _WIDE_TILE)
                np.matmul(matrix, block[:, :, to], out=result[:, :, to])
        if self._halved:
            _round_to_half(result)
        return result

    def _blend(self, z: int, start: int, stop: int) -> FloatArray:
        along: LinearAxis = self._z
        low, high, weight = int(along.low[z]), int(along.high[z]), along.weight[z]
        block: FloatArray = self._logits[:, low, start:stop].astype(np.float32)
        if weight > 0:
            upper = self._logits[:, high, start:stop].astype(np.float32)
            upper -= block
            upper *= weight
            block += upper
        return block
