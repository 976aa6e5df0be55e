"""Whole cases through trained networks, and what comes out against the reference: a fold's validation (torch).

The way of an image is that of inference (engine/predictor.py): crop, normalise, resample, windows, labels on the
image's own grid. The networks are torch's own, before they are exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.backends import Backend
from engine.dataset import RawDataset, read_case
from engine.errors import DatasetInvalid
from engine.labels import LabelManager
from engine.logits_to_labels import NetworkLogits, segment, to_half
from engine.metrics import CaseMetrics, evaluated_regions, measure_case, write_summary
from engine.nifti import write_nifti
from engine.plans import Configuration, Plans
from engine.preprocessing import crop_to_nonzero, network_shape, network_spacing_mm, preprocess
from engine.sliding_window import WindowGrid, predict_logits
from engine.volume import LabelMap, Volume

SUMMARY = "summary.json"
_STEP_SIZE = 0.5

FloatArray = NDArray[np.float32]


class TorchBackend:
    """A network as a backend, float32, on the device it is on; of several outputs the full resolution is taken."""

    name = "torch"
    precision = "float32"

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._device = next(network.parameters()).device

    @property
    def version(self) -> str:
        return str(torch.__version__)

    @property
    def provider(self) -> str:
        return self._device.type

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def run(self, batch: FloatArray) -> FloatArray:
        self._network.eval()
        with torch.inference_mode():
            answer = self._network(torch.from_numpy(batch).to(self._device))
        logits: FloatArray = (answer[0] if isinstance(answer, list) else answer).float().cpu().numpy()
        return logits

    def close(self) -> None:
        """Nothing to free: the network belongs to its trainer."""


@dataclass(frozen=True, kw_only=True)
class ModelInTraining:
    """One configuration of a model before export: its folds' networks (or one of them) and how they are asked."""

    plans: Plans
    configuration: Configuration
    labels: LabelManager
    backends: Sequence[Backend]
    mirror_axes: tuple[int, ...]

    def predict(self, volume: Volume) -> LabelMap:
        """The labels on the grid of `volume`, by the mean of the networks' logits; no post-processing.

        Raises InputRejected where the image does not fit the plans.
        """
        cropped = crop_to_nonzero(volume, self.plans)
        image = preprocess(cropped, self.plans, self.configuration)
        grid = WindowGrid(
            shape=network_shape(cropped.shape, cropped.spacing_mm, self.configuration),
            patch_size=self.configuration.patch_size,
            step_size=_STEP_SIZE,
        )
        logits = [
            predict_logits(image, grid, backend, heads=self.labels.num_heads, mirror_axes=self.mirror_axes)
            for backend in self.backends
        ]
        output = NetworkLogits(
            logits=to_half(np.mean(logits, axis=0, dtype=np.float32)),
            spacing_mm=network_spacing_mm(cropped.spacing_mm, self.configuration),
            rule=self.configuration.resampling_probabilities,
        )
        found = segment([output], cropped.shape, cropped.spacing_mm, self.labels).labels
        whole = np.zeros(cropped.full_shape, dtype=found.dtype)
        whole[cropped.box] = found
        stored = np.ascontiguousarray(whole.transpose(self.plans.transpose_backward))
        return LabelMap(array=stored, geometry=volume.geometry)


def validate(
    model: ModelInTraining,
    dataset: RawDataset,
    names: Sequence[str],
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[CaseMetrics]:
    """Predicts the named cases, measures them, and writes the label maps and nnU-Net's summary.json into `folder`.

    Raises InputRejected, DatasetInvalid for a name that is no case.
    """
    cases = {case.name: case for case in dataset.cases}
    absent = [name for name in names if name not in cases]
    if absent:
        raise DatasetInvalid(f"{absent[0]} is no case of {dataset.name} ({len(absent)} such in the split)")
    folder.mkdir(parents=True, exist_ok=True)
    regions = evaluated_regions(model.labels)
    rows: list[tuple[str, str, CaseMetrics]] = []
    progress(0, len(names))
    for name in names:
        loaded = read_case(cases[name], dataset.json)
        predicted = model.predict(loaded.volume)
        path = folder / f"{name}{dataset.json.file_ending}"
        write_nifti(predicted, path)
        metrics = measure_case(
            _as_int(loaded.labels.array),
            _as_int(predicted.array),
            loaded.volume.geometry.spacing_mm,
            regions,
            ignore_label=model.labels.ignore_label,
        )
        rows.append((str(cases[name].label), str(path), metrics))
        progress(len(rows), len(names))
    write_summary(folder / SUMMARY, rows)
    return [metrics for _, _, metrics in rows]


def _as_int(labels: NDArray[Any]) -> NDArray[np.int64]:
    return labels.astype(np.int64)
