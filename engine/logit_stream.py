"""The logits of one configuration as its windows are computed, plane by plane: they never exist as a whole.

They are summed in float32 (nnU-Net sums in half precision, which can overflow).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.backends import Backend
from engine.certainty_maps import CertaintyMaps
from engine.errors import BackendFailed
from engine.labels import LabelManager
from engine.logit_rows import LogitRows
from engine.logit_source import Block, NetworkLogits
from engine.plans import ResamplingKwargs
from engine.resampling import Shape
from engine.row_threads import RowThreads
from engine.sliding_window import WindowGrid, gaussian_weights, mirror_combinations

FloatArray = NDArray[np.float32]

# Called for each window with the logits (K, z, y, x) of the unmirrored pass, those of the mean of the mirrored passes,
# and the weights (z, y, x) of the voxels.
MirrorObserver = Callable[[FloatArray, FloatArray, FloatArray], None]


class LogitStream:
    """The LogitSource of one configuration: the mean of `networks` over the windows of `grid` on an image float32
    (C, Z, Y, X).

    `mirror_axes` are spatial axes of the patch. `advance` is called after each window of each network. When all blocks
    were read, `certainties` holds the maps of each network, and `seconds` what the windows took (wall time). `folder`:
    where the sums are kept in a file instead of in memory. Raises BackendFailed when a network returns another shape
    than (N, heads, *patch) or values that are not finite.
    """

    def __init__(
        self,
        image: FloatArray,
        grid: WindowGrid,
        networks: Sequence[Backend],
        *,
        labels: LabelManager,
        spacing_mm: tuple[float, float, float],
        rule: ResamplingKwargs,
        threads: RowThreads,
        mirror_axes: Sequence[int] = (),
        advance: Callable[[], None] = lambda: None,
        observe_mirroring: MirrorObserver | None = None,
        folder: Path | None = None,
    ) -> None:
        self.shape = grid.shape
        self.spacing_mm = spacing_mm
        self.rule = rule
        padding = grid.padding
        self.offset = (padding[0][0], padding[1][0], padding[2][0])
        self._image = np.pad(image, ((0, 0), *padding)) if any(map(any, padding)) else image
        self._grid = grid
        self._networks = networks
        self._labels = labels
        self._threads = threads
        self._passes: tuple[tuple[int, ...], ...] = ((), *mirror_combinations(mirror_axes))
        self._advance = advance
        self._observe = observe_mirroring
        patch = grid.patch_size
        self._patch: Shape = (1, patch[0], patch[1]) if grid.is_2d else (patch[0], patch[1], patch[2])
        self._weights = gaussian_weights(patch).reshape(self._patch)
        depth, height, width = grid.padded_shape
        ring = min(self._patch[0] + 1, depth)
        self._all_rows = [LogitRows(labels.num_heads, ring, (height, width), folder=folder) for _ in networks]
        self.rows = self._all_rows[0]
        self.seconds = 0.0
        self.certainties = [CertaintyMaps.empty(self.shape, labels) for _ in networks]

    def blocks(self, *, by_bands: bool) -> Iterator[Block]:
        """See LogitSource."""
        depth, height, _ = self._grid.padded_shape
        starts = self._grid.positions()
        along_z = range(depth) if self._grid.is_2d else starts[0]
        along_y = starts[-2]
        for z, next_z in pairwise((*along_z, depth)):
            for y, next_y in pairwise((*along_y, height)):
                begun = time.perf_counter()
                for x in starts[-1]:
                    self._add_window(z, y, x)
                self.seconds += time.perf_counter() - begun
                if by_bands and (block := self._finish(z, next_z, y, next_y)) is not None:
                    yield block
            if not by_bands and (block := self._finish(z, next_z, 0, height)) is not None:
                yield block

    def release(self, block: Block) -> None:
        """See LogitSource. Rows of the padding go with the image's first and last."""
        z, y, _ = self.offset
        first = block.first_y + y if block.first_y else 0
        last = block.last_y + y if block.last_y < self.shape[1] else self._grid.padded_shape[1]
        for plane in range(block.first_z + z, block.last_z + z):
            self.rows.release(plane, first, last)

    def _add_window(self, z: int, y: int, x: int) -> None:
        depth, height, width = self._patch
        patch = self._image[:, z : z + depth, y : y + height, x : x + width]
        if self._grid.is_2d:
            patch = patch[:, 0]
        for network, rows in zip(self._networks, self._all_rows, strict=True):
            logits, mirrored = self._run(network, patch)
            if mirrored is not None:
                if self._observe is not None:
                    self._observe(logits, mirrored / np.float32(len(self._passes) - 1), self._weights)
                mirrored += logits
                logits = mirrored
            rows.add(logits, self._weights, (z, y, x), self._threads, scale=1.0 / len(self._passes))
            self._advance()

    def _run(self, network: Backend, patch: FloatArray) -> tuple[FloatArray, FloatArray | None]:
        """Logits (K, z, y, x) of the unmirrored pass, and the sum of the mirrored ones, turned back."""
        plain: FloatArray | None = None
        mirrored: FloatArray | None = None
        for first in range(0, len(self._passes), network.batch):
            passes = self._passes[first : first + network.batch]
            batch = np.stack([np.flip(patch, tuple(1 + axis for axis in axes)) for axes in passes])
            answers = self._checked(network, network.run(batch), batch)
            for axes, answer in zip(passes, answers, strict=True):
                turned = np.flip(answer, tuple(1 + axis for axis in axes))
                if plain is None:
                    plain = turned
                elif mirrored is None:
                    mirrored = turned.copy()
                else:
                    mirrored += turned
        if plain is None:
            raise BackendFailed(f"{network.name}: no pass was run")
        shape = (self._labels.num_heads, *self._patch)
        return plain.reshape(shape), None if mirrored is None else mirrored.reshape(shape)

    def _checked(self, network: Backend, logits: FloatArray, batch: FloatArray) -> FloatArray:
        expected = (batch.shape[0], self._labels.num_heads, *batch.shape[2:])
        if logits.shape != expected:
            raise BackendFailed(f"{network.name}: the network returned {logits.shape} where {expected} was expected")
        if not all(np.isfinite(answer).all() for answer in logits):
            raise BackendFailed(f"{network.name}: the network returned values that are not finite")
        return logits

    def _finish(self, z: int, next_z: int, y: int, next_y: int) -> Block | None:
        """No window reaches these rows any more: judges each network's, and leaves their mean in `rows`. The block of
        the image that lies in them, None where all is padding."""
        below, above, _ = self.offset
        depth, height, _ = self.shape
        block = Block(max(z - below, 0), min(next_z - below, depth), max(y - above, 0), min(next_y - above, height))
        if block.first_z >= block.last_z or block.first_y >= block.last_y:
            self._threads.each(lambda plane: self._drop(plane, y, next_y), range(z, next_z))
            return None
        self._threads.each(lambda plane: self._finish_plane(plane, block), range(block.first_z, block.last_z))
        return block

    def _drop(self, plane: int, y: int, next_y: int) -> None:
        for rows in self._all_rows:
            rows.release(plane, y, next_y)

    def _finish_plane(self, z: int, block: Block) -> None:
        below, above, _ = self.offset
        plane, first, last = z + below, block.first_y + above, block.last_y + above
        for rows, maps in zip(self._all_rows, self.certainties, strict=True):
            rows.divide(plane, first, last)
            maps.judge(rows, self._labels, z, (block.first_y, block.last_y), self.offset)
        self.rows.average(self._all_rows[1:], plane, first, last)
        for rows in self._all_rows[1:]:
            rows.release(plane, first, last)
        self.rows.halve(plane, first, last)


def stored_logits(stream: LogitStream) -> NetworkLogits:
    """All logits of a stream, where they are needed as a whole."""
    result = np.empty((stream.rows.values.shape[2] - 1, *stream.shape), dtype=np.float16)
    below, above, left = stream.offset
    for block in stream.blocks(by_bands=True):
        rows = slice(block.first_y + above, block.last_y + above)
        for z in range(block.first_z, block.last_z):
            values = stream.rows.values[stream.rows.slot(z + below), rows, :-1, left : left + stream.shape[2]]
            result[:, z, block.first_y : block.last_y] = values.transpose(1, 0, 2)
        stream.release(block)
    return NetworkLogits(logits=result, spacing_mm=stream.spacing_mm, rule=stream.rule)
