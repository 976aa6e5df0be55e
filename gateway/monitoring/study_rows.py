"""The facts of a study as streams: acquisition, intensities, and what the model made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.drift_check import StudyRow
from engine.training_comparison import Part, histogram_stream
from storage.deletion_records import PastFacts
from storage.records import Result, StudyFacts

VERDICT, CONFIDENCE = "verdict", "confidence"
PARTS: tuple[Part, ...] = ("whole", "foreground")
_PER_LABEL = ("volume_ml", "confidence", "border_entropy", "fold_dice", "mirror_dice", "components")


_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True)
class RecordedStudy:
    """That there are facts of the result `result_id`, recorded at that time, made on that scanner ("": unknown). Of a
    result that retention has removed, `result_id` leads to its facts and nowhere else."""

    result_id: str
    recorded_at: datetime
    scanner: str


def recorded_studies(session: Session, model_name: str, model_version: str) -> list[RecordedStudy]:
    """Of a model's version, oldest first; those that were judged alone, since the verdict is a stream. The facts
    themselves are left where they are: of ten thousand studies a few hundred are compared."""
    found = session.execute(
        select(StudyFacts.result_id, StudyFacts.recorded_at, StudyFacts.scanner)
        .join(Result, Result.result_id == StudyFacts.result_id)
        .where(
            StudyFacts.model_name == model_name,
            StudyFacts.model_version == model_version,
            Result.verdict.is_not(None),
        )
    ).all()
    past = session.execute(
        select(PastFacts.facts_id, PastFacts.recorded_at, PastFacts.scanner).where(
            PastFacts.model_name == model_name, PastFacts.model_version == model_version
        )
    ).all()
    studies = [
        RecordedStudy(result_id=result_id, recorded_at=recorded_at, scanner=scanner)
        for result_id, recorded_at, scanner in (*found, *past)
    ]
    return sorted(studies, key=lambda study: (study.recorded_at, study.result_id))


def study_rows(session: Session, result_ids: Sequence[str]) -> dict[str, StudyRow]:
    """The facts of these results, which have been judged."""
    rows: dict[str, StudyRow] = {}
    for start in range(0, len(result_ids), _AT_ONCE):
        found = session.execute(
            select(
                StudyFacts.result_id,
                StudyFacts.acquisition,
                StudyFacts.image,
                Result.measurements,
                Result.runtime,
                Result.verdict,
            )
            .join(Result, Result.result_id == StudyFacts.result_id)
            .where(StudyFacts.result_id.in_(result_ids[start : start + _AT_ONCE]))
        )
        for result_id, acquisition, image, measurements, runtime, verdict in found:
            confidence = (runtime or {}).get("mean_confidence")
            rows[result_id] = study_row(acquisition, image, measurements or [], verdict=verdict, confidence=confidence)
    rows.update(_past_rows(session, [result_id for result_id in result_ids if result_id not in rows]))
    return rows


def _past_rows(session: Session, facts_ids: Sequence[str]) -> dict[str, StudyRow]:
    """Of studies that retention has removed."""
    rows: dict[str, StudyRow] = {}
    for start in range(0, len(facts_ids), _AT_ONCE):
        wanted = PastFacts.facts_id.in_(facts_ids[start : start + _AT_ONCE])
        for past in session.scalars(select(PastFacts).where(wanted)):
            rows[past.facts_id] = study_row(
                past.acquisition,
                past.image,
                past.measurements or [],
                verdict=past.verdict,
                confidence=past.mean_confidence,
            )
    return rows


def study_row(
    acquisition: Mapping[str, Any],
    image: Mapping[str, Any] | None,
    measurements: Sequence[Mapping[str, Any]],
    *,
    verdict: str,
    confidence: float | None,
) -> StudyRow:
    """`acquisition` and `image` as StudyFacts has them, `measurements` as Result has."""
    categories = {**acquisition["categories"], VERDICT: verdict}
    numbers: dict[str, float] = dict(acquisition["numbers"])
    histograms: dict[str, Sequence[float] | None] = {}
    _add(numbers, CONFIDENCE, confidence)
    for segment in measurements:
        name = segment["name"]
        categories[f"empty {name}"] = "no" if segment["voxels"] else "yes"
        for key in _PER_LABEL:
            if segment["voxels"]:
                _add(numbers, f"{key.replace('_', '-')} {name}", segment.get(key))
    if image is not None:
        for axis, mm, size in zip(("superior", "posterior", "left"), image["spacing_mm"], image["size"], strict=True):
            numbers[f"spacing-{axis}-mm"], numbers[f"size-{axis}"] = float(mm), float(size)
        _add(numbers, "foreground-share", image.get("foreground_share"))
        for index, channel in enumerate(image["channels"]):
            for part in PARTS:
                histograms[histogram_stream(index, part)] = channel[part]
            _add(numbers, f"noise {index}", channel.get("noise"))
    return StudyRow(categories=categories, numbers=numbers, histograms=histograms)


def _add(numbers: dict[str, float], name: str, value: object) -> None:
    if isinstance(value, int | float) and math.isfinite(value):
        numbers[name] = float(value)
