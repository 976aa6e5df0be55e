"""Contours of an RTSTRUCT (PS3.3 C.8.8.6) → voxels on the grid of the images that they were drawn on.

A contour belongs to the slice whose plane it lies in, whatever way the slices are turned. Within a plane contours are
joined even-odd (`polygons`). Planes that go to one slice add up: they were drawn on other, thinner slices, and are no
holes in each other. Where contours lie between slices the caller decides: an error, or the nearest slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from engine.volume import Geometry
from gateway.errors import Rejected
from gateway.results import attributes
from gateway.results.attributes import AttributeRejected, Where
from gateway.results.frames import read_header
from gateway.training_data.label_objects import CLOSED, contours_of, source_images
from gateway.training_data.label_painting import LabelPainter
from gateway.training_data.polygons import even_odd, inside_polygon

BetweenSlices = Literal["refuse", "nearest"]
"""What happens to a contour that lies between two slices: it is refused, or taken for the nearest one's."""
IN_PLANE = 0.1
"""A contour this near to a slice lies in it, and its points this near to one plane are planar (slice distances)."""
_SAME_PLANE_MM = 0.01
_SAME_PLANE = 1e-3
"""Contours are of one plane where rounding alone can part them: by so much, or this share of the slice distance."""
_EXACT = 1e-6
_SAME_AREA = 1e-3
_MOST_POINTS = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class _Contour:
    """points: (n, 2) as (x, y) and depth: place along z, all in voxel indices. scatter: how far its points lie from
    that depth, which is how coarsely they were written down."""

    points: NDArray[np.float64]
    depth: float
    scatter: float


def paint_contours(
    file: Path,
    values: Mapping[int, int],
    geometry: Geometry,
    painter: LabelPainter,
    *,
    between: BetweenSlices,
    absent: frozenset[str] = frozenset(),
) -> list[str]:
    """Paint the regions of interest of an RTSTRUCT. values: ROINumber → label value; others are passed over.

    Returns what a person should know: slices without a contour within a region, contours that cross. Raises Rejected
    (AttributeRejected) when a contour cannot be read, is not planar, lies in no slice or outside the images, or was
    drawn on images that are `absent` (SOP Instance UIDs).
    """
    where = Where(file=file)
    header = read_header(file, where)
    where = Where(file=file, sop_instance_uid=attributes.required_uid(header, "SOPInstanceUID", where))
    notes: list[str] = []
    # A region may be spread over several items, and a hole be in another one than what it is cut from.
    of_region: dict[int, list[Dataset]] = {}
    for number, items in contours_of(header, where):
        of_region.setdefault(number, []).extend(items)
    for number, found in of_region.items():
        if number in values and found:
            what = f"ROI {number} in {where}"
            lost = sum(bool(images) and images <= absent for images in (source_images(item, where) for item in found))
            if lost:
                raise Rejected(
                    f"{what}: {lost} of {len(found)} contours were drawn on images that are not in the source; add the "
                    "slices that the series lacks, or take the labels by their coordinates (--ignore-references)"
                )
            contours = [_read(item, geometry, what, where) for item in found]
            notes += _paint_region(values[number], contours, geometry, painter, between, what)
    return notes


def _read(item: Dataset, geometry: Geometry, what: str, where: Where) -> _Contour:
    kind = attributes.text(item, "ContourGeometricType", where)
    if kind not in CLOSED:
        raise Rejected(f"{what}: a contour of type {kind[:32]!r} encloses nothing; remove it, or do not use this ROI")
    numbers = attributes.numbers(item, "ContourData", where)
    if not numbers or len(numbers) % 3 or len(numbers) > 3 * _MOST_POINTS:
        problem = f"has {len(numbers)} numbers, which are no points,"
        raise AttributeRejected("ContourData", problem, where, "export the contours again")
    points_mm = np.array(numbers).reshape(-1, 3)
    indices = (points_mm - geometry.affine_lps[:3, 3]) @ np.linalg.inv(geometry.affine_lps[:3, :3]).T
    depth = float(indices[:, 2].mean())
    scatter = float(np.abs(indices[:, 2] - depth).max())
    if scatter > IN_PLANE:
        raise Rejected(f"{what}: a contour does not lie in the plane of the slices; it was drawn on other images")
    if max(np.abs(indices[:, :2]).max(), abs(depth)) > 10 * max(geometry.shape):
        raise Rejected(f"{what}: a contour lies far outside the images; it was drawn on other ones")
    return _Contour(points=indices[:, :2], depth=depth, scatter=scatter)


def _paint_region(
    value: int,
    contours: Sequence[_Contour],
    geometry: Geometry,
    painter: LabelPainter,
    between: BetweenSlices,
    what: str,
) -> list[str]:
    slices, rows, columns = geometry.shape
    away = [abs(c.depth - round(c.depth)) for c in contours]
    off = [d for d in away if d > IN_PLANE]
    if off and between == "refuse":
        raise Rejected(
            f"{what}: {len(off)} of {len(contours)} contours lie between slices (up to {max(off):.2f} of their "
            "distance); `--between-slices nearest` takes them for the nearest slice's"
        )
    outside = [c for c in contours if not -0.5 <= c.depth < slices - 0.5]
    if outside:
        raise Rejected(f"{what}: {len(outside)} of {len(contours)} contours lie above or below the images")
    beyond = [c for c in contours if (c.points < -0.5).any() or (c.points >= (columns - 0.5, rows - 0.5)).any()]
    apart = [c for c in beyond if _is_apart(c.points, (rows, columns))]
    if apart:
        raise Rejected(f"{what}: {len(apart)} of {len(contours)} contours lie beside the images")
    repeated = 0
    crossing, united = set[int](), set[int]()
    drawn: set[int] = set()
    of_slice = np.zeros((rows, columns), np.bool_)
    for plane in _planes(contours, max(_SAME_PLANE_MM / geometry.spacing_mm[0], _SAME_PLANE)):
        z = int(np.floor(plane[0].depth + 0.5))
        polygons = _distinct([c.points for c in plane], (rows, columns))
        repeated += len(plane) - len(polygons)
        if _cross(polygons, (rows, columns)):
            crossing.add(z)
        mask = even_odd(polygons, (rows, columns))
        if z not in drawn:
            of_slice = np.zeros_like(mask)
        elif (mask & of_slice).any():
            united.add(z)
        drawn.add(z)
        of_slice |= mask
        y, x = np.nonzero(mask)
        painter.paint(value, np.full_like(y, z), y, x)
    notes = []
    if off:
        notes.append(f"{len(off)} contours between slices were taken for the nearest slice's")
    if beyond:
        notes.append(f"{len(beyond)} contours reach beyond the edge of the images, and are cut off there")
    if repeated:
        notes.append(f"{repeated} contours are there twice; one was used")
    if crossing:
        notes.append(f"on {len(crossing)} slices contours of one ROI cross; where two overlap is outside (even-odd)")
    if united:
        notes.append(f"on {len(united)} slices contours of several planes were united; an inner one is no hole there")
    gaps = max(drawn) - min(drawn) + 1 - len(drawn)
    if gaps:
        notes.append(f"{gaps} slices between the first and the last contour have none, and stay background")
    # Without the file's name and UIDs: notes are kept in the dataset, which says of nobody who it is.
    return [f"{what.partition(' in ')[0]}: {note}" for note in notes]


def _is_apart(points: NDArray[np.float64], shape: tuple[int, int]) -> bool:
    """Whether nothing of a contour lies over the pixels."""
    rows, columns = shape
    low, high = points.min(axis=0), points.max(axis=0)
    return bool((high < -0.5).any() or (low >= (columns - 0.5, rows - 0.5)).any())


def _planes(contours: Sequence[_Contour], tolerance: float) -> Iterator[list[_Contour]]:
    """Contours of one plane together, planes by their depth: those that `tolerance` (in slices) or less parts, or
    no more than each one's points are scattered: on oblique slices coordinates in tenths of a mm leave the plane."""
    plane: list[_Contour] = []
    for contour in sorted(contours, key=lambda c: c.depth):
        if plane and contour.depth - plane[0].depth > max(tolerance, contour.scatter, plane[0].scatter) + _EXACT:
            yield plane
            plane = []
        plane.append(contour)
    if plane:
        yield plane


def _distinct(polygons: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> list[NDArray[np.float64]]:
    """Without those that are there already, wherever they start and whichever way they run: even-odd, two of them would
    be nothing."""
    found: list[tuple[float, bytes, NDArray[np.float64]]] = []
    for points in polygons:
        x, y = points.T
        area = abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
        pixels = inside_polygon(points, shape).tobytes() if len(polygons) > 1 else b""
        if not any(pixels == p and math.isclose(area, a, rel_tol=_SAME_AREA, abs_tol=1e-6) for a, p, _ in found):
            found.append((area, pixels, points))
    return [points for *_, points in found]


def _cross(polygons: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> bool:
    """Whether two overlap without one holding the other. Touching is no overlap."""
    if len(polygons) < 2:
        return False
    masks = [inside_polygon(points, shape) for points in polygons]
    if np.sum(masks, axis=0, dtype=np.int32).max() < 2:
        return False
    return any(
        (both := int((one & other).sum())) and both not in (int(one.sum()), int(other.sum()))
        for index, one in enumerate(masks)
        for other in masks[index + 1 :]
    )
