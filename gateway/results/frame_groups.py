"""Groups of frames, and how a group that holds several volumes is divided (CMP-20).

`split` divides where frames share positions, or differ in an attribute that a volume has one value of (`split_keys`),
by the attribute that tells them apart. Keys are tried in the order of `split_keys.SPLIT_KEYS`, then times by their rank
at each position (RANKED_KEYS), then pairs of all these in the same order. A division is possible when

- it has no more parts than frames lie at one position, so that a number that rises with every slice splits nothing, or
- every part is an evenly spaced volume of the whole extent, such as two echoes that interleave.

The division is taken that leaves the fewest frames too many at their position, then the fewest in parts that lack an
end of the whole, then the fewest in parts of mixed contents; of equals the first. Its parts are divided again as long
as that helps; where no key does, in-plane position may. What remains is for `slice_findings` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from gateway.errors import Rejected
from gateway.results.frames import Frame
from gateway.results.slice_findings import (
    SAME_POSITION_MM,
    TIME_SPAN_LIMIT_H,
    covers,
    is_even,
    mixed_keywords,
    time_span_h,
)
from gateway.results.split_keys import ABSENT, SPLIT_KEYS, merged

_MAX_CLUSTERS = 1024
_MIN_EVEN_SLICES = 3  # fewer have no distances to compare
_SAME_PLACE_MM = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Frames of one grid: keys tell them from other groups, whole_mm are the positions (n, 3) `split` began with."""

    frames: tuple[Frame, ...]
    keys: tuple[tuple[str, str], ...] = ()
    whole_mm: NDArray[np.float64]

    @cached_property
    def runs(self) -> list[list[Frame]]:
        """Frames by position, in the order of their common normal; at each position the preferred one comes first."""
        return _runs(self.frames)

    @property
    def most(self) -> int:
        """The largest number of frames at one position."""
        return max(len(run) for run in self.runs)

    @property
    def slices(self) -> list[Frame]:
        """The frame that is kept at each position."""
        return [run[0] for run in self.runs]

    @property
    def depths_mm(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positions of the slices, and of the whole, along the normal."""
        normal = slice_normal(self.slices[0])
        return positions_mm(self.slices) @ normal, self.whole_mm @ normal


def positions_mm(frames: Sequence[Frame]) -> NDArray[np.float64]:
    """(n, 3), LPS."""
    return np.stack([frame.position_mm for frame in frames])


def slice_normal(frame: Frame) -> NDArray[np.float64]:
    """Unit vector cross(row, column)."""
    normal: NDArray[np.float64] = np.cross(frame.row_direction, frame.column_direction)
    unit: NDArray[np.float64] = normal / np.linalg.norm(normal)
    return unit


def preference(frame: Frame) -> tuple[float, str, int]:
    """Sorts first which frame is kept of those at one position."""
    number = math.inf if frame.instance_number is None else frame.instance_number
    return number, frame.source.sop_instance_uid, frame.frame_number or 0


def partition(group: Group, key: str, value: Callable[[Frame], str]) -> list[Group]:
    """One group per value, in the order of the values; the group itself, without the key, when there is but one."""
    parts: dict[str, list[Frame]] = {}
    for frame in group.frames:
        parts.setdefault(value(frame), []).append(frame)
    if len(parts) == 1:
        return [group]
    return [replace(group, frames=tuple(fs), keys=(*group.keys, (key, v))) for v, fs in sorted(parts.items())]


def clusters(frames: Iterable[Frame], same: Callable[[Frame, Frame], bool]) -> list[list[Frame]]:
    """Frames that are the same as the first of their cluster. Raises Rejected beyond 1024 clusters."""
    found: list[list[Frame]] = []
    for frame in frames:
        for cluster in found:
            if same(frame, cluster[0]):
                cluster.append(frame)
                break
        else:
            found.append([frame])
            if len(found) > _MAX_CLUSTERS:
                raise Rejected(
                    f"ImageOrientationPatient (0020,0037), PixelSpacing (0028,0030) or ImagePositionPatient "
                    f"(0020,0032) take more than {_MAX_CLUSTERS} values in series "
                    f"{frame.source.series_instance_uid}: the images make no volume; correct them at the sender"
                )
    return found


def split(group: Group) -> list[Group]:
    """The volumes of a group, by the rule of this module."""
    return _split(replace(group, whole_mm=positions_mm(group.frames)))


def _split(group: Group) -> list[Group]:
    if len(group.runs) == len(group.frames) and not mixed_keywords(group.slices):
        return [group]
    best, fewest = [group], _faults([group])
    for parts in _divisions(group):
        faults = _faults(parts)
        if faults < fewest:
            best, fewest = parts, faults
        if not any(faults):
            break
    if len(best) == 1 and fewest[0]:
        parts = _by_in_plane_position(group)
        if len(parts) <= group.most and _faults(parts) < fewest:
            best = parts
    return best if len(best) == 1 else [smaller for part in best for smaller in _split(part)]


def _faults(parts: Sequence[Group]) -> tuple[int, int, int]:
    """Frames too many at their position, frames in parts of less than the whole extent, in parts of mixed contents."""
    repeated = sum(len(part.frames) - len(part.runs) for part in parts)
    partial = sum(len(part.frames) for part in parts if not covers(*part.depths_mm))
    mixed = sum(len(part.frames) for part in parts if mixed_keywords(part.slices))
    return repeated, partial, mixed


def _is_whole_volume(part: Group) -> bool:
    depths_mm, whole_mm = part.depths_mm
    alone = len(part.runs) == len(part.frames) >= _MIN_EVEN_SLICES
    return alone and is_even(np.diff(depths_mm)) and covers(depths_mm, whole_mm)


def _divisions(group: Group) -> Iterator[list[Group]]:
    """The possible ones by one key, then by two, in the order of the module."""
    most, labels = group.most, dict[tuple[int, ...], tuple[str, dict[int, str]]]()
    for key, label in _labels(group):
        number: dict[str, int] = {}
        pattern = tuple(number.setdefault(label[id(f)], len(number)) for f in group.frames)
        if 1 < len(number) <= max(most, len(group.frames) // _MIN_EVEN_SLICES):
            labels.setdefault(pattern, (key, label))  # of keys that say the same, the first
    for count in (1, 2):
        for chosen in combinations(labels.values(), count):
            parts = [group]
            for key, label in chosen:
                parts = [p for part in parts for p in partition(part, key, lambda f, label=label: label[id(f)])]  # type: ignore[misc]
            if len(parts) <= most or all(_is_whole_volume(part) for part in parts):
                yield parts


def _labels(group: Group) -> Iterator[tuple[str, dict[int, str]]]:
    """Per key the value of each frame, by id."""
    for keyword, key in SPLIT_KEYS.items():
        values = {id(f): f.values.get(keyword, ABSENT) for f in group.frames}
        one = merged(values.values(), key.tolerance)
        yield keyword, {frame: one[value] for frame, value in values.items()}
    for keyword, order in RANKED_KEYS.items():
        ranks = _ranks(group.runs, order)
        if ranks and (keyword != "AcquisitionTime" or time_span_h(group.frames) <= TIME_SPAN_LIMIT_H):
            yield f"{keyword}Rank", ranks


def _ranks(runs: list[list[Frame]], order: Callable[[Frame], float | None]) -> dict[int, str]:
    """Rank of each frame among those at its position; empty unless all positions have as many different values."""
    ranks: dict[int, str] = {}
    for run in runs:
        values = {id(f): value for f in run if (value := order(f)) is not None}
        if len(run) != len(runs[0]) or len(set(values.values())) != len(run):
            return {}
        for rank, frame in enumerate(sorted(values, key=lambda i: values[i]), start=1):
            ranks[frame] = f"{rank:03d}"
    return ranks


def _trigger_time_ms(frame: Frame) -> float | None:
    try:
        return float(frame.values.get("TriggerTime", ""))
    except ValueError:
        return None


RANKED_KEYS: Mapping[str, Callable[[Frame], float | None]] = MappingProxyType(
    {"TriggerTime": _trigger_time_ms, "AcquisitionTime": lambda f: f.acquired_s}
)
"""Times that differ from slice to slice and may rank the frames at each position, with what they are ranked by."""


def _by_in_plane_position(group: Group) -> list[Group]:
    normal = slice_normal(group.frames[0])
    in_plane = {id(f): f.position_mm - (f.position_mm @ normal) * normal for f in group.frames}
    names: dict[int, str] = {}
    for cluster in clusters(
        group.frames, lambda a, b: bool(np.linalg.norm(in_plane[id(a)] - in_plane[id(b)]) < _SAME_PLACE_MM)
    ):
        name = "_".join(f"{v:.0f}" for v in in_plane[id(cluster[0])])
        names.update((id(frame), name) for frame in cluster)
    return partition(group, "ImagePositionPatient", lambda f: names[id(f)])


def _runs(frames: Sequence[Frame]) -> list[list[Frame]]:
    normal = slice_normal(frames[0])
    runs: list[list[Frame]] = []
    start = -math.inf
    for depth, frame in sorted(((float(f.position_mm @ normal), f) for f in frames), key=lambda pair: pair[0]):
        if depth - start < SAME_POSITION_MM:
            runs[-1].append(frame)
        else:
            runs.append([frame])
            start = depth
    return [sorted(run, key=preference) for run in runs]
