"""Facts of a study that are kept as it passes, for drift (ART-20): how it was acquired, and its intensities.

What a model made of it is in the result's own row (measurements, verdict). Pixels are looked at while they are in
memory for the model; nothing is read a second time.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from engine.bundle import Bundle
from engine.intensity_baseline import summarize_study
from engine.predictor import Prediction
from gateway.monitoring.acquisition import read_acquisition
from gateway.results.series import SeriesPart
from storage.records import Result, StudyFacts, utc_now


def facts_of(result: Result, part: SeriesPart, prediction: Prediction, bundle: Bundle) -> StudyFacts:
    """The row for a result whose part was decoded. `image` is None where the bundle has no baseline to compare with."""
    acquisition = read_acquisition(part)
    return StudyFacts(
        result_id=result.result_id,
        model_name=result.model_name,
        model_version=result.model_version,
        scanner=acquisition.scanner,
        recorded_at=utc_now(),
        acquisition=acquisition.as_plain(),
        image=_image(part, prediction, bundle),
    )


def _image(part: SeriesPart, prediction: Prediction, bundle: Bundle) -> dict[str, Any] | None:
    baseline = bundle.evidence.baseline
    if baseline is None or part.volume is None:
        return None
    summary = summarize_study(
        part.volume,
        prediction.labels,
        baseline.channels,
        [segment.volume_ml for segment in prediction.segments],
        grid=baseline.grid,
    )
    return asdict(summary)
