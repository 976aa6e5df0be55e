"""What the slices of a volume say about themselves: gaps, irregular distances, doubles, tilt and the like.

Findings are facts with a number; whether a model may run in spite of one is for its contract to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gateway.results.attributes import attribute
from gateway.results.frames import Frame
from gateway.results.split_keys import ABSENT, CONTRAST_KEYS, SPLIT_KEYS, merged

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
    "partial-extent",
    "mixed-contents",
    "ambiguous-times",
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
TIME_SPAN_LIMIT_H = 12.0
"""Times of one series further apart than this cannot be ranked: midnight lies between them, or a date is wrong."""
_OVERLAP = 0.75
_MARGIN = 0.99


@dataclass(frozen=True, kw_only=True)
class GeometryFinding:
    """Something about the slices that a model's contract or a person may object to.

    value and limit are in the unit of the kind (a count, a ratio, mm, degrees); detail says it in words, without
    patient data; sop_instance_uids name the objects concerned and keywords the attributes, where there are such.
    """

    kind: FindingKind
    value: float
    limit: float
    detail: str
    sop_instance_uids: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()


def is_even(distances: Sequence[float] | NDArray[np.float64]) -> bool:
    """Whether all distances (mm, at least one) are the same but for rounding."""
    median = float(np.median(distances))
    return float(np.abs(np.asarray(distances) - median).max()) <= max(IRREGULARITY_LIMIT * median, SAME_POSITION_MM)


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
    if not is_even(distances):
        findings.append(
            GeometryFinding(
                kind="irregular-spacing",
                value=max(abs(distance - median) for distance in distances) / median,
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


def covers(depths: NDArray[np.float64], whole: NDArray[np.float64]) -> bool:
    """Whether slices reach as far as the images they were separated from, up to one slice distance of their own.

    Both are positions along one normal, mm; depths ascend.
    """
    step = float(np.median(np.diff(depths))) if len(depths) > 1 else 0.0
    short = max(float(depths[0] - whole.min()), float(whole.max() - depths[-1]))
    return short <= max(_MARGIN * step, SAME_POSITION_MM)


def extent_findings(depths: NDArray[np.float64], whole: NDArray[np.float64]) -> list[GeometryFinding]:
    """partial-extent, for what `covers` denies; its value is the covered fraction."""
    if covers(depths, whole):
        return []
    extent, of = float(np.ptp(depths)), float(np.ptp(whole))
    detail = f"covers {extent:.1f} of {of:.1f} mm of the images it was told apart from"
    return [GeometryFinding(kind="partial-extent", value=extent / of, limit=1.0, detail=detail)]


def mixed_keywords(frames: Sequence[Frame]) -> tuple[str, ...]:
    """Attributes that a volume has one value of and these frames, one at each position in their order, several.

    AcquisitionNumber (PS3.3 C.7.6.1) is one of them only where slices of acquisitions at different times alternate
    and overlap: side by side they are a stitched volume, and alternating without overlap an interleaved one.
    """
    mixed = [keyword for keyword in CONTRAST_KEYS if len(_contrasts(frames, keyword)) > 1]
    return (*mixed, "AcquisitionNumber") if _acquisitions_alternate(frames) else tuple(mixed)


def _contrasts(frames: Sequence[Frame], keyword: str) -> set[str]:
    key = SPLIT_KEYS[keyword]
    found = {"\\".join(f.values.get(keyword, ABSENT).split("\\")[slice(*key.compared)]) for f in frames}
    return set(merged(found, key.tolerance).values())


def _acquisitions_alternate(frames: Sequence[Frame]) -> bool:
    numbers = [f.values.get("AcquisitionNumber", ABSENT) for f in frames]
    if 1 + sum(a != b for a, b in pairwise(numbers)) == len(set(numbers)):
        return False
    at_time: dict[float | None, set[str]] = {}
    for frame, number in zip(frames, numbers, strict=True):
        at_time.setdefault(frame.acquired_s, set()).add(number)
    return all(len(found) == 1 for found in at_time.values()) and _slices_overlap(frames)


def _slices_overlap(frames: Sequence[Frame]) -> bool:
    """Also true when no thickness is known, since then nothing speaks for one volume."""
    thickness = [f.slice_thickness_mm for f in frames if f.slice_thickness_mm is not None]
    distances = [float(np.linalg.norm(b.position_mm - a.position_mm)) for a, b in pairwise(frames)]
    return not thickness or float(np.median(distances)) < _OVERLAP * float(np.median(thickness))


def time_span_h(frames: Sequence[Frame]) -> float:
    """Between the first and the last acquisition, hours; 0.0 where times are unknown."""
    known = [f.acquired_s for f in frames if f.acquired_s is not None]
    return (max(known) - min(known)) / 3600 if known else 0.0


def time_findings(runs: Sequence[Sequence[Frame]]) -> list[GeometryFinding]:
    """ambiguous-times, where images at one position could not be told apart by time. runs: as above."""
    span_h = time_span_h([f for run in runs for f in run])
    if span_h <= TIME_SPAN_LIMIT_H or all(len({f.acquired_s for f in run}) == 1 for run in runs):
        return []
    detail = (
        f"{attribute('AcquisitionTime')} of images at the same positions spans {span_h:.1f} h, more than "
        f"{TIME_SPAN_LIMIT_H:g}: {attribute('AcquisitionDate')} is absent or wrong, and their order unknown"
    )
    keywords = ("AcquisitionDate", "AcquisitionTime")
    return [
        GeometryFinding(kind="ambiguous-times", value=span_h, limit=TIME_SPAN_LIMIT_H, detail=detail, keywords=keywords)
    ]


def mixture_findings(frames: Sequence[Frame]) -> list[GeometryFinding]:
    """mixed-contents. frames: those of the volume in order, one at each position."""
    keywords = mixed_keywords(frames)
    if not keywords:
        return []
    names = ", ".join(attribute(keyword) for keyword in keywords)
    detail = f"slices differ in {names} and are no whole volumes of even spacing when told apart by them"
    return [
        GeometryFinding(kind="mixed-contents", value=float(len(keywords)), limit=0.0, detail=detail, keywords=keywords)
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
