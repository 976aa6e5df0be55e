"""Missing slices of a study that is being received, from the positions of its images (CMP-16)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset

from gateway.intake.header import PARSER_ERRORS

# A step within 15 % of a whole multiple of the usual spacing is that many slices; less regular series are not judged.
_STEP_TOLERANCE = 0.15
_SAME_POSITION_MM = 0.01
_FARTHEST_MM = 1e6


@dataclass(frozen=True, kw_only=True)
class SliceGap:
    """Missing slices of a series: between two positions along the slice normal, in millimetres."""

    series_instance_uid: str
    after_mm: float
    before_mm: float
    missing: int


@dataclass(frozen=True, kw_only=True)
class SlicePosition:
    """Where one image object lies: position and the row and column cosines, as received (PS3.3 C.7.6.2)."""

    series_instance_uid: str
    position_mm: tuple[float, float, float]
    cosines: tuple[float, ...]


def slice_position(header: Dataset) -> SlicePosition | None:
    """The position of an image object; None where it has none of its own (multi-frame, no image, unreadable).

    A value beyond one kilometre, or that is no number, is no position: what is computed from it could overflow.
    """
    try:
        position, cosines = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
        if position is None or cosines is None or len(position) != 3 or len(cosines) != 6:
            return None
        x, y, z = (float(v) for v in position)
        directions = tuple(float(v) for v in cosines)
        series_uid = str(header.get("SeriesInstanceUID", ""))
    except PARSER_ERRORS:
        return None
    if not all(abs(v) <= _FARTHEST_MM for v in (x, y, z, *directions)):  # false for NaN too
        return None
    return SlicePosition(series_instance_uid=series_uid, position_mm=(x, y, z), cosines=directions)


def slice_gaps(positions: Sequence[SlicePosition]) -> tuple[SliceGap, ...]:
    """Missing slices per series and orientation, where most steps between neighbours are equal and a few are multiples.

    Several images at one position (echoes, phases) count as one. A series that is irregular as a whole has no gaps.
    """
    stacks: dict[tuple[str, tuple[float, ...]], list[SlicePosition]] = {}
    for p in positions:
        key = (p.series_instance_uid, tuple(round(c, 3) + 0.0 for c in p.cosines))
        stacks.setdefault(key, []).append(p)
    return tuple(gap for (uid, cosines), stack in sorted(stacks.items()) for gap in _stack_gaps(uid, cosines, stack))


def _stack_gaps(uid: str, cosines: tuple[float, ...], stack: Sequence[SlicePosition]) -> list[SliceGap]:
    a, b, c, d, e, f = cosines
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    length = math.sqrt(sum(n * n for n in normal))
    if length < 0.5:
        return []
    heights = sorted(sum(n * v for n, v in zip(normal, p.position_mm, strict=True)) / length for p in stack)
    distinct = heights[:1]
    for height in heights[1:]:
        if height - distinct[-1] > _SAME_POSITION_MM:
            distinct.append(height)
    steps = [after - before for before, after in itertools.pairwise(distinct)]
    if len(steps) < 3:
        return []
    spacing = sorted(steps)[(len(steps) - 1) // 2]
    regular = sum(1 for s in steps if abs(s - spacing) <= _STEP_TOLERANCE * spacing)
    if regular * 2 < len(steps):
        return []
    gaps = []
    for before, after in itertools.pairwise(distinct):
        times = (after - before) / spacing
        slices = round(times)
        if slices >= 2 and abs(times - slices) <= _STEP_TOLERANCE * slices:
            gaps.append(
                SliceGap(
                    series_instance_uid=uid, after_mm=round(before, 3), before_mm=round(after, 3), missing=slices - 1
                )
            )
    return gaps
