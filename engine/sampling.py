"""Which case and which patch of it a training sample is, by nnU-Net's rules (nnU-Net v2).

Shapes and bounds are (z, y, x) of the preprocessed array; 2D patches are one voxel long in z.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.random_state import Purpose, random_generator
from engine.rehearsal import RehearsalDraw

ClassKey = int | tuple[int, ...]
ClassLocations = Mapping[ClassKey, NDArray[np.integer[Any]] | Sequence[Any]]
"""Per label or region, voxels of it as rows (0, z, y, x); the key (-1, all labels) has annotated voxels of any label,
where there is an ignore label. Absent labels have no rows."""


class StoredArray(Protocol):
    """An array (C, Z, Y, X) that is read from disk where it is sliced."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, part: tuple[slice, ...], /) -> NDArray[Any]: ...


Bounds = tuple[tuple[int, int], ...]
"""First voxel and the one after the last, per axis; may reach beyond the image on both sides."""

_PURPOSES = {
    "training": (Purpose.TRAINING_CASE, Purpose.TRAINING_PATCH),
    "validation": (Purpose.VALIDATION_CASE, Purpose.VALIDATION_PATCH),
}


@dataclass(frozen=True, kw_only=True)
class PatchSampler:
    """Draws the samples of a training or of its online validation. It has no state: each answer depends on the seed,
    the stage and the place (epoch, iteration, sample of the batch) alone.

    `patch_size` is what the network gets, `initial_patch_size` what is read around it for rotation and scaling
    (engine/augmentation_profile.py); both have 2 entries for a 2D network. `batch_size` is that of all processes.
    `rehearsal`: which samples of a fine-tuning are of old cases.
    """

    seed: int
    stage: Literal["training", "validation"]
    cases: int
    batch_size: int
    patch_size: tuple[int, ...]
    initial_patch_size: tuple[int, ...]
    has_ignore_label: bool = False
    foreground_share: float = 0.33
    rehearsal: RehearsalDraw | None = None

    def __post_init__(self) -> None:
        if len(self.patch_size) != len(self.initial_patch_size) or len(self.patch_size) not in (2, 3):
            raise ValueError(f"patch {self.patch_size}, initial {self.initial_patch_size}: both need 2 or 3 sizes")
        if self.cases < 1 or self.batch_size < 1:
            raise ValueError(f"{self.cases} cases, batch of {self.batch_size}: at least one of each is needed")

    def case(self, *, epoch: int, iteration: int, sample: int) -> int:
        """Index of the case: uniform, with replacement; in a fine-tuning among the old cases, or among the new ones."""
        purpose = _PURPOSES[self.stage][0]
        rng = random_generator(self.seed, purpose, epoch=epoch, iteration=iteration, sample=sample)
        if self.rehearsal is None:
            return int(rng.integers(self.cases))
        pool = self.rehearsal.pool(
            seed=self.seed, batch_size=self.batch_size, epoch=epoch, iteration=iteration, sample=sample
        )
        return pool[int(rng.integers(len(pool)))]

    def is_foreground_forced(self, sample: int) -> bool:
        """True for the last third of the batch: 1 of 2, 3 of 9, 4 of 12."""
        return sample >= round(self.batch_size * (1 - self.foreground_share))

    def bounds(
        self, shape: Sequence[int], locations: ClassLocations, *, epoch: int, iteration: int, sample: int
    ) -> Bounds:
        """The initial patch of this sample in a case of this shape (z, y, x).

        Forced samples are centred on a voxel of a class that the case has (each class alike, each of its stored voxels
        alike); without any class they are random like the others. With an ignore label the others are centred on an
        annotated voxel. A centred patch is kept from starting before the first start of a random one, and may end
        after its last end, as in nnU-Net.
        """
        purpose = _PURPOSES[self.stage][1]
        rng = random_generator(self.seed, purpose, epoch=epoch, iteration=iteration, sample=sample)
        flat = (1,) * (3 - len(self.patch_size))
        final, patch = flat + self.patch_size, flat + self.initial_patch_size
        lows, highs = [], []
        for size, edge, inner in zip(shape, patch, final, strict=True):
            need = max(edge - inner, edge - size)
            lows.append(-need // 2)
            highs.append(size + need // 2 + need % 2 - edge)
        centre = self._centre(rng, locations, forced=self.is_foreground_forced(sample))
        if centre is None:
            starts = [int(rng.integers(low, high + 1)) for low, high in zip(lows, highs, strict=True)]
        else:
            starts = [max(low, int(c) - edge // 2) for low, c, edge in zip(lows, centre, patch, strict=True)]
        return tuple((start, start + edge) for start, edge in zip(starts, patch, strict=True))

    def _centre(
        self, rng: np.random.Generator, locations: ClassLocations, *, forced: bool
    ) -> NDArray[np.integer[Any]] | None:
        annotated = [key for key in locations if isinstance(key, tuple) and key[0] == -1]
        if forced:
            present = [key for key in locations if len(locations[key]) and key not in annotated]
            present = present or [key for key in annotated if len(locations[key])]
        else:
            present = [key for key in annotated if self.has_ignore_label and len(locations[key])]
        if not present:
            return None
        rows = np.asarray(locations[present[rng.integers(len(present))]])
        centre: NDArray[np.integer[Any]] = rows[rng.integers(len(rows)), 1:]
        return centre


def central_bounds(bounds: Bounds, size: Sequence[int]) -> Bounds:
    """The middle of a patch: all that has to be read for a sample that is neither rotated nor scaled."""
    size = (1,) * (len(bounds) - len(size)) + tuple(size)
    starts = [low + (high - low) // 2 - edge // 2 for (low, high), edge in zip(bounds, size, strict=True)]
    return tuple((start, start + edge) for start, edge in zip(starts, size, strict=True))


def read_patch(array: StoredArray, bounds: Bounds, fill: float, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """The patch of an array (C, Z, Y, X), memory-mapped or not, as a copy (C, z, y, x) of its type or of `dtype`;
    `fill` (image 0, labels -1) is what lies beyond the array."""
    inside = tuple(
        slice(min(max(low, 0), size), min(max(high, 0), size))
        for (low, high), size in zip(bounds, array.shape[1:], strict=True)
    )
    patch = np.full((array.shape[0], *(high - low for low, high in bounds)), fill, dtype=dtype or array.dtype)
    target = tuple(slice(part.start - low, part.stop - low) for part, (low, _) in zip(inside, bounds, strict=True))
    patch[(slice(None), *target)] = array[(slice(None), *inside)]
    return patch
