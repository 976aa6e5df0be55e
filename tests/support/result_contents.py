"""Result contents for tests: a series (phantom or real) with a label array, as the workflow would hand it over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.manifest import Code
from gateway.results.content import ResultContent, SegmentContent, Superseded
from gateway.results.identity import ModelIdentity, ResultIdentity
from gateway.results.quality import Check, Verdict
from gateway.results.series import SeriesPart, read_series

MODEL = ModelIdentity(
    name="asymmetric-phantom", version="1.2.0", weights_digest="ab" * 32, configuration_digest="cd" * 32
)
CREATED_AT = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
ANATOMICAL_STRUCTURE = Code(scheme="SCT", value="91723000", meaning="Anatomical Structure")
LUNG = Code(scheme="SCT", value="39607008", meaning="Lung")
_COLOURS = ((230, 60, 60), (60, 120, 230), (70, 190, 90), (240, 200, 40))
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


def segments_of(
    labels: NDArray[Any],
    voxel_volume_ml: float,
    image: NDArray[Any] | None,
    unit: str,
    regions: Sequence[tuple[int, ...]] | None = None,
) -> tuple[SegmentContent, ...]:
    """One segment per region (by default per label value 1 and 2: the phantom's LEFT and RIGHT)."""
    result = []
    for number, region in enumerate(regions or ((1,), (2,)), start=1):
        inside = np.isin(labels, region)
        voxels = int(inside.sum())
        sided = regions is None
        result.append(
            SegmentContent(
                number=number,
                value=number,
                region=tuple(region),
                name=f"{_SIDES[number - 1]} structure" if sided else f"structure {number}",
                category=ANATOMICAL_STRUCTURE,
                type=LUNG,
                laterality=_SIDES[number - 1] if sided else None,
                colour=_COLOURS[(number - 1) % len(_COLOURS)],
                voxels=voxels,
                volume_ml=voxels * voxel_volume_ml,
                mean_intensity=float(image[inside].mean()) if image is not None and voxels else None,
                confidence=0.9 if voxels else None,
                unit=unit,
            )
        )
    return tuple(result)


def content_of(
    part: SeriesPart,
    labels: NDArray[Any],
    *,
    regions: Sequence[tuple[int, ...]] | None = None,
    verdict: Verdict = Verdict.PASS,
    supersedes: Superseded | None = None,
) -> ResultContent:
    """The result `labels` of the phantom model for one part of a series."""
    image = part.volume.array[0] if part.volume is not None else None
    unit = "[hnsf'U]" if part.modality == "CT" else "1"
    return ResultContent(
        identity=ResultIdentity(
            study_instance_uid=part.study_instance_uid,
            series_instance_uid=part.series_instance_uid,
            part=part.part,
            model=MODEL,
            content_digest="ef" * 32,
        ),
        labels=labels,
        geometry=part.geometry,
        frames=part.frames,
        header=part.headers[0],
        modality=part.modality,
        frame_of_reference_uid=part.frame_of_reference_uid,
        segments=segments_of(labels, part.geometry.voxel_volume_ml, image, unit, regions),
        verdict=verdict,
        checks=(
            Check(name="empty", segment="left structure", value=1.0, limit="more than 0 voxels", verdict=Verdict.PASS),
            Check(name="confidence", segment=None, value=0.91, limit="at least 0.5", verdict=verdict),
            Check(
                name="estimated-dice",
                segment="left structure",
                value=0.88,
                limit="lower 90 % bound at least 0.7",
                verdict=Verdict.PASS,
                bound=0.75,
            ),
        ),
        software_version="0.1.0",
        created_at=CREATED_AT,
        supersedes=supersedes or Superseded(),
    )


def part_of(files: Sequence[Path]) -> SeriesPart:
    """The only volume of a series."""
    (part,) = read_series(files)
    return part


def later(content: ResultContent, **changes: Any) -> ResultContent:
    """The same content with some values changed."""
    return replace(content, **changes)
