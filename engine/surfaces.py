"""Distances between the surfaces of two masks: HD95 and surface Dice, in millimetres on anisotropic grids.

The definition is that of google-deepmind's `surface-distance` 0.1 and gives the same numbers. A mask's surface is cut
into elements, one for each cube between 2 x 2 x 2 neighbouring voxel centres that is partly inside (marching cubes).
An element lies at the middle of its cube and has the area of its triangles; its distance is that to the nearest element
of the other surface. Both measures weight elements by area. On a volume that is one voxel thick, elements are pieces
of the contour in the plane, weighted by length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

# Triangles of one cube of each kind, as (|normal|, area): the normal's components are in units of the faces of the
# cube, the area in eighths. A code has one bit per corner, 2 ** (7 - 4z - 2y - x). Every other cube is a turned,
# mirrored or inverted one of these. From surface_distance/lookup_tables.py, Apache-2.0, Copyright 2018 Google Inc.
_TRIANGLES: Mapping[int, tuple[tuple[tuple[int, int, int], int], ...]] = MappingProxyType(
    {
        0b00000000: (),
        0b00000001: (((1, 1, 1), 1),),
        0b00000011: (((1, 1, 0), 4),),
        0b00000110: (((1, 1, 1), 2),),
        0b00000111: (((1, 0, 0), 4), ((1, 1, 1), 3)),
        0b00001111: (((1, 0, 0), 8),),
        0b00010110: (((1, 1, 1), 3),),
        0b00010111: (((1, 1, 1), 6),),
        0b00011000: (((1, 1, 1), 2),),
        0b00011001: (((0, 1, 1), 4), ((1, 1, 1), 1)),
        0b00011011: (((1, 1, 1), 4), ((0, 1, 1), 2), ((1, 0, 1), 2)),
        0b00011110: (((1, 0, 0), 4), ((1, 1, 1), 4)),
        0b00111100: (((1, 1, 0), 8),),
        0b01101001: (((1, 1, 1), 4),),
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SurfaceDistances:
    """One entry per surface element: distance to the other surface (mm) and area (mm², contours: length in mm).
    All four arrays have entries; there is no surface distance for an empty mask."""

    reference_mm: FloatArray
    reference_area: FloatArray
    prediction_mm: FloatArray
    prediction_area: FloatArray

    def hd95_mm(self) -> float:
        """95th percentile of the distances, weighted by area, of each direction; the greater of the two."""
        return max(
            _percentile_95(self.reference_mm, self.reference_area),
            _percentile_95(self.prediction_mm, self.prediction_area),
        )

    def surface_dice(self, tolerance_mm: float) -> float:
        """Share of both surfaces' area that is no further than the tolerance from the other surface."""
        near = (
            self.reference_area[self.reference_mm <= tolerance_mm].sum()
            + self.prediction_area[self.prediction_mm <= tolerance_mm].sum()
        )
        return float(near / (self.reference_area.sum() + self.prediction_area.sum()))


class SurfaceRuler:
    """Measures masks on the grid of one volume; the table of areas is made once."""

    def __init__(self, shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
        """Shape and spacing (mm) of the whole volume, (z, y, x). ValueError unless the spacing is positive."""
        spacing = np.asarray(spacing_mm, dtype=np.float64)
        if spacing.shape != (3,) or len(shape) != 3 or not (spacing > 0).all():
            raise ValueError(f"shape {tuple(shape)}, spacing {tuple(spacing_mm)}: three of each (z, y, x) are needed")
        thin = [axis for axis, size in enumerate(shape) if size == 1]
        self._thin_axis = thin[0] if len(thin) == 1 else None
        if self._thin_axis is None:
            self._spacing_mm, self._areas = spacing, _element_areas(spacing)
        else:
            self._spacing_mm = np.delete(spacing, self._thin_axis)
            self._areas = _element_lengths(self._spacing_mm)
        edges = np.delete(shape, self._thin_axis) if self._thin_axis is not None else np.asarray(shape)
        self._diagonal_mm = math.hypot(*(edges * self._spacing_mm).tolist())

    @property
    def diagonal_mm(self) -> float:
        """Of the volume, or of the plane of one that is one voxel thick."""
        return self._diagonal_mm

    def measure(self, reference: BoolArray, prediction: BoolArray) -> SurfaceDistances:
        """Masks (Z, Y, X) of equal shape: the volume's, or cropped to a box that holds both masks; what lies beyond
        the arrays is outside of both. ValueError for an empty mask, which has no surface."""
        if reference.shape != prediction.shape or reference.ndim != 3:
            raise ValueError(f"masks {reference.shape} and {prediction.shape}: two alike (Z, Y, X) are needed")
        if not reference.any() or not prediction.any():
            raise ValueError("an empty mask has no surface")
        if self._thin_axis is not None:
            reference, prediction = reference.squeeze(self._thin_axis), prediction.squeeze(self._thin_axis)
        codes = _codes(reference), _codes(prediction)
        all_inside = np.uint8(len(self._areas) - 1)
        # Code 0 (all corners outside) wraps around to 255: neither it nor `all_inside` is a border.
        borders = tuple((code - np.uint8(1)) < all_inside - np.uint8(1) for code in codes)
        points = tuple(np.argwhere(border) for border in borders)
        return SurfaceDistances(
            reference_mm=_distances(points[0], borders[1], points[1], self._spacing_mm),
            reference_area=self._areas[codes[0][borders[0]]],
            prediction_mm=_distances(points[1], borders[0], points[0], self._spacing_mm),
            prediction_area=self._areas[codes[1][borders[1]]],
        )


def _codes(mask: BoolArray) -> NDArray[np.uint8]:
    """Corners inside, as bits, of every cube (square) of neighbours; one longer than the mask along each axis."""
    codes = np.pad(mask, 1).view(np.uint8)
    for axis in reversed(range(mask.ndim)):
        lower = codes[(slice(None),) * axis + (slice(None, -1),)]
        upper = codes[(slice(None),) * axis + (slice(1, None),)]
        codes = (lower << np.uint8(1 << (mask.ndim - 1 - axis))) | upper
    return codes


def _distances(
    points: NDArray[np.intp], other: BoolArray, other_points: NDArray[np.intp], spacing_mm: FloatArray
) -> FloatArray:
    """Distance of each point to the nearest of the others; 0 without a search where the two surfaces coincide."""
    distances = np.zeros(len(points))
    apart = np.flatnonzero(~other[tuple(points.T)])
    if apart.size:
        tree = cKDTree(other_points * spacing_mm, balanced_tree=False, compact_nodes=False)
        _, nearest = tree.query(points[apart] * spacing_mm)
        # From whole steps, so that a distance equal to the tolerance is not off by a rounding error.
        steps_mm = (points[apart] - other_points[nearest]) * spacing_mm
        distances[apart] = np.sqrt((steps_mm**2).sum(axis=1))
    return distances


def _percentile_95(distances_mm: FloatArray, areas: FloatArray) -> float:
    order = np.lexsort((areas, distances_mm))
    share = np.cumsum(areas[order]) / areas.sum()
    return float(distances_mm[order[min(int(np.searchsorted(share, 0.95)), len(order) - 1)]])


def _element_areas(spacing_mm: FloatArray) -> FloatArray:
    """Area (mm²) of the surface within a cube, for each of the 256 codes."""
    z, y, x = (float(edge) for edge in spacing_mm)
    faces = np.array((y * x, z * x, z * y))
    corners = np.array(list(product((0, 1), repeat=3)))
    places = np.array((4, 2, 1))
    bits = np.left_shift(1, 7 - corners @ places)
    areas = np.zeros(256)
    for code, triangles in _TRIANGLES.items():
        inside = corners[(code & bits) > 0]
        for axes in permutations(range(3)):
            area = sum(
                eighths / 8.0 * float(np.linalg.norm(np.array(normal)[list(axes)] * faces))
                for normal, eighths in triangles
            )
            for flips in product((0, 1), repeat=3):
                turned = int(np.left_shift(1, 7 - (inside[:, list(axes)] ^ flips) @ places).sum())
                areas[turned] = areas[255 - turned] = area
    return areas


def _element_lengths(spacing_mm: FloatArray) -> FloatArray:
    """Length (mm) of the contour within a square, for each of the 16 codes; one bit per corner, 2 ** (3 - 2y - x)."""
    y, x = (float(edge) for edge in spacing_mm)
    diagonal = 0.5 * float(np.hypot(y, x))
    lengths = np.full(16, diagonal)
    lengths[[0b0000, 0b1111]] = 0.0
    lengths[[0b0011, 0b1100]] = x
    lengths[[0b0101, 0b1010]] = y
    lengths[[0b0110, 0b1001]] = 2 * diagonal
    return lengths
