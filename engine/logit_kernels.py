"""The loops over logits that numpy would take several passes and copies for, compiled by numba at their first use.

Rows: float32 (depth, Y, K + 1, X), a ring of planes (plane z is at z modulo depth); of each row the K heads and, as the
last entry, the sum of the windows' weights. What lies on the planes of one call is independent of other planes, and no
kernel holds the GIL: planes and rows can be shared out to threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IndexArray = NDArray[np.uint32]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

SURE = 14.0
"""Lead of the highest logit over the second from where the others count for nothing: exp(-14) is 8e-7."""
ENTROPY_SCALE = 65535.0
"""What an entropy of 1 bit is in a map of entropies."""


def compiled(function: Kernel) -> Kernel:
    """Kept on disk between processes where there is a place to keep it (else compiled again in each)."""
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        kernel: Kernel = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor in a home folder
        kernel = numba.njit(**options)(function)
    return kernel


@compiled
def add_window(
    rows: FloatArray,
    touched: NDArray[np.bool_],
    logits: FloatArray,
    weights: FloatArray,
    scale: float,
    corner: tuple[int, int, int],
    first: int,
    last: int,
) -> None:
    """Adds planes `first` to `last` of a window's logits (K, z, y, x), times `scale` and its weights (z, y, x), at
    `corner` (z, y, x); `touched` (depth, Y) says which rows hold something already."""
    heads, height, width = logits.shape[0], logits.shape[2], logits.shape[3]
    factor = np.float32(scale)
    start = corner[2]
    for z in range(first, last):
        slot = (corner[0] + z) % rows.shape[0]
        for y in range(height):
            row = rows[slot, corner[1] + y]
            if not touched[slot, corner[1] + y]:
                row[:, :] = np.float32(0)
                touched[slot, corner[1] + y] = True
            weight = weights[z, y]
            for head in range(heads):
                added = logits[head, z, y]
                total = row[head]
                for x in range(width):
                    total[start + x] += added[x] * (weight[x] * factor)
            total = row[heads]
            for x in range(width):
                total[start + x] += weight[x]


@compiled
def divide_rows(rows: FloatArray, slot: int, first: int, last: int) -> None:
    """Rows `first` to `last` of a plane: sums become weighted means."""
    heads = rows.shape[2] - 1
    for y in range(first, last):
        row = rows[slot, y]
        weight = row[heads]
        for head in range(heads):
            total = row[head]
            for x in range(total.shape[0]):
                total[x] /= weight[x]


@compiled
def halve_rows(bits: NDArray[np.uint32], slot: int, first: int, last: int) -> None:
    """Rows `first` to `last` of a plane, given as their bits: rounded to half precision; what is too large becomes its
    largest value."""
    largest = np.uint32(0x477FE000)
    for y in range(first, last):
        for head in range(bits.shape[2] - 1):
            values = bits[slot, y, head]
            _round(values)
            for x in range(values.shape[0]):
                size = values[x] & np.uint32(0x7FFFFFFF)
                values[x] = (values[x] & np.uint32(0x80000000)) | min(size, largest)


@compiled
def judge_rows(
    rows: FloatArray,
    slot: int,
    corner: tuple[int, int],
    winners: NDArray[Any],
    entropies: NDArray[np.uint16],
) -> None:
    """The winning head and the entropy of "the winner or not" of a part of a plane, which begins at `corner` (y, x).

    `winners` (rows, X) gets the lowest head in a tie. `entropies` (rows, X): 0 is certain, ENTROPY_SCALE one bit, which
    a probability of one half or less has.
    """
    heads = rows.shape[2] - 1
    width = winners.shape[1]
    best = np.empty(width, dtype=np.float32)
    second = np.empty(width, dtype=np.float32)
    winner = np.empty(width, dtype=np.int32)
    for y in range(winners.shape[0]):
        row = rows[slot, corner[0] + y]
        first_head = row[0]
        for x in range(width):
            best[x] = first_head[corner[1] + x]
            second[x] = -np.inf
            winner[x] = 0
        for head in range(1, heads):
            _compare(row[head, corner[1] : corner[1] + width], head, best, second, winner)
        for x in range(width):
            winners[y, x] = winner[x]
            entropies[y, x] = 0
            high = best[x]
            if high - second[x] < SURE:
                total = 0.0
                for head in range(heads):
                    total += math.exp(row[head, corner[1] + x] - high)
                entropies[y, x] = np.uint16(round(_bits(1.0 / total) * ENTROPY_SCALE))


@compiled
def judge_regions(rows: FloatArray, slot: int, corner: tuple[int, int], entropies: NDArray[np.uint16]) -> None:
    """The entropy of "in the region or not" of each region (K, rows, X) in a part of a plane, as in `judge_rows`; its
    lowest bit says whether the region's own head is above 0."""
    for head in range(entropies.shape[0]):
        for y in range(entropies.shape[1]):
            values = rows[slot, corner[0] + y, head]
            for x in range(entropies.shape[2]):
                value = values[corner[1] + x]
                entropy = _bits(1.0 / (1.0 + math.exp(-abs(value)))) if abs(value) < 100 else 0.0
                entropies[head, y, x] = np.uint16((round(entropy * ENTROPY_SCALE) & 0xFFFE) | (value > 0))


@compiled
def interpolate_rows(
    rows: FloatArray,
    slots: tuple[int, int],
    weight_z: float,
    along_y: tuple[IndexArray, IndexArray, FloatArray],
    along_x: tuple[IndexArray, IndexArray, FloatArray],
    is_halved: bool,
    result: FloatArray,
    bits: NDArray[np.uint32],
) -> None:
    """(K, rows, X) at new places: between the planes `slots`, and between rows and columns by (low, high, weight).

    `is_halved`: rounded to half precision. `bits` is the memory of `result` as uint32.
    """
    blended = np.empty(rows.shape[3], dtype=np.float32)
    for head in range(result.shape[0]):
        for index in range(result.shape[1]):
            _blend(rows, slots, np.float32(weight_z), along_y, index, head, blended)
            _spread(blended, along_x, result[head, index])
            if is_halved:
                _round(bits[head, index])


@compiled
def label_rows(
    rows: FloatArray,
    slots: tuple[int, int],
    weight_z: float,
    along_y: tuple[IndexArray, IndexArray, FloatArray],
    along_x: tuple[IndexArray, IndexArray, FloatArray],
    is_halved: bool,
    wide: FloatArray,
    bits: NDArray[np.uint32],
    labels: NDArray[Any],
    probabilities: NDArray[np.float32],
) -> int:
    """What `interpolate_rows` would give, as its winning head (rows, X) and, where that is not 0, its probability
    (rows, X; else 0); returns how many voxels have two winners, of which the lower is taken.

    `is_halved`: values are rounded to half precision before they are compared. `wide` float32 (K, X) and `bits`, its
    memory as uint32, are working space.
    """
    heads, width = wide.shape
    blended = np.empty(rows.shape[3], dtype=np.float32)
    best = np.empty(width, dtype=np.float32)
    second = np.empty(width, dtype=np.float32)
    winner = np.empty(width, dtype=np.int32)
    ties = 0
    for index in range(labels.shape[0]):
        for x in range(width):
            best[x] = -np.inf
            second[x] = -np.inf
            winner[x] = 0
        for head in range(heads):
            _blend(rows, slots, np.float32(weight_z), along_y, index, head, blended)
            values = wide[head]
            _spread(blended, along_x, values)
            if is_halved:
                _round(bits[head])
            _compare(values, head, best, second, winner)
        tied = 0
        for x in range(width):
            labels[index, x] = winner[x]
            probabilities[index, x] = np.float32(winner[x] > 0)
            tied += best[x] == second[x]
        ties += tied
        for x in range(width):
            high = best[x]
            if winner[x] > 0 and high - second[x] < SURE:
                total = 0.0
                for head in range(heads):
                    total += math.exp(wide[head, x] - high)
                probabilities[index, x] = 1.0 / total
    return ties


@compiled
def count_pairs(first: FloatArray, second: FloatArray, weights: FloatArray, table: NDArray[np.float64]) -> None:
    """Adds to `table` [winner in first, winner in second] the weight (z, y, x) of each voxel of two windows' logits
    (K, z, y, x)."""
    heads, depth, height, width = first.shape
    best = np.empty((2, width), dtype=np.float32)
    winner = np.zeros((2, width), dtype=np.int32)
    for z in range(depth):
        for y in range(height):
            for which in range(2):
                logits = first if which == 0 else second
                high, win = best[which], winner[which]
                for x in range(width):
                    high[x] = -np.inf
                    win[x] = 0
                for head in range(heads):
                    values = logits[head, z, y]
                    for x in range(width):
                        value = values[x]
                        win[x] = head if value > high[x] else win[x]
                        high[x] = max(value, high[x])
            for x in range(width):
                table[winner[0, x], winner[1, x]] += weights[z, y, x]


@compiled
def _compare(values: FloatArray, head: int, best: FloatArray, second: FloatArray, winner: NDArray[np.int32]) -> None:
    """Takes one more head into the highest and the second highest value, and whose the highest is; of equal ones the
    first keeps it."""
    for x in range(values.shape[0]):
        value = values[x]
        high = best[x]
        second[x] = max(second[x], min(value, high))
        winner[x] = head if value > high else winner[x]
        best[x] = max(value, high)


@compiled
def _blend(
    rows: FloatArray,
    slots: tuple[int, int],
    weight_z: np.float32,
    along_y: tuple[IndexArray, IndexArray, FloatArray],
    index: int,
    head: int,
    blended: FloatArray,
) -> None:
    low, high, weight_y = along_y[0][index], along_y[1][index], along_y[2][index]
    one, two = rows[slots[0], low, head], rows[slots[1], low, head]
    if weight_y == 0:
        for x in range(blended.shape[0]):
            blended[x] = one[x] + weight_z * (two[x] - one[x])
        return
    three, four = rows[slots[0], high, head], rows[slots[1], high, head]
    for x in range(blended.shape[0]):
        upper = one[x] + weight_z * (two[x] - one[x])
        lower = three[x] + weight_z * (four[x] - three[x])
        blended[x] = upper + weight_y * (lower - upper)


@compiled
def _spread(blended: FloatArray, along_x: tuple[IndexArray, IndexArray, FloatArray], result: FloatArray) -> None:
    low, high, weight = along_x
    for x in range(result.shape[0]):
        left = blended[low[x]]
        result[x] = left + weight[x] * (blended[high[x]] - left)


@compiled
def _round(bits: NDArray[np.uint32]) -> None:
    """float32 values, as their bits, to the 11 significant bits of half precision, ties to even."""
    for x in range(bits.shape[0]):
        value = bits[x]
        bits[x] = (value + np.uint32(0xFFF) + ((value >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)


@compiled
def _bits(probability: float) -> float:
    """Entropy of a yes with this probability, in bits; of one half or less, 1."""
    if probability <= 0.5:
        return 1.0
    no = 1.0 - probability
    if no <= 0.0:
        return 0.0
    return -(probability * math.log2(probability) + no * math.log2(no))
