"""Makes the intensity baseline of a planned dataset: every case is read once, and none again after an interruption.

<preprocessed>/<dataset>/intensity_baseline/CASE.json     a case's part, with the stamp of what it was made from
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from engine.dataset import Case, DatasetJson, read_case
from engine.errors import DatasetInvalid
from engine.experiment import Experiment
from engine.intensity_baseline import (
    BINS,
    FORMAT,
    GRID,
    ChannelBins,
    IntensityBaseline,
    StudySummary,
    choose_bins,
    label_volumes_ml,
    make_baseline,
    read_study,
    summarize_study,
)
from engine.json_reader import Reader, read_json
from engine.json_writer import write_json
from engine.parallel import Progress, map_cases

FOLDER = "intensity_baseline"


def extract_baseline(experiment: Experiment, *, processes: int, progress: Progress | None = None) -> IntensityBaseline:
    """The baseline of all cases of the dataset, with the reference label maps as foreground.

    Raises InputRejected with the case that cannot be read, DatasetInvalid when fingerprint and dataset do not fit
    together, WorkerDied, OSError.
    """
    dataset = experiment.dataset
    fingerprint, planned = experiment.fingerprint(), next(iter(experiment.plans.configurations.values()))
    names = dataset.json.channel_names
    if not len(fingerprint.intensities) == len(planned.normalization_schemes) == len(names):
        raise DatasetInvalid(
            f"{experiment.name}: dataset.json names {len(names)} channel(s), the fingerprint has "
            f"{len(fingerprint.intensities)}, the plans normalise {len(planned.normalization_schemes)}"
        )
    bins = choose_bins(
        names,
        planned.normalization_schemes,
        [(found.percentile_00_5, found.percentile_99_5) for found in fingerprint.intensities],
    )
    folder = experiment.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    job = _Job(bins=bins, dataset_json=dataset.json, folder=folder)
    studies = map_cases(partial(_case, job), dataset.cases, processes=processes, progress=progress)
    return make_baseline(bins, [label.name for label in dataset.json.labels.foreground], studies)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a worker needs for every case."""

    bins: tuple[ChannelBins, ...]
    dataset_json: DatasetJson
    folder: Path


def _case(job: _Job, case: Case) -> StudySummary:
    path, stamp, labels = job.folder / f"{case.name}.json", _stamp(job, case), job.dataset_json.labels
    try:
        stored = Reader(read_json(path, error=DatasetInvalid), where=path.name, error=DatasetInvalid)
        if stored.raw("stamp") == stamp:
            return read_study(stored.child("study"), channels=len(job.bins), labels=len(labels.foreground))
    except DatasetInvalid:
        pass  # absent, of another release, or cut short by a power failure: it is made again
    loaded = read_case(case, job.dataset_json)
    study = summarize_study(
        loaded.volume,
        loaded.labels,
        job.bins,
        label_volumes_ml(loaded.labels, [label.region for label in labels.foreground]),
        ignore_label=labels.ignore_label,
    )
    write_json({"stamp": stamp, "study": asdict(study)}, path)
    return study


def _stamp(job: _Job, case: Case) -> str:
    """Changes with the files of the case and with everything that decides what is made of them."""
    files = []
    for path in (*case.channels.values(), case.label):
        state = path.stat() if path.exists() else None
        files.append([path.name, state.st_size, state.st_mtime_ns] if state else [path.name])
    rules = {
        "format": [FORMAT, BINS, GRID],
        "files": files,
        "bins": [asdict(channel) for channel in job.bins],
        "labels": job.dataset_json.document["labels"],
        "orientation": job.dataset_json.orientation,
    }
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
