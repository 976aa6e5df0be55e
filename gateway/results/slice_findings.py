"""What the slices of a volume say about themselves: gaps, irregular distances, doubles, tilt and the like.

Findings are facts with a number; whether a model may run in spite of one is for its contract to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gateway.results.frames import Frame

FindingKind = Literal[
    "single-slice",
    "slice-thickness-absent",
    "missing-slices",
    "irregular-spacing",
    "duplicate-positions",
    "repeated-instances",
    "conflicting-instances",
    "unplaced-images",
    "not-collinear",
    "gantry-tilt",
    "localizer",
    "split",
    "frame-of-reference-absent",
    "monochrome1",
    "lossy-compression",
]

SAME_POSITION_MM = 0.01
"""Frames closer than this along the normal are at the same position."""
IRREGULARITY_LIMIT = 0.01
"""Largest deviation of a slice distance from the median that is no finding, as a fraction of the median."""
GAP_FACTOR = 1.5
"""A distance of at least this many medians has slices missing."""
COLLINEARITY_LIMIT_MM = 0.1
TILT_LIMIT_DEG = 0.1


@dataclass(frozen=True, kw_only=True)
class GeometryFinding:
    """Something about the slices that a model's contract or a person may object to.

    value and limit are in the unit of the kind (a count, a ratio, mm, degrees); detail says it in words, without
    patient data; sop_instance_uids name the objects concerned, where there are such.
    """

    kind: FindingKind
    value: float
    limit: float
    detail: str
    sop_instance_uids: tuple[str, ...] = ()


def distance_findings(frames: Sequence[Frame], distances: Sequence[float]) -> list[GeometryFinding]:
    """missing-slices and irregular-spacing, from the distances between neighbours along the normal (mm)."""
    median = float(np.median(distances))
    findings = []
    wide = [i for i, distance in enumerate(distances) if distance >= GAP_FACTOR * median]
    if wide:
        missing = sum(round(distances[i] / median) - 1 for i in wide)
        places = ", ".join(f"{distances[i]:.3f} mm after slice {i + 1}" for i in wide[:8])
        findings.append(
            GeometryFinding(
                kind="missing-slices",
                value=float(missing),
                limit=0.0,
                detail=f"{missing} of {len(frames) + missing} slices missing (median {median:.3f} mm): {places}",
                sop_instance_uids=tuple(frames[j].source.sop_instance_uid for i in wide[:8] for j in (i, i + 1)),
            )
        )
    deviation = max(abs(distance - median) for distance in distances)
    if deviation > max(IRREGULARITY_LIMIT * median, SAME_POSITION_MM):
        findings.append(
            GeometryFinding(
                kind="irregular-spacing",
                value=deviation / median,
                limit=IRREGULARITY_LIMIT,
                detail=f"distances {min(distances):.3f} to {max(distances):.3f} mm, median {median:.3f} mm",
            )
        )
    return findings


def line_findings(positions: NDArray[np.float64], step: NDArray[np.float64], tilt_deg: float) -> list[GeometryFinding]:
    """not-collinear and gantry-tilt. positions: (n, 3) LPS in order; step: mean vector from slice to slice."""
    findings = []
    unit = step / np.linalg.norm(step)
    offsets = positions - positions[0]
    aside = offsets - np.outer(offsets @ unit, unit)
    worst = float(np.linalg.norm(aside, axis=1).max())
    if worst > COLLINEARITY_LIMIT_MM:
        detail = f"slices lie up to {worst:.2f} mm beside a straight line"
        findings.append(GeometryFinding(kind="not-collinear", value=worst, limit=COLLINEARITY_LIMIT_MM, detail=detail))
    if tilt_deg > TILT_LIMIT_DEG:
        detail = f"stacking direction leans {tilt_deg:.2f} degrees from the slice normal"
        findings.append(GeometryFinding(kind="gantry-tilt", value=tilt_deg, limit=TILT_LIMIT_DEG, detail=detail))
    return findings


def duplicate_findings(runs: Sequence[Sequence[Frame]]) -> list[GeometryFinding]:
    """duplicate-positions. runs: the frames at each position, the one that is kept first."""
    repeated = [run for run in runs if len(run) > 1]
    if not repeated:
        return []
    surplus = sum(len(run) - 1 for run in repeated)
    kept = ", ".join(run[0].identity for run in repeated[:4])
    return [
        GeometryFinding(
            kind="duplicate-positions",
            value=float(surplus),
            limit=0.0,
            detail=f"{surplus} images lie where another one lies; kept there: {kept}",
            sop_instance_uids=tuple(f.source.sop_instance_uid for run in repeated for f in run),
        )
    ]


def content_findings(frames: Sequence[Frame], split_by: Sequence[tuple[str, str]], parts: int) -> list[GeometryFinding]:
    """split, localizer, frame-of-reference-absent, monochrome1, lossy-compression."""
    found: list[tuple[FindingKind, float, str]] = []
    if parts > 1:
        keys = ", ".join(key for key, _ in split_by)
        found.append(("split", float(parts), f"one of {parts} volumes of the series, told apart by {keys}"))
    if frames[0].localizer:
        found.append(("localizer", 1.0, "ImageType (0008,0008) says LOCALIZER"))
    if not frames[0].source.frame_of_reference_uid:
        found.append(("frame-of-reference-absent", 1.0, "FrameOfReferenceUID (0020,0052) is absent or empty"))
    inverted = sum(f.source.pixel_format.photometric_interpretation == "MONOCHROME1" for f in frames)
    if inverted:
        found.append(("monochrome1", float(inverted), "values are used as stored, not inverted"))
    lossy = sum(f.lossy for f in frames)
    if lossy:
        found.append(("lossy-compression", float(lossy), f"{lossy} of {len(frames)} images were compressed with loss"))
    return [GeometryFinding(kind=kind, value=value, limit=0.0, detail=detail) for kind, value, detail in found]
