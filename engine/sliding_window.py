"""nnU-Net's sliding window: window positions, Gaussian weights, mirrored passes (nnU-Net v2).

Images are (C, Z, Y, X) on the network's grid; a 2D network sees one slice of the first axis at a time. Logits are
summed in float32 (nnU-Net sums in half precision, which can overflow).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engine.backends import Backend
from engine.errors import BackendFailed

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """One position: `plane` is the slice of a 2D network (None in 3D), `starts` the corner on the padded grid."""

    plane: int | None
    starts: tuple[int, ...]


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

    def windows(self) -> Iterator[Window]:
        """In nnU-Net's order, the last axis fastest."""
        planes: Sequence[int | None] = range(self.padded_shape[0]) if self.is_2d else (None,)
        for plane in planes:
            for starts in product(*self.positions()):
                yield Window(plane=plane, starts=starts)

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.positions()) * (self.padded_shape[0] if self.is_2d else 1)


# Called for each window with the logits (K, *patch) of the unmirrored pass, those of the mean of the mirrored passes,
# and the weights of the voxels.
MirrorObserver = Callable[[FloatArray, FloatArray, FloatArray], None]


def predict_logits(
    image: FloatArray,
    grid: WindowGrid,
    backend: Backend,
    *,
    heads: int,
    mirror_axes: Sequence[int] = (),
    advance: Callable[[], None] = lambda: None,
    observe_mirroring: MirrorObserver | None = None,
) -> FloatArray:
    """Logits float32 (K, Z, Y, X) of one network for an image (C, Z, Y, X) on the network's grid.

    `mirror_axes` are spatial axes of the patch. `advance` is called after each window. Raises BackendFailed when the
    network returns another shape than (1, heads, *patch) or values that are not finite.
    """
    spatial = grid.patch_size
    padding = grid.padding
    padded = np.pad(image, ((0, 0), *padding)) if any(map(any, padding)) else image
    weights = gaussian_weights(spatial)
    total = np.zeros((heads, *grid.padded_shape), dtype=np.float32)
    weight_sum = np.zeros(grid.padded_shape[1:] if grid.is_2d else grid.padded_shape, dtype=np.float32)
    passes = mirror_combinations(mirror_axes)
    for window in grid.windows():
        inside = tuple(slice(start, start + edge) for start, edge in zip(window.starts, spatial, strict=True))
        place: tuple[slice | int, ...] = (slice(None), *inside)
        if window.plane is not None:
            place = (slice(None), window.plane, *inside)
        patch = np.ascontiguousarray(padded[place])[None]
        logits = _run(backend, patch, heads)
        if passes:
            mirrored = np.zeros_like(logits)
            for axes in passes:
                flips = tuple(2 + axis for axis in axes)
                answer = _run(backend, np.ascontiguousarray(np.flip(patch, flips)), heads)
                mirrored += np.flip(answer, flips)
            if observe_mirroring is not None:
                observe_mirroring(logits[0], mirrored[0] / np.float32(len(passes)), weights)
            logits = (logits + mirrored) / np.float32(len(passes) + 1)
        total[place] += logits[0] * weights
        # In 2D the windows of every plane lie alike: one plane of weights serves all.
        if not window.plane:
            weight_sum[inside] += weights
        advance()
    total /= weight_sum
    z, y, x = (slice(below, below + size) for (below, _), size in zip(padding, grid.shape, strict=True))
    return np.ascontiguousarray(total[:, z, y, x])


def _run(backend: Backend, batch: FloatArray, heads: int) -> FloatArray:
    logits = backend.run(batch)
    expected = (batch.shape[0], heads, *batch.shape[2:])
    if logits.shape != expected:
        raise BackendFailed(f"{backend.name}: the network returned {logits.shape} where {expected} was expected")
    if not np.isfinite(logits).all():
        raise BackendFailed(f"{backend.name}: the network returned values that are not finite")
    return logits
