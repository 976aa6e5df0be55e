"""Logits for benchmarks of the export: of each class a smooth random field, so that blobs of one class lie beside blobs
of another. Any box of them can be made alone: they need not exist as a whole.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engine.resampling import Shape, linear_axis
from engine.sliding_window import WindowGrid

FloatArray = NDArray[np.float32]

SEED = 20240117
# Voxels between two knots of a field, which are drawn from a normal distribution of this width.
_KNOT_DISTANCE = 16
_WIDTH = 5.0
_BACKGROUND_LEAD = 6.0


class BlobLogits:
    """Logits of `classes`, the first of which is the background, on a grid of `shape` (Z, Y, X); a seed, one image."""

    def __init__(self, classes: int, shape: Shape, *, seed: int = SEED) -> None:
        self.classes = classes
        self.shape = shape
        knots = [2 + size // _KNOT_DISTANCE for size in shape]
        draw = np.random.default_rng(seed)
        self._knots: FloatArray = draw.normal(0.0, _WIDTH, (classes, *knots)).astype(np.float32)
        self._knots[0] += np.float32(_BACKGROUND_LEAD)
        self._along = [_interpolation(count, size) for count, size in zip(knots, shape, strict=True)]

    def fill(self, first: tuple[int, int, int], result: FloatArray) -> None:
        """The logits of the box (classes, z, y, x) that begins at `first`, into `result`."""
        z, y, x = (
            matrix[start : start + size]
            for matrix, start, size in zip(self._along, first, result.shape[1:], strict=True)
        )
        for head in range(self.classes):
            planes = np.tensordot(z, self._knots[head], axes=(1, 0))  # (z, knots along y, knots along x)
            np.matmul(y @ planes, x.T, out=result[head])

    def planes(self) -> Iterator[FloatArray]:
        """All planes of the first axis, each (classes, Y, X), one after the other in one array."""
        box = np.empty((self.classes, 1, *self.shape[1:]), dtype=np.float32)
        for z in range(self.shape[0]):
            self.fill((z, 0, 0), box)
            yield box[:, 0]


class BlobNetwork:
    """A Backend that answers the windows of `grid`, which must come in the grid's order, with BlobLogits.

    `cpu_s` and `wall_s` are what making them took. The answer lies in one array that is used again.
    """

    name = "blobs"
    version = "1"
    provider = "cpu"
    precision = "float32"
    threads = 1
    batch = 1

    def __init__(self, logits: BlobLogits, grid: WindowGrid) -> None:
        if grid.shape != grid.padded_shape:
            raise ValueError(f"a grid of {grid.shape} is smaller than the window of {grid.patch_size}")
        self.cpu_s = 0.0
        self.wall_s = 0.0
        self._logits = logits
        self._corners = itertools.product(*grid.positions())
        self._answer = np.empty((1, logits.classes, *grid.patch_size), dtype=np.float32)

    def run(self, batch: FloatArray) -> FloatArray:
        """See Backend; the image is not looked at."""
        cpu, wall = time.process_time(), time.perf_counter()
        z, y, x = next(self._corners)
        self._logits.fill((z, y, x), self._answer[0])
        self.cpu_s += time.process_time() - cpu
        self.wall_s += time.perf_counter() - wall
        return self._answer[: batch.shape[0]]

    def close(self) -> None:
        """Nothing is held."""


def _interpolation(knots: int, size: int) -> FloatArray:
    """(size, knots): the weights of a linear interpolation."""
    axis = linear_axis(knots, size, nearest=False)
    matrix = np.zeros((size, knots), dtype=np.float32)
    rows = np.arange(size)
    np.add.at(matrix, (rows, axis.low), 1 - axis.weight)
    np.add.at(matrix, (rows, axis.high), axis.weight)
    return matrix
