"""Whole cases through trained networks, and what comes out against the reference: a fold's validation (torch).

The way of an image is that of inference (engine/predictor.py): crop, normalise, resample, windows, labels on the
image's own grid. The networks are torch's own, before they are exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.backends import Backend
from engine.case_results import (
    has_logits,
    has_prediction,
    join_outputs,
    measure_labels,
    measure_prediction,
    network_logits,
    write_logits,
    write_prediction,
)
from engine.dataset import Case, RawDataset, read_case
from engine.errors import DatasetInvalid
from engine.labels import LabelManager
from engine.logits_to_labels import NetworkLogits, to_half
from engine.metrics import SUMMARY, CaseMetrics, as_plain, from_plain, write_summary
from engine.parallel import Progress
from engine.plans import Configuration, Plans
from engine.preprocessing import CroppedImage, crop_to_nonzero, network_shape, preprocess, stack_labels
from engine.sliding_window import WindowGrid, predict_logits
from engine.stage_predictions import NextStage, PreviousStage
from engine.training_processes import TrainingProcesses
from engine.volume import LabelMap, Volume

STEP_SIZE = 0.5

FloatArray = NDArray[np.float32]


class TorchBackend:
    """A network as a backend, float32, on the device it is on; of several outputs the full resolution is taken."""

    name = "torch"
    precision = "float32"
    batch = 1

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
    """One configuration of a model before export: its folds' networks (or one of them) and how they are asked.

    `previous` (cascade) has the label maps of the stage before, by the names of the cases. They come from that stage's
    logits on this one's grid, as in nnU-Net's validation; a bundle resamples its label map on the image's grid.
    """

    plans: Plans
    configuration: Configuration
    labels: LabelManager
    backends: Sequence[Backend]
    mirror_axes: tuple[int, ...]
    previous: PreviousStage | None = None

    def predict(self, volume: Volume, *, case: str = "") -> LabelMap:
        """The labels on the grid of `volume`, by the mean of the networks' logits; no post-processing. A cascade needs
        the name of the `case`.

        Raises InputRejected where the image does not fit the plans, DatasetInvalid as `PreviousStage.open` does.
        """
        cropped = crop_to_nonzero(volume, self.plans)
        return join_outputs([self.logits(cropped, case=case)], cropped, self.plans, self.labels, volume.geometry)

    def logits(self, cropped: CroppedImage, *, case: str = "") -> NetworkLogits:
        """The mean of the networks' logits on the network's grid; `case` as for `predict`."""
        image = preprocess(cropped, self.plans, self.configuration)
        if self.previous is not None:
            before = self.previous.labels(case, image.shape[1:])
            image = stack_labels(image, before, self.labels.foreground_labels)
        grid = WindowGrid(
            shape=network_shape(cropped.shape, cropped.spacing_mm, self.configuration),
            patch_size=self.configuration.patch_size,
            step_size=STEP_SIZE,
        )
        logits = [
            predict_logits(image, grid, backend, heads=self.labels.num_heads, mirror_axes=self.mirror_axes)
            for backend in self.backends
        ]
        return network_logits(to_half(np.mean(logits, axis=0, dtype=np.float32)), cropped, self.configuration)


def validate(
    model: ModelInTraining,
    dataset: RawDataset,
    names: Sequence[str],
    folder: Path,
    *,
    logits_folder: Path | None = None,
    next_stages: Sequence[NextStage] = (),
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda _done, _total: None,
    processes: TrainingProcesses | None = None,
) -> list[CaseMetrics] | None:
    """Predicts the named cases, measures them, and writes the label maps and nnU-Net's summary.json into `folder`.

    The networks' logits go into `logits_folder`, for ensembles of configurations, and their labels to the
    `next_stages` of a cascade. A case whose files are there, and whole, is measured and not predicted again. Several
    processes divide the cases between them; each gets the metrics of all. None, without a summary, when `stop` says so
    between two cases. Raises InputRejected, DatasetInvalid for a name that is no case, OSError.
    """
    processes = processes or TrainingProcesses()
    for needed in (folder, logits_folder):
        if needed is not None:
            needed.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str, CaseMetrics]] = []
    progress(0, len(names))
    for case in processes.part_of(cases_named(dataset, names)):
        if stop():
            break
        loaded = read_case(case, dataset.json)
        path = folder / f"{case.name}{dataset.json.file_ending}"
        stored = None if logits_folder is None else logits_folder / f"{case.name}.npy"
        there = has_prediction(path) and (stored is None or has_logits(stored))
        if not there or any(stage.lacks(case.name) for stage in next_stages):
            cropped = crop_to_nonzero(loaded.volume, model.plans)
            output = model.logits(cropped, case=case.name)
            if stored is not None:
                write_logits(output.logits, stored)
            # Before the label map, whose presence says that all of a case is there.
            for stage in next_stages:
                stage.write(case.name, output, cropped)
            predicted = join_outputs([output], cropped, model.plans, model.labels, loaded.volume.geometry)
            write_prediction(predicted, case, path)
        rows.append((str(case.label), str(path), measure_prediction(path, loaded, dataset.json)))
        progress(min(len(rows) * processes.size, len(names)), len(names))
    found = processes.in_order(processes.gather([(label, path, as_plain(metrics)) for label, path, metrics in rows]))
    rows = [(label, path, from_plain(metrics)) for label, path, metrics in found]
    if len(rows) < len(names):
        return None
    if processes.is_first:
        write_summary(folder / SUMMARY, rows)
    return [metrics for _, _, metrics in rows]


def measure_on(
    model: ModelInTraining,
    dataset: RawDataset,
    names: Sequence[str],
    *,
    stop: Callable[[], bool] = lambda: False,
    processes: TrainingProcesses | None = None,
) -> list[CaseMetrics]:
    """Predicts and measures the named cases without writing anything; those done so far when `stop` says so. Several
    processes divide the cases between them; each gets the metrics of all."""
    processes = processes or TrainingProcesses()
    measured = []
    for case in processes.part_of(cases_named(dataset, names)):
        if stop():
            break
        loaded = read_case(case, dataset.json)
        predicted = model.predict(loaded.volume, case=case.name)
        measured.append(measure_labels(loaded.labels, predicted, model.labels))
    found = processes.in_order(processes.gather([as_plain(metrics) for metrics in measured]))
    return [from_plain(metrics) for metrics in found]


def cases_named(dataset: RawDataset, names: Sequence[str]) -> list[Case]:
    """Raises DatasetInvalid for a name that is no case."""
    cases = {case.name: case for case in dataset.cases}
    absent = [name for name in names if name not in cases]
    if absent:
        raise DatasetInvalid(f"{absent[0]} is no case of {dataset.name} ({len(absent)} such in the split)")
    return [cases[name] for name in names]
