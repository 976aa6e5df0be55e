"""Continual fine-tuning of a trained model on a few new cases, with rehearsal of the old ones (ART-21; torch).

    model, its dataset, new cases ─▶ one dataset, nothing planned anew ─▶ per fold: all weights kept ─▶ train_fold

    <results>/<dataset>/<trainer>__<plans>__<configuration>/   as every training's, and fine_tuning.json
    <results>/fine_tuning/raw/<dataset>, preprocessed/<dataset>   old and new cases together (engine/joined_dataset.py)

A numbered fold is trained on its old training cases and the new ones, and validated on its old validation cases; the
fold `all` is trained and validated on every case, as always. At most 10 epochs at a base learning rate of 1e-4, of
which the encoder has half.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.compilation import Compile
from engine.dataset import DATASET_JSON, RawDataset, open_dataset
from engine.dataset_lock import reading_dataset
from engine.errors import DatasetInvalid, TrainingRefused
from engine.experiment import ALL, Experiment, open_experiment, preprocess_experiment
from engine.fingerprint import FINGERPRINT_JSON
from engine.fold_request import FoldReport, FoldRequest
from engine.fold_training import train_fold
from engine.joined_dataset import join_raw, link_preprocessed, refuse_other_task, refuse_same_names
from engine.json_reader import read_json
from engine.json_writer import write_json
from engine.model_report import write_report
from engine.parallel import Progress
from engine.provenance import this_software
from engine.rehearsal import LEAST_SHARE, MOST_SHARE, SHARE, Rehearsal
from engine.schedule import Schedule
from engine.sides import MirrorPolicy, SidesPolicy, plan_mirroring
from engine.splits import SPLITS_JSON, Split, read_splits, write_splits
from engine.step_gradients import Precision
from engine.trained_model import TrainedFold, TrainedModel, open_trained_model
from engine.training_lock import is_asked_to_stop, training_lock
from engine.training_processes import TrainingProcesses
from engine.training_profile import TRAINING_PROFILES, TrainingProfile
from engine.validated_fold import checkpoint_digest

MOST_EPOCHS = 10
LEARNING_RATE = 1e-4
ENCODER_FACTOR = 0.5
FINE_TUNING_JSON = "fine_tuning.json"
JOINED = "fine_tuning"
"""The folder in the results that has old and new cases together."""
FORMAT = 1

# Of the file; what a fold begins with is compared fold by fold.
_MAY_DIFFER = ("software", "base")
_LOOK_S = 0.5
_SIDES: tuple[SidesPolicy, ...] = ("keep", "swap", "ignore")
_MIRRORS: tuple[MirrorPolicy, ...] = ("all", "lateral", "none")

Reporting = Callable[[FoldRequest], AbstractContextManager[FoldReport]]


class _Stopped(Exception):
    """Leaves preprocessing between two cases."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """What is asked for. `model` is the trained model's folder, `old` its raw dataset, `cases` the raw dataset of the
    new cases; `preprocessed` may have the old dataset's folder with splits and preprocessed cases, which saves making
    them again. `folds`: () is all that the model has. The other fields are as for `FoldRequest`."""

    model: Path
    old: Path
    cases: Path
    results: Path
    preprocessed: Path | None
    folds: tuple[str, ...] = ()
    epochs: int = MOST_EPOCHS
    iterations: int = 250
    rehearsal: float = SHARE
    budget_s: float | None = None
    seed: int = 0
    device: torch.device
    precision: Precision
    any_precision: bool = False
    deterministic: bool = False
    keeps_logits: bool = True
    loader_threads: int = 0
    compile: Compile = "auto"
    probes: bool = True
    workers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= MOST_EPOCHS:
            raise ValueError(f"{self.epochs} epochs: a fine-tuning has 1 to {MOST_EPOCHS}")
        if not LEAST_SHARE <= self.rehearsal <= MOST_SHARE:
            raise ValueError(f"rehearsal share {self.rehearsal:g}: {LEAST_SHARE:g} to {MOST_SHARE:g} is allowed")

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            epochs=self.epochs,
            iterations=self.iterations,
            learning_rate=LEARNING_RATE,
            encoder_factor=ENCODER_FACTOR,
            budget_s=self.budget_s,
        )


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """`is_finished` is False when it was told to stop; `folds` are the folders that were begun."""

    is_finished: bool
    model_folder: Path
    folds: tuple[Path, ...]


@contextmanager
def _turn(folder: Path, stop: Callable[[], bool]) -> Iterator[None]:
    """Holds the folder of what all folds share; another process that prepares a fold there is waited for."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(training_lock(folder))
                break
            except TrainingRefused:
                if stop():
                    raise _Stopped from None
                time.sleep(_LOOK_S)
        yield


@contextmanager
def _silent(_request: FoldRequest) -> Iterator[FoldReport]:
    yield FoldReport()


def fine_tune(
    tuning: FineTuning,
    *,
    stop: Callable[[], bool] = lambda: False,
    reporting: Reporting = _silent,
    tell: Callable[[str], None] = lambda _text: None,
    progress: Progress = lambda _done, _total: None,
    processes: TrainingProcesses | None = None,
) -> FineTuned:
    """Fine-tunes fold after fold; goes on where it was stopped or killed, and leaves finished folds as they are.

    `reporting` is entered for each fold, `tell` gets remarks, `progress` the preprocessed cases. Several `processes`
    call this together.

    Raises DatasetInvalid when the new cases have other labels or channels than the model, names that the old dataset
    has, or a training case of a fold is gone; TrainingRefused when the results are of another fine-tuning, or somebody
    is at work there; ImportRefused for a checkpoint that cannot be read or does not fit; and what `train_fold` and
    `preprocess_experiment` raise.
    """
    processes = processes or TrainingProcesses()
    run = _Run(tuning, open_trained_model(tuning.model))
    asked = processes.agreed(stop)
    if not processes.on_first(lambda: run.prepare(stop, tell, progress)):
        return FineTuned(is_finished=False, model_folder=run.target, folds=())
    experiment = run.experiment()
    begun: list[Path] = []
    for fold in run.folds:
        if asked():
            return FineTuned(is_finished=False, model_folder=run.target, folds=tuple(begun))
        request = run.request(experiment, fold)
        begun.append(request.folder)
        with reporting(request) as report:
            finished = train_fold(request, stop=stop, report=report, processes=processes)
        if processes.is_first:
            write_report(request.model_folder, experiment.dataset.json)
        if not finished:
            return FineTuned(is_finished=False, model_folder=run.target, folds=tuple(begun))
    return FineTuned(is_finished=True, model_folder=run.target, folds=tuple(begun))


class _Run:
    """One run of `fine_tune`. Raises what it does."""

    def __init__(self, tuning: FineTuning, model: TrainedModel) -> None:
        self.tuning, self.model = tuning, model
        self.old, self.new = open_dataset(tuning.old), open_dataset(tuning.cases)
        for dataset in (self.old, self.new):
            refuse_other_task(model.dataset_json, dataset.json, what=dataset.name)
        refuse_same_names(self.old, self.new)
        self.folds = tuple(model.fold(name) for name in tuning.folds or model.folds)
        self.raw = tuning.results / JOINED / "raw" / model.dataset_name
        self.preprocessed = tuning.results / JOINED / "preprocessed"
        self.target = tuning.results / model.dataset_name / model.folder.resolve().name
        if self.target.resolve() == model.folder.resolve():
            raise TrainingRefused(f"{model.folder}: is the model itself; choose another --results")

    def experiment(self) -> Experiment:
        return open_experiment(self.raw, self.preprocessed, plans_name=self.model.plans.plans_name)

    def prepare(self, stop: Callable[[], bool], tell: Callable[[str], None], progress: Progress) -> bool:
        """The joined dataset, preprocessed; False when told to stop. Holds the first fold meanwhile, so that `seggate
        train status` and `stop` see that it is at work."""
        first = self.target / f"fold_{self.folds[0].name}"

        def asked() -> bool:
            return stop() or is_asked_to_stop(first)

        def advance(done: int, total: int) -> None:
            progress(done, total)
            if asked() and done < total:
                raise _Stopped

        try:
            with training_lock(first), _turn(self.tuning.results / JOINED, asked):
                self._note()
                with reading_dataset(self.old.folder), reading_dataset(self.new.folder):
                    dataset = join_raw(self.old, self.new, self.raw)
                self._plan(dataset, tell)
                preprocess_experiment(
                    self.experiment(),
                    [self.model.configuration],
                    processes=self.tuning.workers,
                    tell=tell,
                    progress=advance,
                )
        except _Stopped:
            return False
        return not asked()

    def request(self, experiment: Experiment, fold: TrainedFold) -> FoldRequest:
        tuning = self.tuning
        new = {case.name for case in self.new.cases}
        sides, mirror = self._policies(experiment, fold)
        return FoldRequest(
            experiment=experiment,
            results=tuning.results,
            configuration=self.model.configuration,
            fold=fold.name,
            profile=profile_of(self.model.trainer),
            schedule=tuning.schedule,
            seed=tuning.seed,
            device=tuning.device,
            precision=tuning.precision,
            any_precision=tuning.any_precision,
            deterministic=tuning.deterministic,
            sides=sides,
            mirror=mirror,
            keeps_logits=tuning.keeps_logits,
            loader_threads=tuning.loader_threads,
            compile=tuning.compile,
            probes=tuning.probes,
            start=fold.start,
            rehearsal=Rehearsal(
                old=tuple(name for name in experiment.split(fold.name).train if name not in new),
                share=tuning.rehearsal,
            ),
        )

    def _policies(self, experiment: Experiment, fold: TrainedFold) -> tuple[SidesPolicy, MirrorPolicy]:
        """The options under which the model was mirrored as it was. Raises DatasetInvalid where there are none: new
        cases are stored from the other side, or a trainer of nnU-Net mirrors along axes of its own."""
        refused: DatasetInvalid | None = None
        configuration = self.model.plans.configurations[self.model.configuration]
        for sides in _SIDES:
            for mirror in _MIRRORS:
                try:
                    found = plan_mirroring(experiment.dataset, self.model.plans, configuration, sides, mirror)
                except DatasetInvalid as error:
                    refused = refused or error
                    continue
                kept = tuple(a for a in found.axes if not (found.paired_labels and a == found.lateral_axis))
                if (found.axes, kept) == (fold.mirror_axes, fold.inference_mirror_axes):
                    return sides, mirror
        raise refused or DatasetInvalid(
            f"{self.model.folder.name}: fold {fold.name} was mirrored along axes {list(fold.mirror_axes)}, and is "
            f"along {list(fold.inference_mirror_axes)} in prediction, which no training here does with these cases"
        )

    def _plan(self, dataset: RawDataset, tell: Callable[[str], None]) -> None:
        """The model's own plans and fingerprint, and its folds with the new cases to train on."""
        folder = self.preprocessed / self.model.dataset_name
        folder.mkdir(parents=True, exist_ok=True)
        earlier = None if self.tuning.preprocessed is None else self.tuning.preprocessed / self.model.dataset_name
        write_json(self.model.plans_json, folder / f"{self.model.plans.plans_name}.json")
        write_json(dataset.json.document, folder / DATASET_JSON)
        places = [self.model.folder, *([] if earlier is None else [earlier])]
        fingerprint = next((path for p in places if (path := p / FINGERPRINT_JSON).is_file()), None)
        if fingerprint is None:
            raise DatasetInvalid(
                f"{self.model.folder.name}: has no {FINGERPRINT_JSON}; put the one that the model was planned with "
                "there, or name the folder that has it with --preprocessed"
            )
        shutil.copyfile(fingerprint, folder / FINGERPRINT_JSON)
        splits = self._splits(earlier, tell)
        if splits:
            write_splits(splits, folder / SPLITS_JSON)
        if earlier is not None:
            identifier = self.model.plans.configurations[self.model.configuration].data_identifier
            link_preprocessed([case.name for case in self.old.cases], earlier / identifier, folder / identifier)

    def _splits(self, earlier: Path | None, tell: Callable[[str], None]) -> list[Split]:
        """Of every numbered fold up to the model's last one, by the cases that it says it was trained on."""
        numbers = [int(name) for name in self.model.folds if name != ALL]
        own = {number: split for number in numbers if (split := self.model.split(str(number))) is not None}
        extended = {number: self._extended(number, split, tell) for number, split in own.items()}
        planned = self._planned_splits(earlier)
        found: list[Split] = []
        for number in range(max([len(planned) - 1, *numbers]) + 1):
            if number in extended:
                found.append(extended[number])
            elif number < len(planned):
                found.append(self._extended(number, planned[number], tell))
            else:
                raise DatasetInvalid(
                    f"{self.model.folder.name}: fold {number} does not say which cases it was trained on; put the "
                    f"{SPLITS_JSON} that it was trained with into {self.old.folder}, or name the folder that has it "
                    "with --preprocessed"
                )
        return found

    def _planned_splits(self, earlier: Path | None) -> tuple[Split, ...]:
        names = [case.name for case in self.old.cases]
        for folder in (self.old.folder, *([] if earlier is None else [earlier])):
            if (folder / SPLITS_JSON).is_file():
                return read_splits(folder / SPLITS_JSON, names, excluded=self.old.excluded_names)
        return ()

    def _extended(self, number: int, split: Split, tell: Callable[[str], None]) -> Split:
        there = {case.name for case in self.old.cases}
        left: set[str] = {*split.train, *split.val} - there
        gone = sorted(left - self.old.excluded_names)
        if gone:
            raise DatasetInvalid(
                f"{self.old.name}: {gone[0]}, which fold {number} was trained with, is not there ({len(gone)} such); "
                "without its old cases a model forgets them"
            )
        if left:
            tell(f"fold {number}: {len(left)} of its cases are excluded since, and left out")
        train = [name for name in split.train if name in there]
        return Split(
            train=tuple(sorted([*train, *(case.name for case in self.new.cases)])),
            val=tuple(name for name in split.val if name in there),
        )

    def _note(self) -> None:
        """Writes down where the model comes from. Raises TrainingRefused when another fine-tuning is there."""
        path = self.target / FINE_TUNING_JSON
        now = self._document()
        if path.exists():
            before = read_json(path, error=DatasetInvalid)
            known, asked = before["base"]["folds"], now["base"]["folds"]
            other = next((key for key in now if key not in _MAY_DIFFER and before.get(key) != now[key]), None)
            if other is not None or before["base"]["model"] != now["base"]["model"]:
                raise TrainingRefused(
                    f"{self.target}: is another fine-tuning's ({other or 'base'} differs); choose another --results"
                )
            changed = [fold for fold in asked if fold in known and known[fold] != asked[fold]]
            if changed:
                raise TrainingRefused(
                    f"{self.target}: fold {changed[0]} began with other weights than {self.model.folder} has now; "
                    "choose another --results"
                )
            now["base"]["folds"] = {**known, **asked}
            now["software"] = before["software"]
        write_json(now, path)

    def _document(self) -> dict[str, Any]:
        tuning, schedule = self.tuning, self.tuning.schedule
        return {
            "format": FORMAT,
            "software": this_software(),
            "base": {
                "model": f"{self.model.dataset_name}/{self.model.folder.resolve().name}",
                "folds": {
                    fold.name: {
                        "weights": fold.start.digest,
                        "checkpoint": checkpoint_digest(self.model.fold_folder(fold.name)),
                    }
                    for fold in self.folds
                },
            },
            "new_cases": [case.name for case in self.new.cases],
            "rehearsal_share": tuning.rehearsal,
            "learning_rate": schedule.learning_rate,
            "factors": {"encoder": schedule.encoder_factor, "decoder": 1.0},
            "epochs": schedule.epochs,
            "iterations": schedule.iterations,
            "seed": tuning.seed,
        }


def profile_of(trainer: str) -> TrainingProfile:
    """The trainer's augmentation, with nothing held out and the last weights kept: a few epochs need no stopping."""
    known: Mapping[str, TrainingProfile] = {profile.trainer: profile for profile in TRAINING_PROFILES.values()}
    base = known.get(trainer, TRAINING_PROFILES["nnunet"])
    return replace(base, name="fine-tune", trainer=trainer, hold_out_share=None, patience=None)
