"""Runs a model on one case after the other, whether all classes are kept or labels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.class_probabilities import ProbabilityPredictor
from engine.execution_plan import ExecutionPlan, planned_bundle
from engine.predictor import Predictor
from engine.segment_statistics import SegmentStatistics
from engine.volume import Geometry, LabelMap, Volume
from gateway.prediction.model import ChosenModel
from gateway.prediction.model_plan import open_model
from gateway.prediction.request import PredictRequest

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted:
    """`probabilities` (heads, Z, Y, X) and `properties` (nnU-Net's names) where they were asked for."""

    labels: LabelMap
    segments: tuple[SegmentStatistics, ...]
    seconds: Mapping[str, float]
    probabilities: NDArray[np.float32] | None = None
    properties: Mapping[str, Any] | None = None

    @property
    def volumes_ml(self) -> dict[str, float]:
        return {segment.name: round(segment.volume_ml, 4) for segment in self.segments}


class Runner:
    """The networks of a model, loaded, run as `plan` says. Raises as engine.predictor.Predictor does."""

    def __init__(self, model: ChosenModel, plan: ExecutionPlan | None, request: PredictRequest) -> None:
        self._model = model
        self._mirroring = None if request.mirroring else False
        self._predictor: Predictor | None = None
        self._probabilities: ProbabilityPredictor | None = None
        if request.save_probabilities:
            self._probabilities = ProbabilityPredictor(
                planned_bundle(model.bundle, plan),
                configurations=model.configurations,
                device=request.chosen_device,
                threads=request.threads,
                choice=None if plan is None else plan.choice,
            )
        else:
            self._predictor = open_model(model, plan, request)

    @property
    def runtime(self) -> str:
        """What runs the networks."""
        loaded = self._predictor or self._probabilities
        return "" if loaded is None else loaded.runtime

    def check_memory(self, geometry: Geometry, *, budget_bytes: int | None = None) -> None:
        """Raises MemoryExceeded for an image that could not be predicted with so much memory (None: what is free)."""
        for loaded in (self._predictor, self._probabilities):
            if loaded is not None:
                loaded.check_memory(geometry, budget_bytes=budget_bytes)

    def predict(self, volume: Volume, progress: Progress) -> Predicted:
        """Raises as Predictor.predict does."""
        model = self._model
        if self._probabilities is not None:
            found = self._probabilities.predict(
                volume,
                progress=progress,
                folds=model.folds,
                mirroring=self._mirroring,
            )
            return Predicted(
                labels=found.labels,
                segments=found.segments,
                seconds=found.seconds,
                probabilities=found.probabilities,
                properties=found.properties,
            )
        if self._predictor is None:
            raise RuntimeError("the networks are freed")
        result = self._predictor.predict(
            volume,
            progress=progress,
            folds=model.folds,
            configurations=model.configurations,
            mirroring=self._mirroring,
        )
        return Predicted(
            labels=result.labels, segments=result.segments, seconds=MappingProxyType(dict(result.runtime.seconds))
        )

    def close(self) -> None:
        """Frees the networks."""
        for loaded in (self._predictor, self._probabilities):
            if loaded is not None:
                loaded.close()
