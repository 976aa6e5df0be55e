"""nnU-Net's sliding window: window positions, Gaussian weights, mirrored passes (nnU-Net v2).

Images are (C, Z, Y, X) on the network's grid; a 2D network sees one slice of the first axis at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

FloatArray = NDArray[np.float32]

_SIGMA_SCALE = 1.0 / 8.0
_GAUSSIAN_MAXIMUM = 10.0


def window_positions(size: int, patch: int, step_size: float) -> tuple[int, ...]:
    """Starts of the windows along one axis, `size` >= `patch`: evened out so that the last one ends at the edge."""
    if size < patch:
        raise ValueError(f"axis of {size} voxels is shorter than the patch of {patch}: pad first")
    count = math.ceil((size - patch) / (patch * step_size)) + 1
    if count == 1:
        return (0,)
    step = (size - patch) / (count - 1)
    return tuple(round(step * index) for index in range(count))


@lru_cache(maxsize=8)
def gaussian_weights(patch_size: tuple[int, ...]) -> FloatArray:
    """Importance of each voxel of a window: sigma = patch / 8, scaled to a maximum of 10, never 0. Read-only."""
    delta = np.zeros(patch_size, dtype=np.float64)
    delta[tuple(edge // 2 for edge in patch_size)] = 1.0
    weights = ndimage.gaussian_filter(
        delta, [edge * _SIGMA_SCALE for edge in patch_size], order=0, mode="constant", cval=0.0
    )
    weights = (weights * (_GAUSSIAN_MAXIMUM / weights.max())).astype(np.float32)
    # nnU-Net keeps these weights in half precision; what vanishes there must not divide by zero.
    halved: FloatArray = weights.astype(np.float16).astype(np.float32)
    halved[halved == 0] = halved[halved > 0].min()
    halved.setflags(write=False)
    return halved


def mirror_combinations(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """All non-empty subsets of the mirror axes, in nnU-Net's order."""
    return tuple(subset for count in range(1, len(axes) + 1) for subset in combinations(sorted(axes), count))


@dataclass(frozen=True, kw_only=True)
class WindowGrid:
    """All windows over an image of `shape` (Z, Y, X), which is padded with zeros where it is smaller than the patch."""

    shape: tuple[int, int, int]
    patch_size: tuple[int, ...]
    step_size: float

    @property
    def is_2d(self) -> bool:
        return len(self.patch_size) == 2

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Voxels added (below, above) on each of the three axes; the odd one goes above."""
        patch = (1, *self.patch_size) if self.is_2d else self.patch_size
        missing = [max(0, edge - size) for edge, size in zip(patch, self.shape, strict=True)]
        z, y, x = ((need // 2, need - need // 2) for need in missing)
        return z, y, x

    @property
    def padded_shape(self) -> tuple[int, int, int]:
        z, y, x = (size + below + above for size, (below, above) in zip(self.shape, self.padding, strict=True))
        return z, y, x

    def positions(self) -> tuple[tuple[int, ...], ...]:
        """Starts along each axis of the patch."""
        sizes = self.padded_shape[1:] if self.is_2d else self.padded_shape
        return tuple(
            window_positions(size, patch, self.step_size) for size, patch in zip(sizes, self.patch_size, strict=True)
        )

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.positions()) * (self.padded_shape[0] if self.is_2d else 1)
