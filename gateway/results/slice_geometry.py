"""Sorts frames into volumes: which belong together, in which order, with which affine, and what is wrong with them.

Frames are ordered by their position along the slice normal cross(row, column) and by nothing else; InstanceNumber
only chooses between frames at the same position. Two rules separate volumes:

1. Always, because one grid cannot hold both: localizer or not, FrameOfReferenceUID, Rows and Columns,
   ImageOrientationPatient, PixelSpacing, StackID.
2. Only where positions repeat, in the order of `frames.SPLIT_KEYS`, and at last by in-plane position: a key splits
   when it has no more values than the largest number of frames at one position and when fewer positions repeat
   afterwards. So an echo or phase makes volumes, while a number that rises with every slice does not. A time that
   differs from slice to slice splits by its rank (RANKED_KEYS) when all positions have as many frames.

What still shares a position is a duplicate: the frame with the lowest InstanceNumber, then the lowest UID, is kept.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gateway.errors import Rejected
from gateway.results.frames import SPLIT_KEYS, Frame
from gateway.results.slice_findings import (
    SAME_POSITION_MM,
    GeometryFinding,
    content_findings,
    distance_findings,
    duplicate_findings,
    line_findings,
)

MAX_PART_LENGTH = 64
"""Longer names of parts end in ~ and a digest of the whole name."""
_MAX_CLUSTERS = 1024
RANKED_KEYS = ("TriggerTime", "AcquisitionTime")
_PRINTABLE = re.compile(r"[^A-Za-z0-9_.+-]+")
_SAME_PLACE_MM = 1.0
_SAME_DIRECTION = 1e-3
_SAME_SPACING = 1e-3
_AXES: tuple[Literal["sagittal"], Literal["coronal"], Literal["axial"]] = ("sagittal", "coronal", "axial")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Frames of one volume in the order of the slice normal.

    affine_lps: 4x4 for (x, y, z, 1); its third column is the true step from slice to slice, leaning where the gantry
    is tilted. distances_mm: between neighbours along the normal. split_by: (key, value) pairs that tell this part
    from its sisters; part: the same as one readable name, "" when the series is one volume.
    """

    part: str
    split_by: tuple[tuple[str, str], ...]
    frames: tuple[Frame, ...]
    affine_lps: NDArray[np.float64]
    distances_mm: tuple[float, ...]
    tilt_deg: float
    findings: tuple[GeometryFinding, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x)."""
        pixel_format = self.frames[0].source.pixel_format
        return len(self.frames), pixel_format.rows, pixel_format.columns


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    frames: tuple[Frame, ...]
    keys: tuple[tuple[str, str], ...] = ()


def stacks(frames: Sequence[Frame]) -> tuple[Stack, ...]:
    """Sort frames into volumes by the rules of this module; parts in the order of their names."""
    groups = [_Group(frames=tuple(sorted(frames, key=_tie_break)))]
    for rule in (_by_localizer, _by_frame_of_reference, _by_size, _by_orientation, _by_pixel_spacing, _by_stack):
        groups = [part for group in groups for part in rule(group)]
    groups = [part for group in groups for part in _split_repeated(group)]
    named = sorted(_named(groups), key=lambda pair: pair[0])
    return tuple(_stack(name, group, len(named)) for name, group in named)


def slice_normal(frame: Frame) -> NDArray[np.float64]:
    """Unit vector cross(row, column)."""
    normal: NDArray[np.float64] = np.cross(frame.row_direction, frame.column_direction)
    unit: NDArray[np.float64] = normal / np.linalg.norm(normal)
    return unit


def slice_axis(frame: Frame) -> Literal["axial", "sagittal", "coronal"]:
    """The plane whose patient axis is nearest to the slice normal."""
    return _AXES[int(np.argmax(np.abs(slice_normal(frame))))]


def _plane_name(frame: Frame) -> str:
    """The slice axis, with the word oblique beyond 10 degrees."""
    aligned = float(np.abs(slice_normal(frame)).max()) > math.cos(math.radians(10))
    return slice_axis(frame) if aligned else f"oblique-{slice_axis(frame)}"


def _tie_break(frame: Frame) -> tuple[float, str, int]:
    number = math.inf if frame.instance_number is None else frame.instance_number
    return number, frame.source.sop_instance_uid, frame.frame_number or 0


def _partition(group: _Group, key: str, value: Callable[[Frame], str]) -> list[_Group]:
    parts: dict[str, list[Frame]] = {}
    for frame in group.frames:
        parts.setdefault(value(frame), []).append(frame)
    if len(parts) == 1:
        return [group]
    return [_Group(frames=tuple(fs), keys=(*group.keys, (key, v))) for v, fs in sorted(parts.items())]


def _by_localizer(group: _Group) -> list[_Group]:
    return _partition(group, "ImageType", lambda f: "LOCALIZER" if f.localizer else "volume")


def _by_frame_of_reference(group: _Group) -> list[_Group]:
    return _partition(group, "FrameOfReferenceUID", lambda f: f.source.frame_of_reference_uid or "absent")


def _by_size(group: _Group) -> list[_Group]:
    def size(frame: Frame) -> str:
        return f"{frame.source.pixel_format.rows}x{frame.source.pixel_format.columns}"

    return _partition(group, "RowsColumns", size)


def _by_stack(group: _Group) -> list[_Group]:
    return _partition(group, "StackID", lambda f: f.stack_id or "absent")


def _by_orientation(group: _Group) -> list[_Group]:
    """Clusters of equal direction; two of the same anatomical plane are numbered in the order of their cosines."""
    cosines = {id(f): np.concatenate([f.row_direction, f.column_direction]) for f in group.frames}
    clusters = _clusters(
        group.frames, lambda a, b: bool(np.abs(cosines[id(a)] - cosines[id(b)]).max() < _SAME_DIRECTION)
    )
    clusters.sort(key=lambda c: tuple(np.round(cosines[id(c[0])], 3)))
    names: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for cluster in clusters:
        plane = _plane_name(cluster[0])
        seen[plane] += 1
        for frame in cluster:
            names[id(frame)] = plane if seen[plane] == 1 else f"{plane}-{seen[plane]}"
    return _partition(group, "ImageOrientationPatient", lambda f: names[id(f)])


def _by_pixel_spacing(group: _Group) -> list[_Group]:
    def same(a: Frame, b: Frame) -> bool:
        return all(abs(p - q) <= _SAME_SPACING * q for p, q in zip(a.pixel_spacing_mm, b.pixel_spacing_mm, strict=True))

    names: dict[int, str] = {}
    for cluster in _clusters(group.frames, same):
        y, x = cluster[0].pixel_spacing_mm
        names.update((id(frame), f"{y:.4g}x{x:.4g}") for frame in cluster)
    return _partition(group, "PixelSpacing", lambda f: names[id(f)])


def _clusters(frames: Iterable[Frame], same: Callable[[Frame, Frame], bool]) -> list[list[Frame]]:
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


def _runs(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames grouped by position along their common normal, in its order; in a group the preferred one comes first."""
    normal = slice_normal(frames[0])
    runs: list[list[Frame]] = []
    start = -math.inf
    for depth, frame in sorted(((float(f.position_mm @ normal), f) for f in frames), key=lambda pair: pair[0]):
        if depth - start < SAME_POSITION_MM:
            runs[-1].append(frame)
        else:
            runs.append([frame])
            start = depth
    return [sorted(run, key=_tie_break) for run in runs]


def _repeats(group: _Group) -> int:
    return len(group.frames) - len(_runs(group.frames))


def _split_repeated(group: _Group) -> list[_Group]:
    """Rule 2 of the module: split by the first key that separates frames at the same positions, then by the next."""
    runs = _runs(group.frames)
    most = max(len(run) for run in runs)
    if most == 1:
        return [group]
    for parts in _candidates(group, runs):
        if 1 < len(parts) <= most and sum(_repeats(part) for part in parts) < _repeats(group):
            return [smaller for part in parts for smaller in _split_repeated(part)]
    return [group]


def _candidates(group: _Group, runs: list[list[Frame]]) -> Iterator[list[_Group]]:
    for key in SPLIT_KEYS:
        yield _partition(group, key, lambda f, key=key: f.values.get(key, "absent"))  # type: ignore[misc]
    for key in RANKED_KEYS:
        ranks = _ranks(runs, key)
        if ranks:
            yield _partition(group, f"{key}Rank", lambda f, ranks=ranks: ranks[id(f)])  # type: ignore[misc]
    normal = slice_normal(group.frames[0])
    in_plane = {id(f): f.position_mm - (f.position_mm @ normal) * normal for f in group.frames}
    names: dict[int, str] = {}
    for cluster in _clusters(
        group.frames, lambda a, b: bool(np.linalg.norm(in_plane[id(a)] - in_plane[id(b)]) < _SAME_PLACE_MM)
    ):
        name = "_".join(f"{v:.0f}" for v in in_plane[id(cluster[0])])
        names.update((id(frame), name) for frame in cluster)
    yield _partition(group, "ImagePositionPatient", lambda f: names[id(f)])


def _ranks(runs: list[list[Frame]], key: str) -> dict[int, str]:
    """Rank of each frame among those at its position; empty unless all positions have as many different values."""
    ranks: dict[int, str] = {}
    for run in runs:
        values = {id(f): _order(f.values.get(key, "")) for f in run}
        if len(run) != len(runs[0]) or len(set(values.values())) != len(run):
            return {}
        for rank, frame in enumerate(sorted(values, key=lambda i: values[i]), start=1):
            ranks[frame] = f"{rank:03d}"
    return ranks


def _order(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _named(groups: Sequence[_Group]) -> list[tuple[str, _Group]]:
    if len(groups) == 1:
        return [("", groups[0])]
    seen: Counter[str] = Counter()
    named = []
    for group in groups:
        name = ";".join(f"{key}={_PRINTABLE.sub('_', value)}" for key, value in group.keys)
        seen[name] += 1
        named.append((_short(name if seen[name] == 1 else f"{name}-{seen[name]}"), group))
    return named


def _short(name: str) -> str:
    if len(name) <= MAX_PART_LENGTH:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: MAX_PART_LENGTH - 13]}~{digest}"


def _stack(part: str, group: _Group, parts: int) -> Stack:
    runs = _runs(group.frames)
    frames = tuple(run[0] for run in runs)
    first = frames[0]
    normal = slice_normal(first)
    positions = np.stack([f.position_mm for f in frames])
    findings: list[GeometryFinding] = []
    if len(frames) == 1:
        distances: tuple[float, ...] = ()
        step, tilt_deg = _single_step(first, normal, findings), 0.0
    else:
        distances = tuple(float(d) for d in np.diff(positions @ normal))
        step = (positions[-1] - positions[0]) / (len(frames) - 1)
        cosine = float(step @ normal) / float(np.linalg.norm(step))
        tilt_deg = math.degrees(math.acos(min(1.0, cosine)))
        findings += distance_findings(frames, distances)
        findings += line_findings(positions, step, tilt_deg)
    findings += duplicate_findings(runs)
    findings += content_findings(group.frames, group.keys, parts)
    affine = np.eye(4)
    affine[:3, 0] = first.row_direction * first.pixel_spacing_mm[1]
    affine[:3, 1] = first.column_direction * first.pixel_spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position_mm
    return Stack(
        part=part,
        split_by=group.keys,
        frames=frames,
        affine_lps=affine,
        distances_mm=distances,
        tilt_deg=tilt_deg,
        findings=tuple(findings),
    )


def _single_step(frame: Frame, normal: NDArray[np.float64], findings: list[GeometryFinding]) -> NDArray[np.float64]:
    """The slice's own extent, since there is no neighbour to measure a distance to."""
    thickness = frame.slice_thickness_mm or frame.spacing_between_slices_mm
    source = "SliceThickness" if frame.slice_thickness_mm else "SpacingBetweenSlices"
    if thickness is None:
        detail = "one slice without SliceThickness (0018,0050); 1 mm is assumed, volumes mean nothing"
        findings.append(GeometryFinding(kind="slice-thickness-absent", value=1.0, limit=0.0, detail=detail))
        thickness = 1.0
    else:
        detail = f"one slice; its extent of {thickness:g} mm is {source}"
        findings.append(GeometryFinding(kind="single-slice", value=thickness, limit=0.0, detail=detail))
    step: NDArray[np.float64] = normal * thickness
    return step
