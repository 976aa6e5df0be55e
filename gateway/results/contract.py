"""Whether a model may run on a volume, criterion by criterion (INF-37, CMP-16).

Every criterion of the contract is judged and listed, also those that hold, so that "not run because" and "allowed
because" can both be shown. A finding's value and limit are numbers or short words that a machine can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.manifest import Contract
from engine.volume import reorientation
from gateway.results.series import SeriesPart
from gateway.results.slice_geometry import slice_axis

Measured = float | int | str | bool | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ContractFinding:
    """One criterion: what was found, what the contract allows, and whether that holds. detail is one sentence."""

    name: str
    value: Measured
    limit: Measured
    ok: bool
    detail: str


def judge(part: SeriesPart, contract: Contract, *, channels: int) -> tuple[ContractFinding, ...]:
    """All criteria in a fixed order: modality, channels, image-type, slice-axis, slice-count, spacing, thickness,
    slice-gap, irregularity, duplicates, contents, extent, repeated-instances, alignment, gantry-tilt.
    `channels`: of the model."""
    return (
        _modality(part, contract),
        _channels(channels),
        _image_type(part),
        _slice_axis(part, contract),
        _slice_count(part, contract),
        _spacing(part, contract),
        _thickness(part),
        _slice_gap(part, contract),
        _irregularity(part, contract),
        _duplicates(part, contract),
        _contents(part, contract),
        _extent(part, contract),
        _repeated_instances(part),
        _alignment(part),
        _gantry_tilt(part, contract),
    )


def first_refusal(findings: Sequence[ContractFinding]) -> ContractFinding | None:
    """The first criterion that does not hold, or None when the model may run."""
    return next((finding for finding in findings if not finding.ok), None)


def _modality(part: SeriesPart, contract: Contract) -> ContractFinding:
    return ContractFinding(
        name="modality",
        value=part.modality,
        limit=contract.modalities,
        ok=part.modality in contract.modalities,
        detail=f"Modality (0008,0060) is {part.modality or 'absent'}, allowed: {', '.join(contract.modalities)}",
    )


def _channels(wanted: int) -> ContractFinding:
    return ContractFinding(
        name="channels",
        value=1,
        limit=wanted,
        ok=wanted == 1,
        detail=f"the model wants {wanted} channel{'s' if wanted != 1 else ''}; one series gives 1",
    )


def _image_type(part: SeriesPart) -> ContractFinding:
    localizer = part.finding("localizer")
    return ContractFinding(
        name="image-type",
        value="LOCALIZER" if localizer else "volume",
        limit="volume",
        ok=localizer is None,
        detail=localizer.detail if localizer else "not a localizer",
    )


def _slice_axis(part: SeriesPart, contract: Contract) -> ContractFinding:
    found = slice_axis(part.planes[0])
    wanted = contract.slice_axis
    return ContractFinding(
        name="slice-axis",
        value=found,
        limit=wanted or "any",
        ok=wanted is None or wanted == found,
        detail=f"slices are nearest to {found}, allowed: {wanted or 'any'}",
    )


def _slice_count(part: SeriesPart, contract: Contract) -> ContractFinding:
    count = len(part.frames)
    return ContractFinding(
        name="slice-count",
        value=count,
        limit=(float(contract.min_slices), float(contract.max_slices)),
        ok=contract.min_slices <= count <= contract.max_slices,
        detail=f"{count} slices, allowed: {contract.min_slices} to {contract.max_slices}",
    )


def _spacing(part: SeriesPart, contract: Contract) -> ContractFinding:
    """Compared in the model's voxel order, where the contract's z, y, x are defined."""
    spacing = reorientation(part.geometry, contract.orientation).target.spacing_mm
    low, high = contract.spacing_min_mm, contract.spacing_max_mm
    # A spacing derived from rounded positions may miss the limit by their last digit.
    slack = 1e-4
    ok = all(a * (1 - slack) <= s <= b * (1 + slack) for s, a, b in zip(spacing, low, high, strict=True))
    shown = " x ".join(f"{s:.4g}" for s in spacing)
    limits = " x ".join(f"{a:g}-{b:g}" for a, b in zip(low, high, strict=True))
    return ContractFinding(
        name="spacing",
        value=spacing,
        limit=(*low, *high),
        ok=ok,
        detail=f"spacing z x y x x in the model's orientation is {shown} mm, allowed: {limits} mm",
    )


def _thickness(part: SeriesPart) -> ContractFinding:
    absent = part.finding("slice-thickness-absent")
    return ContractFinding(
        name="thickness",
        value="unknown" if absent else part.geometry.spacing_mm[0],
        limit="known",
        ok=absent is None,
        detail=absent.detail if absent else "the extent of a slice is known",
    )


def _slice_gap(part: SeriesPart, contract: Contract) -> ContractFinding:
    missing = part.finding("missing-slices")
    ratio = part.slice_gap_ratio
    detail = f"largest slice distance over the median is {ratio:.3f}, allowed: {contract.max_slice_gap_ratio:g}"
    return ContractFinding(
        name="slice-gap",
        value=round(ratio, 6),
        limit=contract.max_slice_gap_ratio,
        ok=ratio <= contract.max_slice_gap_ratio,
        detail=f"{detail}; {missing.detail}" if missing else detail,
    )


def _irregularity(part: SeriesPart, contract: Contract) -> ContractFinding:
    """Slices too close together, as the mirror image of the gap: the median over the smallest distance."""
    distances = part.distances_mm
    ratio = float(np.median(distances)) / min(distances) if distances else 1.0
    return ContractFinding(
        name="irregularity",
        value=round(ratio, 6),
        limit=contract.max_slice_gap_ratio,
        ok=ratio <= contract.max_slice_gap_ratio,
        detail=f"median slice distance over the smallest is {ratio:.3f}, allowed: {contract.max_slice_gap_ratio:g}",
    )


def _duplicates(part: SeriesPart, contract: Contract) -> ContractFinding:
    found = part.finding("duplicate-positions")
    count = int(found.value) if found else 0
    return ContractFinding(
        name="duplicates",
        value=count,
        limit="allowed" if contract.allow_duplicates else 0,
        ok=count == 0 or contract.allow_duplicates,
        detail=found.detail if found else "no two images at one position",
    )


def _contents(part: SeriesPart, contract: Contract) -> ContractFinding:
    """One contrast at one time; the value names the attributes that say otherwise, as DICOM does."""
    found = [f for f in (part.finding("mixed-contents"), part.finding("ambiguous-times")) if f is not None]
    return ContractFinding(
        name="contents",
        value=tuple(keyword for f in found for keyword in f.keywords),
        limit="allowed" if contract.allow_mixed_contents else (),
        ok=not found or contract.allow_mixed_contents,
        detail="; ".join(f.detail for f in found) or "slices are of one contrast",
    )


def _extent(part: SeriesPart, contract: Contract) -> ContractFinding:
    """Half a volume has all its slices and yet lacks an end; the value is the covered fraction of the whole."""
    found = part.finding("partial-extent")
    return ContractFinding(
        name="extent",
        value=round(found.value, 6) if found else 1.0,
        limit="allowed" if contract.allow_partial_extent else 1.0,
        ok=found is None or contract.allow_partial_extent,
        detail=found.detail if found else "reaches from end to end of the images",
    )


def _repeated_instances(part: SeriesPart) -> ContractFinding:
    """The same object twice is read once; two contents under one SOP Instance UID are nothing to choose between."""
    found = part.finding("conflicting-instances")
    return ContractFinding(
        name="repeated-instances",
        value=int(found.value) if found else 0,
        limit=0,
        ok=found is None,
        detail=found.detail if found else "no SOP Instance UID with two contents",
    )


def _alignment(part: SeriesPart) -> ContractFinding:
    found = part.finding("not-collinear")
    return ContractFinding(
        name="alignment",
        value=round(found.value, 6) if found else 0.0,
        limit=found.limit if found else "straight line",
        ok=found is None,
        detail=found.detail if found else "slices lie on a straight line",
    )


def _gantry_tilt(part: SeriesPart, contract: Contract) -> ContractFinding:
    return ContractFinding(
        name="gantry-tilt",
        value=round(part.tilt_deg, 6),
        limit=contract.max_gantry_tilt_deg,
        ok=part.tilt_deg <= contract.max_gantry_tilt_deg,
        detail=f"tilt is {part.tilt_deg:.2f} degrees, allowed: {contract.max_gantry_tilt_deg:g}",
    )
