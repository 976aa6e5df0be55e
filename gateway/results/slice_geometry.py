"""Sorts frames into volumes: which belong together, in which order, with which affine, and what is wrong with them.

Frames are ordered by their position along the slice normal cross(row, column) and by nothing else; InstanceNumber
only chooses between frames at the same position. Two rules separate volumes:

1. Always, because one grid cannot hold both: localizer or not, FrameOfReferenceUID, Rows and Columns,
   ImageOrientationPatient, PixelSpacing, StackID.
2. Where frames share positions or are of several contrasts, by the attribute that tells them apart (`frame_groups`).

What still shares a position is a duplicate: the frame with the lowest InstanceNumber, then the lowest UID, is kept.
What is still mixed, and a part that lacks an end of the whole, is a finding.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gateway.results.frame_groups import Group, clusters, partition, positions_mm, preference, slice_normal, split
from gateway.results.frames import Frame
from gateway.results.slice_findings import (
    GeometryFinding,
    content_findings,
    distance_findings,
    duplicate_findings,
    extent_findings,
    line_findings,
    mixture_findings,
    time_findings,
)

MAX_PART_LENGTH = 64
"""Longer names of parts end in ~ and a digest of the whole name."""
_PRINTABLE = re.compile(r"[^A-Za-z0-9_.+-]+")
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


def stacks(frames: Sequence[Frame]) -> tuple[Stack, ...]:
    """Sort frames into volumes by the rules of this module; parts in the order of their names."""
    groups = [Group(frames=tuple(sorted(frames, key=preference)), whole_mm=positions_mm(frames))]
    for rule in (_by_localizer, _by_frame_of_reference, _by_size, _by_orientation, _by_pixel_spacing, _by_stack):
        groups = [part for group in groups for part in rule(group)]
    groups = [part for group in groups for part in split(group)]
    named = sorted(_named(groups), key=lambda pair: pair[0])
    return tuple(_stack(name, group, len(named)) for name, group in named)


def slice_axis(frame: Frame) -> Literal["axial", "sagittal", "coronal"]:
    """The plane whose patient axis is nearest to the slice normal."""
    return _AXES[int(np.argmax(np.abs(slice_normal(frame))))]


def _plane_name(frame: Frame) -> str:
    """The slice axis, with the word oblique beyond 10 degrees."""
    aligned = float(np.abs(slice_normal(frame)).max()) > math.cos(math.radians(10))
    return slice_axis(frame) if aligned else f"oblique-{slice_axis(frame)}"


def _by_localizer(group: Group) -> list[Group]:
    return partition(group, "ImageType", lambda f: "LOCALIZER" if f.localizer else "volume")


def _by_frame_of_reference(group: Group) -> list[Group]:
    return partition(group, "FrameOfReferenceUID", lambda f: f.source.frame_of_reference_uid or "absent")


def _by_size(group: Group) -> list[Group]:
    def size(frame: Frame) -> str:
        return f"{frame.source.pixel_format.rows}x{frame.source.pixel_format.columns}"

    return partition(group, "RowsColumns", size)


def _by_stack(group: Group) -> list[Group]:
    return partition(group, "StackID", lambda f: f.stack_id or "absent")


def _by_orientation(group: Group) -> list[Group]:
    """Clusters of equal direction; two of the same anatomical plane are numbered in the order of their cosines."""
    cosines = {id(f): np.concatenate([f.row_direction, f.column_direction]) for f in group.frames}
    alike = clusters(group.frames, lambda a, b: bool(np.abs(cosines[id(a)] - cosines[id(b)]).max() < _SAME_DIRECTION))
    alike.sort(key=lambda c: tuple(np.round(cosines[id(c[0])], 3)))
    names: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for cluster in alike:
        plane = _plane_name(cluster[0])
        seen[plane] += 1
        for frame in cluster:
            names[id(frame)] = plane if seen[plane] == 1 else f"{plane}-{seen[plane]}"
    return partition(group, "ImageOrientationPatient", lambda f: names[id(f)])


def _by_pixel_spacing(group: Group) -> list[Group]:
    def same(a: Frame, b: Frame) -> bool:
        return all(abs(p - q) <= _SAME_SPACING * q for p, q in zip(a.pixel_spacing_mm, b.pixel_spacing_mm, strict=True))

    names: dict[int, str] = {}
    for cluster in clusters(group.frames, same):
        y, x = cluster[0].pixel_spacing_mm
        names.update((id(frame), f"{y:.4g}x{x:.4g}") for frame in cluster)
    return partition(group, "PixelSpacing", lambda f: names[id(f)])


def _named(groups: Sequence[Group]) -> list[tuple[str, Group]]:
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


def _stack(part: str, group: Group, parts: int) -> Stack:
    frames = tuple(group.slices)
    first = frames[0]
    normal = slice_normal(first)
    positions = positions_mm(frames)
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
    findings += duplicate_findings(group.runs)
    findings += time_findings(group.runs)
    findings += mixture_findings(frames)
    findings += extent_findings(*group.depths_mm)
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
