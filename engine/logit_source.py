"""Where the logits of one configuration come from, block by block: an array, or the windows as they are computed
(engine/logit_stream.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.logit_rows import LogitRows
from engine.plans import ResamplingKwargs
from engine.resampling import Shape

FloatArray = NDArray[np.float32]
HalfArray = NDArray[np.float16]

_HALF_MAXIMUM = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Block:
    """Rows `first_y` to `last_y` (not included) of the planes `first_z` to `last_z`, which are final.

    Blocks come in order: all rows of some planes, in one block or several, then the planes after them.
    """

    first_z: int
    last_z: int
    first_y: int
    last_y: int


class LogitSource(Protocol):
    """Logits on one network's grid, half precision in float32.

    The grid has `shape` (Z, Y, X) and `spacing_mm`; its voxel (z, y, x) is in `rows` at (z, y, x) + `offset`. What a
    block made final stays in `rows` until it is released, and at most one plane before the last block may be kept.
    """

    @property
    def rows(self) -> LogitRows: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def spacing_mm(self) -> tuple[float, float, float]: ...
    @property
    def rule(self) -> ResamplingKwargs: ...
    @property
    def offset(self) -> tuple[int, int, int]: ...

    def blocks(self, *, by_bands: bool) -> Iterator[Block]:
        """Computes the next block; `by_bands` gives rows as early as they are final, which takes less memory."""
        ...

    def release(self, block: Block) -> None:
        """The block is not read any more."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkLogits:
    """Mean logits of one configuration: float16 (K, Z, Y, X) on its network's grid with `spacing_mm`."""

    logits: HalfArray
    spacing_mm: tuple[float, float, float]
    rule: ResamplingKwargs


def to_half(logits: FloatArray) -> HalfArray:
    """Half precision as nnU-Net stores logits, without its overflow: what is too large becomes the largest value."""
    half: HalfArray = np.clip(logits, -_HALF_MAXIMUM, _HALF_MAXIMUM).astype(np.float16)
    return half


class StoredLogits:
    """A LogitSource from an array; a plane is a block."""

    offset = (0, 0, 0)

    def __init__(self, stored: NetworkLogits) -> None:
        heads, z, y, x = stored.logits.shape
        self.shape: Shape = (z, y, x)
        self.spacing_mm = stored.spacing_mm
        self.rule = stored.rule
        self.rows = LogitRows(heads, 3, (y, x))
        self._logits = stored.logits

    def blocks(self, *, by_bands: bool) -> Iterator[Block]:
        """A plane each, whole in any case."""
        for z in range(self.shape[0]):
            self.rows.put(z, self._logits[:, z])
            yield Block(z, z + 1, 0, self.shape[1])

    def release(self, block: Block) -> None:
        """Nothing: the next plane is written over the oldest."""
