"""Where the files of a model in the making lie, in nnU-Net's layout (nnU-Net v2).

<preprocessed>/<dataset>/   dataset.json  dataset_fingerprint.json  <plans>.json  splits_final.json
                            <data_identifier>/   preprocessed cases (engine/preprocessed.py)
<results>/<dataset>/<trainer>__<plans>__<configuration>/
                            plans.json  dataset.json  dataset_fingerprint.json  fold_0/ ... fold_all/
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.dataset import DATASET_JSON, RawDataset, open_dataset
from engine.dataset_lock import reading_dataset
from engine.errors import DatasetInvalid, DiskTooSmall, ImportRefused
from engine.fingerprint import FINGERPRINT_JSON, Fingerprint, read_fingerprint
from engine.json_reader import read_json
from engine.json_writer import write_json
from engine.memory import available_bytes
from engine.parallel import Progress
from engine.plans import Configuration, Plans, read_plans
from engine.preprocessed import PreprocessJob, preprocess_dataset
from engine.preprocessing_needs import fitting_processes, needed_bytes
from engine.split_extension import uncovered
from engine.splits import SPLITS_JSON, Split, mixed_patients, read_splits

PLANS_JSON = "plans.json"
REQUEST, LOG, EPOCHS = "training.json", "training_log.txt", "training_log.jsonl"
PROGRESS, BEST_CASE, WORST_CASE = "progress.png", "overlay_best.png", "overlay_worst.png"
VALIDATION, LOGITS = "validation", "validation_logits"
FINAL = "checkpoint_final.pth"
"""Of a fold's folder (engine/fold_training.py)."""
OWN = "seggate"
"""The key in plans.json of what nnU-Net does not know."""
ALL = "all"
"""nnU-Net's name of the fold that is trained and validated on every case."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A planned dataset: `folder` is <preprocessed>/<name>; `plans_json` the content of its plans file.

    `dataset` has the raw images and labels. The plans' own name is part of every result folder's name.
    """

    name: str
    dataset: RawDataset
    folder: Path
    plans_json: Mapping[str, Any]
    plans: Plans

    def configuration(self, name: str) -> Configuration:
        """Raises DatasetInvalid, naming those that there are."""
        if name not in self.plans.configurations:
            there = ", ".join(self.plans.configurations)
            raise DatasetInvalid(f"{self.plans.plans_name}: no configuration {name[:80]!r}; there are {there}")
        return self.plans.configurations[name]

    def data_folder(self, configuration: str) -> Path:
        """Where the preprocessed cases of a configuration lie."""
        return self.folder / self.configuration(configuration).data_identifier

    def fingerprint(self) -> Fingerprint:
        return read_fingerprint(self.folder / FINGERPRINT_JSON)

    def split(self, fold: str) -> Split:
        """The cases of a fold; `all` trains and validates on every case. Raises DatasetInvalid for a fold that the
        splits do not have, or where there are no splits."""
        names = tuple(case.name for case in self.dataset.cases)
        if fold == ALL:
            return Split(train=names, val=names)
        splits = self.splits()
        # "00" would be trained beside "0".
        if not fold.isdecimal() or int(fold) >= len(splits) or str(int(fold)) != fold:
            raise DatasetInvalid(f"{SPLITS_JSON}: no fold {fold[:20]!r}; there are 0 to {len(splits) - 1}, and {ALL}")
        return splits[int(fold)]

    def splits(self, *, with_excluded: bool = False) -> tuple[Split, ...]:
        """The folds without the cases that were excluded since they were made, or with them. Raises DatasetInvalid."""
        path = self.folder / SPLITS_JSON
        if not path.exists():
            raise DatasetInvalid(f"{self.name}: there is no {SPLITS_JSON}; only the fold `{ALL}` can be trained")
        names, excluded = [case.name for case in self.dataset.cases], self.dataset.excluded_names
        if with_excluded:
            return read_splits(path, [*names, *excluded])
        return read_splits(path, names, excluded=excluded)

    def job(self, configurations: Sequence[str]) -> PreprocessJob:
        """What preprocessing these configurations needs; those that share their data are made once."""
        by_folder = {c.data_identifier: c for c in reversed([self.configuration(name) for name in configurations])}
        chosen = tuple(reversed(by_folder.values()))
        return PreprocessJob(
            plans=self.plans,
            configurations=chosen,
            dataset_json=self.dataset.json,
            folders={c.name: self.folder / c.data_identifier for c in chosen},
        )

    def previous_stages(self, configuration: str) -> tuple[str, ...]:
        """The stages that a cascade goes through before this one, first stage first; none for other configurations.
        Raises DatasetInvalid when they run in a circle, or one is not planned."""
        stages: list[str] = []
        stage = self.configuration(configuration).previous_stage
        while stage is not None:
            if stage in (configuration, *stages):
                raise DatasetInvalid(f"{self.plans.plans_name}: {configuration}: its previous stages run in a circle")
            stages.insert(0, stage)
            stage = self.configuration(stage).previous_stage
        return tuple(stages)

    def in_stage_order(self, configurations: Sequence[str], *, complete: bool = False) -> tuple[str, ...]:
        """The configurations once each, none before an earlier stage of it; with `complete` those stages too."""
        every = [stage for name in configurations for stage in (*self.previous_stages(name), name)]
        return tuple(name for name in dict.fromkeys(every) if complete or name in configurations)

    def mixed_patients(self, folds: Sequence[str]) -> str | None:
        """A sentence on patients of whom one of these folds has cases to train and cases to validate on; the fold
        `all`, which has every case on both, is not asked."""
        return mixed_patients([self.split(fold) for fold in folds if fold != ALL], self.dataset.json.patients)

    def never_validated(self) -> tuple[str, ...]:
        """Cases that no fold of the splits validates: no network predicts them that was not trained on them."""
        validated = {name for split in self.splits() for name in split.val}
        return tuple(case.name for case in self.dataset.cases if case.name not in validated)

    def in_no_fold(self) -> tuple[str, ...]:
        """Cases that the splits do not know: no fold but `all` is trained or validated on them."""
        return uncovered(self.splits(), [case.name for case in self.dataset.cases])

    def model_folder(self, results: Path, trainer: str, configuration: str) -> Path:
        return results / self.name / f"{trainer}__{self.plans.plans_name}__{configuration}"

    def prepare_model_folder(self, folder: Path) -> None:
        """Puts plans.json, dataset.json and the fingerprint there, as nnU-Net wants them beside its folds.

        Raises DatasetInvalid when the folder has folds of other plans or labels: they would not fit any more.
        """
        other = self._differs(folder)
        if other is not None:
            raise DatasetInvalid(
                f"{folder.name}/{other} differs from what is to be trained; move that folder away, or plan under "
                "another --plans-name"
            )
        for name, document in self._documents().items():
            if not (folder / name).exists():
                write_json(document, folder / name)
        shutil.copyfile(self.folder / FINGERPRINT_JSON, folder / FINGERPRINT_JSON)

    def check_model_folder(self, folder: Path) -> None:
        """Raises DatasetInvalid when its folds were trained with other plans, labels or channels than those of now."""
        other = self._differs(folder)
        if other is not None:
            raise DatasetInvalid(
                f"{folder.name} was trained with another {other} than that of now: the dataset was planned anew, or "
                "its labels have changed. Train it again under another --plans-name, or put the old file back"
            )

    def _documents(self) -> dict[str, dict[str, Any]]:
        return {PLANS_JSON: dict(self.plans_json), DATASET_JSON: dict(self.dataset.json.document)}

    def _differs(self, folder: Path) -> str | None:
        """The file of a model's folder that is there and of another experiment."""
        for name, document in self._documents().items():
            path = folder / name
            if path.exists() and _relevant(read_json(path, error=DatasetInvalid)) != _relevant(document):
                return name
        return None


def open_experiment(raw: Path, preprocessed: Path, *, plans_name: str | None, name: str | None = None) -> Experiment:
    """The dataset in `raw` with the plans that `seggate plan` or nnU-Net wrote; without `plans_name` the only ones.

    Raises DatasetInvalid when there are none or several, ImportRefused when they cannot be read.
    """
    dataset = open_dataset(raw)
    folder = preprocessed / (name or dataset.name)
    path = folder / f"{plans_name}.json" if plans_name is not None else _only_plans(folder)
    if not path.is_file():
        raise DatasetInvalid(f"{path} is not there: run `seggate plan` first")
    document = read_json(path, error=ImportRefused)
    return Experiment(name=folder.name, dataset=dataset, folder=folder, plans_json=document, plans=read_plans(document))


def preprocess_experiment(
    experiment: Experiment,
    configurations: Sequence[str],
    *,
    processes: int,
    tell: Callable[[str], None],
    progress: Progress | None = None,
) -> int:
    """Makes the preprocessed cases that are not there yet; returns how many cases something was made for. Takes fewer
    processes where memory would not do for all, and says so by `tell`.

    Raises DiskTooSmall or MemoryExceeded with the numbers before anything is written, DatasetBusy while the raw images
    are being converted, and what `preprocess_dataset` raises.
    """
    job = experiment.job(configurations)
    fingerprint = experiment.fingerprint()
    cases = (fingerprint.shapes_after_crop, fingerprint.spacings)
    needed = needed_bytes(job, *cases)
    there = sum(path.stat().st_size for folder in job.folders.values() for path in folder.glob("*.npy"))
    if needed > there:
        check_disk(experiment.folder, needed - there, "the preprocessed cases")
        fitting = fitting_processes(job, *cases, processes=processes, free_bytes=available_bytes())
        if fitting < min(processes, len(experiment.dataset.cases)):
            tell(f"{fitting} of {processes} processes: free memory does not do for more of the largest cases at once")
        processes = fitting
    with reading_dataset(experiment.dataset.folder):
        return preprocess_dataset(job, experiment.dataset.cases, processes=processes, progress=progress)


def is_finished(folder: Path) -> bool:
    """Whether a fold's folder has a trained and validated network, with everything that is made of it."""
    return (folder / REQUEST).exists() and "result" in read_json(folder / REQUEST, error=DatasetInvalid)


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raises DiskTooSmall when `folder`'s disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskTooSmall(
            f"{what} need about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free on the disk of "
            f"{folder}; free some, or choose another folder"
        )


def _only_plans(folder: Path) -> Path:
    others = {DATASET_JSON, FINGERPRINT_JSON, SPLITS_JSON}
    found = sorted(path for path in folder.glob("*.json") if path.name not in others)
    if len(found) > 1:
        names = ", ".join(path.stem for path in found)
        raise DatasetInvalid(f"{folder.name} has several plans ({names}); choose with --plans-name")
    return found[0] if found else folder / "nnUNetPlans.json"


def _relevant(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a network that was trained depends on: of dataset.json its labels and channels, of plans all but `OWN`."""
    if "configurations" in document:
        return {key: value for key, value in document.items() if key != OWN}
    keys = ("labels", "regions_class_order", "channel_names", "modality", "file_ending")
    return {key: document[key] for key in keys if key in document}
