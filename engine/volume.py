"""Images and label maps that carry their geometry.

Arrays are (C, Z, Y, X) or (Z, Y, X). An affine is 4x4 float64, in patient coordinates LPS and millimetres, and takes
the column vector (x, y, z, 1) of voxel indices to the voxel's centre. An orientation code has three letters, for the
index axes x, y, z in this order: the patient direction in which the index grows (L/R, P/A, S/I).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputRejected

FloatArray = NDArray[np.float32]
LabelArray = NDArray[np.uint8] | NDArray[np.uint16]

AS_STORED = "as-stored"

# Rows of the affine are L, P, S; a positive direction cosine points to the first letter of the pair.
_LETTERS = (("L", "R"), ("P", "A"), ("S", "I"))
_AXIS_OF = {letter: row for row, pair in enumerate(_LETTERS) for letter in pair}


def check_orientation(code: str) -> str:
    """The code itself if it names each of the three patient axes once; ValueError otherwise."""
    if len(code) != 3 or sorted(_AXIS_OF.get(letter, -1) for letter in code) != [0, 1, 2]:
        raise ValueError(f"orientation {code!r}: three letters are needed, one of L/R, one of P/A, one of S/I")
    return code


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """Where the voxels of a (Z, Y, X) array lie in the patient.

    `shape` is (z, y, x). Raises InputRejected when the affine does not span a volume or is not finite.
    """

    shape: tuple[int, int, int]
    affine_lps: NDArray[np.float64]

    def __post_init__(self) -> None:
        affine = np.array(self.affine_lps, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], (0, 0, 0, 1)):
            raise InputRejected("affine: a finite 4x4 matrix with the last row 0 0 0 1 is needed")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InputRejected(f"shape {self.shape}: three positive sizes (z, y, x) are needed")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if lengths.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
            raise InputRejected("affine: its axes do not span a volume (zero spacing or parallel axes)")
        affine.setflags(write=False)
        object.__setattr__(self, "affine_lps", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbours along each index axis, (z, y, x)."""
        x, y, z = np.linalg.norm(self.affine_lps[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def origin_mm(self) -> tuple[float, float, float]:
        """Centre of voxel (0, 0, 0) in patient coordinates (L, P, S)."""
        left, posterior, superior = self.affine_lps[:3, 3]
        return float(left), float(posterior), float(superior)

    @property
    def direction(self) -> NDArray[np.float64]:
        """3x3; columns are the unit vectors of the index axes x, y, z. Not orthogonal on a sheared grid."""
        matrix: NDArray[np.float64] = self.affine_lps[:3, :3]
        unit: NDArray[np.float64] = matrix / np.linalg.norm(matrix, axis=0)
        return unit

    @property
    def voxel_volume_ml(self) -> float:
        """From the determinant, so it holds on sheared grids (gantry tilt) too."""
        return abs(float(np.linalg.det(self.affine_lps[:3, :3]))) / 1000.0

    @property
    def orientation(self) -> str:
        """The code of the nearest patient axes, each used once (an oblique grid has the nearest one)."""
        cosines = self.direction
        rows = max(permutations(range(3)), key=lambda p: sum(abs(cosines[p[axis], axis]) for axis in range(3)))
        return "".join(_LETTERS[row][0 if cosines[row, axis] > 0 else 1] for axis, row in enumerate(rows))

    def same_grid(self, other: Geometry, *, tolerance_mm: float = 1e-3) -> bool:
        """Equal shape, and no corner of the grid is further away than the tolerance."""
        if self.shape != other.shape:
            return False
        z, y, x = self.shape
        corners = np.array([[i, j, k, 1] for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)], dtype=np.float64)
        distance = np.abs((self.affine_lps - other.affine_lps) @ corners.T).max()
        return bool(distance <= tolerance_mm)


@dataclass(frozen=True, kw_only=True)
class Reorientation:
    """An exact change of voxel order: axes permuted, some reversed, nothing interpolated.

    `axes[i]` is the axis of the source (Z, Y, X) array that becomes axis i of the result; `reversed_axes` are axes of
    the result. `source` and `target` are the grids on the two sides.
    """

    source: Geometry
    target: Geometry
    axes: tuple[int, int, int]
    reversed_axes: tuple[int, ...]

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """(..., Z, Y, X) on the source grid → contiguous array on the target grid."""
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + axis for axis in self.axes))
        return np.ascontiguousarray(np.flip(moved, tuple(lead + axis for axis in self.reversed_axes)))

    def restore(self, array: NDArray[Any]) -> NDArray[Any]:
        """(..., Z, Y, X) on the target grid → contiguous array on the source grid; the inverse of `apply`."""
        lead = array.ndim - 3
        back = np.flip(array, tuple(lead + axis for axis in self.reversed_axes))
        inverse = np.argsort(self.axes)
        return np.ascontiguousarray(back.transpose(*range(lead), *(lead + int(axis) for axis in inverse)))

    def restore_labels(self, labels: LabelMap) -> LabelMap:
        """A label map on the target grid → the same voxels on the source grid."""
        if labels.geometry.shape != self.target.shape:
            raise ValueError(f"label map {labels.geometry.shape} is not on the grid {self.target.shape}")
        return LabelMap(array=self.restore(labels.array), geometry=self.source)


def reorientation(geometry: Geometry, code: str) -> Reorientation:
    """How the grid must be permuted and reversed to have the orientation `code` ("as-stored": not at all)."""
    if code == AS_STORED:
        return Reorientation(source=geometry, target=geometry, axes=(0, 1, 2), reversed_axes=())
    current, wanted = geometry.orientation, check_orientation(code)
    rows = [_AXIS_OF[letter] for letter in current]
    # Both in index order x, y, z.
    sources = [rows.index(_AXIS_OF[letter]) for letter in wanted]
    turned = [current[source] != letter for source, letter in zip(sources, wanted, strict=True)]
    sizes = geometry.shape[::-1]
    transform = np.zeros((4, 4))
    transform[3, 3] = 1.0
    for axis, (source, flip) in enumerate(zip(sources, turned, strict=True)):
        transform[source, axis] = -1.0 if flip else 1.0
        transform[source, 3] = sizes[source] - 1 if flip else 0.0
    target = Geometry(
        shape=(sizes[sources[2]], sizes[sources[1]], sizes[sources[0]]), affine_lps=geometry.affine_lps @ transform
    )
    # The array's axes run z, y, x: axis i of the array is index axis 2 - i.
    axes = (2 - sources[2], 2 - sources[1], 2 - sources[0])
    reversed_axes = tuple(i for i in range(3) if turned[2 - i])
    return Reorientation(source=geometry, target=target, axes=axes, reversed_axes=reversed_axes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """An image: float32 (C, Z, Y, X) in the units of its source (HU, signal), on `geometry`."""

    array: FloatArray
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.dtype != np.float32:
            raise ValueError(f"volume: float32 (C, Z, Y, X) is needed, not {self.array.dtype} {self.array.shape}")
        if self.array.shape[1:] != self.geometry.shape or self.array.shape[0] < 1:
            raise ValueError(f"volume: array {self.array.shape} does not fit the grid {self.geometry.shape}")

    def reoriented(self, code: str) -> tuple[Volume, Reorientation]:
        """The same voxels in another order, and the way back."""
        change = reorientation(self.geometry, code)
        return Volume(array=change.apply(self.array), geometry=change.target), change


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelMap:
    """A segmentation: whole numbers (Z, Y, X), 0 is background, on `geometry`."""

    array: NDArray[Any]
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.array.ndim != 3 or not np.issubdtype(self.array.dtype, np.integer):
            raise ValueError(f"label map: integers (Z, Y, X) are needed, not {self.array.dtype} {self.array.shape}")
        if self.array.shape != self.geometry.shape:
            raise ValueError(f"label map: array {self.array.shape} does not fit the grid {self.geometry.shape}")

    def reoriented(self, code: str) -> tuple[LabelMap, Reorientation]:
        """The same voxels in another order, and the way back."""
        change = reorientation(self.geometry, code)
        return LabelMap(array=change.apply(self.array), geometry=change.target), change


def nonzero_box(array: FloatArray) -> tuple[slice, slice, slice] | None:
    """The smallest box around what is not 0 in any channel of a (C, Z, Y, X) array; None where all is 0."""
    found = [np.zeros(size, dtype=np.bool_) for size in array.shape[1:]]
    for channel in array:
        for z, plane in enumerate(channel):
            nonzero = plane != 0
            rows = nonzero.any(axis=1)
            found[0][z] |= rows.any()
            found[1] |= rows
            found[2] |= nonzero.any(axis=0)
    if not found[0].any():
        return None
    z_box, y_box, x_box = (slice(int(ends[0]), int(ends[-1]) + 1) for ends in map(np.flatnonzero, found))
    return z_box, y_box, x_box
