"""The sums of windows that are not finished yet: a ring of planes, of which only the rows in use take memory.

The logits of a whole image would be classes x voxels; a window reaches over a few planes only, so at any time the sums
of these planes are all that is needed. Rows that a window has not reached yet take no memory, rows that were read for
the last time give theirs back.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.logit_kernels import add_window, divide_rows, halve_rows
from engine.row_threads import RowThreads

FloatArray = NDArray[np.float32]


class LogitRows:
    """float32 rows of `heads` logits and, as the last entry, the sum of weights, over planes of `shape` (Y, X).

    Plane z is kept at z modulo `depth`: at most `depth` neighbouring planes are in use at a time, which is the caller's
    duty. With `folder` the memory is a file there without a name, which ends with the process: slower, the same
    values. Raises OSError where the disk has no room for it.
    """

    def __init__(self, heads: int, depth: int, shape: tuple[int, int], *, folder: Path | None = None) -> None:
        height, width = shape
        dimensions = (depth, height, heads + 1, width)
        size = int(np.prod(dimensions)) * 4
        self._is_file = folder is not None
        if folder is None:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            with tempfile.TemporaryFile(dir=folder) as file:
                # Reserved at once: on a disk that fills up later, writing to memory would end the process.
                os.posix_fallocate(file.fileno(), 0, size)
                self._memory = mmap.mmap(file.fileno(), size)
        self.values: FloatArray = np.frombuffer(self._memory, dtype=np.float32).reshape(dimensions)
        self._touched: NDArray[np.bool_] = np.zeros((depth, height), dtype=np.bool_)
        self._row_bytes = dimensions[2] * dimensions[3] * 4

    @property
    def depth(self) -> int:
        return int(self.values.shape[0])

    def slot(self, z: int) -> int:
        """Where plane z is kept."""
        return z % self.depth

    def add(
        self,
        logits: FloatArray,
        weights: FloatArray,
        corner: tuple[int, int, int],
        threads: RowThreads,
        *,
        scale: float = 1.0,
    ) -> None:
        """Adds a window's logits (K, z, y, x), times `scale` and its weights (z, y, x), at `corner` (z, y, x)."""
        threads.share(
            weights.shape[0],
            lambda first, last: add_window(self.values, self._touched, logits, weights, scale, corner, first, last),
        )

    def put(self, z: int, planes: NDArray[np.floating]) -> None:
        """The finished logits (K, Y, X) of plane z, from elsewhere."""
        slot = self.slot(z)
        self.values[slot, :, :-1] = planes.transpose(1, 0, 2)
        self._touched[slot] = True

    def divide(self, z: int, first: int, last: int) -> None:
        """Sums become weighted means, in rows `first` to `last` of plane z."""
        divide_rows(self.values, self.slot(z), first, last)

    def average(self, others: list[LogitRows], z: int, first: int, last: int) -> None:
        """The mean of these rows and the same rows of others."""
        if not others:
            return
        here = self.values[self.slot(z), first:last]
        for other in others:
            here += other.values[other.slot(z), first:last]
        here /= np.float32(1 + len(others))

    def halve(self, z: int, first: int, last: int) -> None:
        """Rounds rows to half precision, as which nnU-Net keeps logits, without its overflow: what is too large becomes
        the largest value."""
        halve_rows(self.values.view(np.uint32), self.slot(z), first, last)

    def release(self, z: int, first: int, last: int) -> None:
        """Rows that are not needed any more; the next window finds them empty."""
        slot = self.slot(z)
        self._touched[slot, first:last] = False
        if self._is_file or last <= first:
            return
        start = (slot * self.values.shape[1] + first) * self._row_bytes
        start_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end_page = (start + (last - first) * self._row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end_page > start_page:
            self._memory.madvise(mmap.MADV_DONTNEED, start_page, end_page - start_page)
