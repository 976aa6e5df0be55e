"""Closed polygons → pixels: even-odd rule, a pixel belongs where its centre is inside or on the line.

Coordinates are pixel indices (x, y), so that pixel (row 3, column 5) has its centre at (5, 3). The line counts as
inside, so that the result does not depend on the direction of the axes, and contours drawn through pixel centres give
back the pixels that they were drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ON_THE_LINE = 0.01
"""A centre this near to the line (in pixels) is on it: contours are stored with few decimals."""


def even_odd(polygons: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """(rows, columns) of the closed polygons of one plane, each (n, 2) with n at least 1; what lies outside the shape
    is cut off. One inside another is a hole, side by side they add up. A polygon that runs to a hole and back along the
    same line (keyhole) leaves the hole out: the two lines cancel."""
    inside = np.zeros(shape, dtype=np.bool_)
    line = np.zeros(shape, dtype=np.bool_)
    for points in polygons:
        inside ^= inside_polygon(points, shape)
        line |= _on_line(points, shape)
    return inside | line


def inside_polygon(points_xy: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """(rows, columns) whose centres are inside one polygon; those on the line fall to either side."""
    rows, columns = shape
    start, end = points_xy, np.roll(points_xy, -1, axis=0)
    # Ends in a fixed order, so that an edge and its reverse cross a row at exactly the same place.
    upward = (start[:, 1] < end[:, 1])[:, None]
    low, high = np.where(upward, start, end), np.where(upward, end, start)
    first = np.maximum(np.ceil(low[:, 1]), 0)
    last = np.minimum(np.ceil(high[:, 1]) - 1, rows - 1)
    edge, row = _steps(first, last)
    along = (row - low[edge, 1]) / (high[edge, 1] - low[edge, 1])
    x = low[edge, 0] + along * (high[edge, 0] - low[edge, 0])
    crossings = np.zeros((rows, columns + 1), dtype=np.int32)
    np.add.at(crossings, (row, np.clip(np.ceil(x), 0, columns).astype(np.intp)), 1)
    inside: NDArray[np.bool_] = np.cumsum(crossings, axis=1)[:, :columns] % 2 == 1
    return inside


def _on_line(points_xy: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    marked = np.zeros(shape, dtype=np.bool_)
    start, end = points_xy, np.roll(points_xy, -1, axis=0)
    steep = np.abs(end[:, 1] - start[:, 1]) >= np.abs(end[:, 0] - start[:, 0])
    for chosen, main, other in ((steep, 1, 0), (~steep, 0, 1)):
        a, b = start[chosen], end[chosen]
        low, high = np.minimum(a[:, main], b[:, main]), np.maximum(a[:, main], b[:, main])
        limit = shape[0 if main == 1 else 1] - 1
        first = np.maximum(np.ceil(low - ON_THE_LINE), 0)
        last = np.minimum(np.floor(high + ON_THE_LINE), limit)
        edge, step = _steps(first, last)
        length = b[edge, main] - a[edge, main]
        along = np.divide(step - a[edge, main], length, out=np.zeros(len(edge)), where=length != 0)
        across = a[edge, other] + np.clip(along, 0, 1) * (b[edge, other] - a[edge, other])
        nearest = np.rint(across)
        on = (np.abs(across - nearest) <= ON_THE_LINE) & (nearest >= 0) & (nearest < shape[1 if main == 1 else 0])
        place = (step[on], nearest[on].astype(np.intp))
        marked[place if main == 1 else place[::-1]] = True
    return marked


def _steps(first: NDArray[np.float64], last: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """For each edge e the whole numbers first[e]..last[e]: indices of edges, and the numbers."""
    counts = np.maximum(last - first + 1, 0).astype(np.intp)
    edge = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    return edge, first[edge].astype(np.intp) + within
