"""Voxels of one grid on another whose voxel centres they share: copied, reversed or cut out, never interpolated.

Whether the centres are shared is measured at the corners; rows may run the other way, axes may be exchanged, and the
one grid may be a part of the other. Everything else is another grid and is refused with what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from engine.volume import Geometry
from gateway.errors import Rejected

EVENNESS = 0.1
"""How far slices may lie from an even grid, in voxels; more cannot be written as NIfTI without moving the image."""
TOLERANCE = 0.15
"""How far a centre may lie from the one it is taken for, in voxels: evenness, and coordinates of few decimals."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Index (i, j, k) of the one grid → index (x, y, z) of the other: `turn` @ index + `shift`, whole numbers.

    `turn` is 3xk: k is 3 for a volume, 2 for a plane."""

    turn: NDArray[np.int64]
    shift: NDArray[np.int64]

    def apply(self, indices: Sequence[NDArray[np.intp]], target: Geometry, what: str) -> tuple[NDArray[np.intp], ...]:
        """Indices per axis of the one grid (i, j, ...) → (z, y, x) of the other. Raises Rejected when one lies outside,
        naming `what` the voxels are."""
        moved = self.turn @ np.stack(indices) + self.shift[:, None]
        sizes = np.array(target.shape[::-1])[:, None]
        outside = int(((moved < 0) | (moved >= sizes)).any(axis=0).sum())
        if outside:
            raise Rejected(f"{what}: {outside} voxels lie outside the images")
        x, y, z = moved.astype(np.intp)
        return z, y, x


def place(
    *, origin_mm: NDArray[np.float64], steps_mm: NDArray[np.float64], sizes: Sequence[int], target: Geometry, what: str
) -> Placement:
    """How the grid with the first centre `origin_mm` (LPS), the steps (3xk, a column per axis) and the sizes (k) lies
    on `target`. Raises Rejected, naming `what` it is and how it differs."""
    inverse = np.linalg.inv(target.affine_lps[:3, :3])
    steps = inverse @ steps_mm
    first = inverse @ (origin_mm - target.affine_lps[:3, 3])
    turn, shift = np.rint(steps), np.rint(first)
    if not _exchanges_axes(turn):
        raise Rejected(f"{what}: lies on another grid than its images ({_spacings(steps_mm, target)})")
    corners = np.array(list(product(*((0, size - 1) for size in sizes))), dtype=np.float64).T
    away = (steps - turn) @ corners + (first - shift)[:, None]
    worst = float(np.abs(away).max())
    if worst > TOLERANCE:
        raise Rejected(
            f"{what}: lies on another grid than its images, up to {worst:.2f} voxels from their centres "
            f"({_spacings(steps_mm, target)})"
        )
    return Placement(turn=turn.astype(np.int64), shift=shift.astype(np.int64))


def even_grid(
    affine_lps: NDArray[np.float64], positions_mm: NDArray[np.float64], shape: tuple[int, int, int]
) -> Geometry:
    """The grid with orthogonal axes and even slices that fits a stack of slices, which NIfTI files need.

    affine_lps: of the stack, its first two columns along rows and columns of the slices. positions_mm: (n, 3), first
    voxel of each slice in order. Raises Rejected when a slice lies further than EVENNESS from it.
    """
    z, _, _ = shape
    row_mm, column_mm = np.linalg.norm(affine_lps[:3, :2], axis=0)
    row = affine_lps[:3, 0] / row_mm
    column = affine_lps[:3, 1] - (affine_lps[:3, 1] @ row) * row
    column = column / np.linalg.norm(column)
    normal = np.cross(row, column)
    step_mm = float(affine_lps[:3, 2] @ normal)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * row_mm, column * column_mm, normal * step_mm
    even = np.outer(np.arange(z), affine[:3, 2])
    # The even grid starts where the mean distance from the slices is nothing.
    affine[:3, 3] = (positions_mm - even).mean(axis=0)
    geometry = Geometry(shape=shape, affine_lps=affine)
    away_mm = positions_mm - (even + affine[:3, 3])
    away = np.abs(np.linalg.inv(affine[:3, :3]) @ away_mm.T)
    worst = int(np.argmax(away.max(axis=0)))
    if away[:, worst].max() > EVENNESS:
        raise Rejected(
            f"slice {worst + 1} of {z} lies {np.linalg.norm(away_mm[worst]):.2f} mm from an even grid (tilted gantry, "
            "uneven distances or missing slices): resample the images and their labels first"
        )
    return geometry


def _exchanges_axes(turn: NDArray[np.float64]) -> bool:
    """Whether each column is one axis of the other grid, forwards or backwards, and no two the same."""
    used = np.abs(turn)
    return bool((used.sum(axis=0) == 1).all() and (used.max(axis=0) == 1).all() and (used.sum(axis=1) <= 1).all())


def _spacings(steps_mm: NDArray[np.float64], target: Geometry) -> str:
    own = " x ".join(f"{value:.4g}" for value in np.linalg.norm(steps_mm, axis=0))
    images = " x ".join(f"{value:.4g}" for value in target.spacing_mm[::-1])
    return f"spacing {own} mm, the images' {images} mm; resample it onto the images first"
