"""The best of what was trained, by cross-validation, in nnU-Net's layout (ART-11).

    <results>/<dataset>/<model>/crossval_results_folds_0_1_2_3_4/   each case's prediction by the fold that never saw it
    <results>/<dataset>/ensembles/ensemble___<model>___<model>___0_1_2_3_4/
    <results>/<dataset>/inference_information.json                  what was chosen

A candidate is one model, or two joined by the mean of their probabilities; with the profile `article` all of them
joined. The score is the mean Dice of the foreground (engine/candidate_score.py). The winner's folder gets
postprocessing.json.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from engine.candidate_score import invented_voxels, mean_dice
from engine.case_results import (
    has_logits,
    has_prediction,
    join_outputs,
    measure_prediction,
    network_logits,
    write_prediction,
)
from engine.dataset import DATASET_JSON, Case, DatasetJson, read_case
from engine.errors import DatasetInvalid, InputRejected
from engine.evaluation import Pair, Row
from engine.experiment import LOGITS, PLANS_JSON, VALIDATION, Experiment
from engine.json_writer import write_json
from engine.metrics import SUMMARY, summarize, summary, write_summary_document
from engine.parallel import Progress, map_cases
from engine.plans import Configuration, Plans
from engine.postprocessing_search import (
    POSTPROCESSED,
    POSTPROCESSING_JSON,
    Postprocessing,
    apply_to_folder,
    find_postprocessing,
    write_postprocessing,
)
from engine.preprocessing import crop_to_nonzero
from engine.sibling_folds import refuse_mixed_mirroring
from engine.splits import KEEPS_PATIENTS_TOGETHER
from engine.training_profile import TrainingProfile
from engine.validated_fold import ValidatedFold, validated_fold

INFORMATION_JSON = "inference_information.json"
PREDICTED_BY = "seggate_predicted_by"
"""Key of ours in it: by configuration and fold, the digest of what made the predictions that were chosen from."""

Report = Callable[[str], Progress]
"""Gets the name of what begins, and returns what is to be called with (done, total)."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model, or several joined. `folder` has the predictions of every case and their summary; `score` is the mean
    Dice of the labels that the references have, None where they have none; `invented_voxels` are of other labels."""

    name: str
    configurations: tuple[str, ...]
    folder: Path
    score: float | None
    invented_voxels: int

    @property
    def rank(self) -> tuple[float, int]:
        """Higher is better: by the score, then by what is not invented."""
        return -math.inf if self.score is None else self.score, -self.invented_voxels


@dataclass(frozen=True, kw_only=True)
class Selection:
    """`information` is the file that names the choice; `summary` is the winner's, with surfaces, after
    post-processing. `notes` say what could not be tried."""

    candidates: tuple[Candidate, ...]
    best: Candidate
    postprocessing: Postprocessing
    summary: Mapping[str, Any]
    information: Path
    notes: tuple[str, ...]


def select_model(
    experiment: Experiment,
    results: Path,
    profile: TrainingProfile,
    *,
    configurations: Sequence[str],
    folds: Sequence[str],
    processes: int,
    report: Report = lambda _what: lambda _done, _total: None,
) -> Selection:
    """Raises DatasetInvalid naming the fold that is not validated, or was on other cases than the splits name, or the
    case that is in none or in two of the folds; InputRejected, WorkerDied."""
    selecting = _Selecting(experiment, results, profile, tuple(folds), processes, report)
    return selecting.run(tuple(configurations))


@dataclass(frozen=True)
class _Selecting:
    """One run of `select_model`; its parts share what was asked for."""

    experiment: Experiment
    results: Path
    profile: TrainingProfile
    folds: tuple[str, ...]
    processes: int
    report: Report
    _checked: dict[tuple[str, str], ValidatedFold] = field(default_factory=dict, init=False, repr=False, compare=False)

    def run(self, configurations: tuple[str, ...]) -> Selection:
        candidates = [self._single(configuration) for configuration in configurations]
        groups, notes = self._groups(configurations)
        lacking = [c for c in configurations if any(c in group for group in groups) and not self._has_logits(c)]
        if lacking and self.profile.ensembles_everything:
            raise DatasetInvalid(
                f"{lacking[0]} kept no logits, and the profile {self.profile.name} joins all configurations: train it "
                "again without --no-keep-logits"
            )
        for configuration in lacking:
            notes.append(f"{configuration} kept no logits: no ensemble with it was tried")
        for group in groups:
            if not set(group) & set(lacking):
                candidates.append(self._ensemble(group))
        best = max(candidates, key=lambda c: c.rank)
        known = {n for c in configurations for fold in self.folds for n in self._validated(c, fold).excluded_since()}
        if known:
            notes.append(
                f"these networks learned from {len(known)} case(s) that are excluded since (the first: {min(known)}): "
                "remove the folds and train them again to be rid of it"
            )
        if (mixed := self.experiment.mixed_patients(self.folds)) is not None:
            notes.append(f"{mixed}: {KEEPS_PATIENTS_TOGETHER}")
        if best.score is None:
            notes.append("the references have no label at all: nothing says which model is better")
        if self.profile.ensembles_everything:
            last = self._last_stages(configurations)
            best = next(c for c in candidates if c.configurations == last)
        dataset = self.experiment.dataset
        references = {case.name: case.label for case in dataset.cases}
        pairs = [
            Pair(name=name, reference=references[name], prediction=best.folder / f"{name}{dataset.json.file_ending}")
            for name in sorted(self._fold_of_case())
        ]
        try:
            found = find_postprocessing(
                pairs,
                dataset.json.labels,
                most_components=self.profile.most_components,
                processes=self.processes,
                progress=self.report("post-processing"),
            )
        except InputRejected as error:
            self._refuse_damaged(best, pairs, error)
            raise
        after = apply_to_folder(
            pairs, found.steps, dataset.json.labels, best.folder / POSTPROCESSED, processes=self.processes
        )
        write_postprocessing(found, dataset.json.labels, best.folder / POSTPROCESSING_JSON)
        return Selection(
            candidates=tuple(candidates),
            best=best,
            postprocessing=found,
            summary=after,
            information=self._write_information(candidates, best, found),
            notes=tuple(notes),
        )

    def _refuse_damaged(self, best: Candidate, pairs: Sequence[Pair], error: InputRejected) -> None:
        """Raises DatasetInvalid with the first prediction that is the reason, if one is."""
        damaged = next((pair.name for pair in pairs if not has_prediction(pair.prediction)), None)
        if damaged is None:
            return
        fold, configuration = self._fold_of_case()[damaged], best.configurations[0]
        ending = self.experiment.dataset.json.file_ending
        path = self._model_folder(configuration) / f"fold_{fold}" / VALIDATION / f"{damaged}{ending}"
        raise DatasetInvalid(f"{error}: remove {path}, and {_predicts_again(configuration, fold)}") from error

    def _groups(self, configurations: tuple[str, ...]) -> tuple[list[tuple[str, ...]], list[str]]:
        """What is to be joined, and what is not: a stage is part of its cascade already."""
        if self.profile.ensembles_everything:
            last = self._last_stages(configurations)
            left = [c for c in configurations if c not in last]
            notes = [f"{c} is the first stage of a cascade and joined through it only" for c in left]
            return [last] if len(last) > 1 else [], notes
        pairs = list(combinations(configurations, 2))
        staged = [pair for pair in pairs if len(self._last_stages(pair)) < len(pair)]
        notes = [f"{' and '.join(pair)} are stages of one cascade: they are not joined" for pair in staged]
        return [pair for pair in pairs if pair not in staged], notes

    def _last_stages(self, configurations: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are no stage of another one of them."""
        earlier = {stage for c in configurations for stage in self.experiment.previous_stages(c)}
        return tuple(c for c in configurations if c not in earlier)

    def _model_folder(self, configuration: str) -> Path:
        return self.experiment.model_folder(self.results, self.profile.trainer, configuration)

    def _validated(self, configuration: str, fold: str) -> ValidatedFold:
        """Checked once in a run: that takes a digest of the checkpoint."""
        key = configuration, fold
        if key not in self._checked:
            self._checked[key] = validated_fold(
                self.experiment, self.results, trainer=self.profile.trainer, configuration=configuration, fold=fold
            )
        return self._checked[key]

    def _fold_of_case(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for fold in self.folds:
            for name in self.experiment.split(fold).val:
                if name in found:
                    raise DatasetInvalid(
                        f"{name} is validated in fold {found[name]} and in fold {fold}; each case may be in one"
                    )
                found[name] = fold
        return found

    def _single(self, configuration: str) -> Candidate:
        """All cases together, each as the fold predicted it that was not trained on it."""
        model = self._model_folder(configuration)
        for fold in self.folds:
            if not (model / f"fold_{fold}" / VALIDATION / SUMMARY).exists():
                raise DatasetInvalid(
                    f"{model.name}: fold {fold} is not validated; run `seggate train --configuration {configuration} "
                    f"--fold {fold}`, or choose with --configuration and --fold"
                )
        refuse_mixed_mirroring(model, self.folds)
        validated_folds = {fold: self._validated(configuration, fold) for fold in self.folds}
        folder = model / f"crossval_results_folds_{'_'.join(self.folds)}"
        self._begin(folder)
        entries = []
        self._fold_of_case()
        for fold, validated in validated_folds.items():
            progress = self.report(f"{configuration}, fold {fold}: measured anew")
            for entry in validated.entries(processes=self.processes, progress=progress):
                path = Path(entry["prediction_file"])
                if not path.exists():
                    raise DatasetInvalid(f"{path} is not there: {_predicts_again(configuration, fold)}")
                shutil.copy2(path, folder / path.name)
                entries.append({**entry, "prediction_file": str(folder / path.name)})
        entries.sort(key=lambda entry: str(entry["prediction_file"]))
        document = summarize(entries)
        write_summary_document(folder / SUMMARY, document)
        return _candidate(model.name, (configuration,), folder, document)

    def _ensemble(self, group: tuple[str, ...]) -> Candidate:
        """The mean of the configurations' probabilities, from the logits that their folds kept."""
        names = [self._model_folder(configuration).name for configuration in group]
        title = "___".join(("ensemble", *names, "_".join(self.folds)))
        folder = self.results / self.experiment.name / "ensembles" / title
        self._begin(folder)
        plans = self.experiment.plans
        fold_of_case = self._fold_of_case()
        job = _Join(
            # A read-only view cannot travel to another process.
            plans=replace(
                plans,
                configurations={},
                foreground_intensity_properties=dict(plans.foreground_intensity_properties),
            ),
            dataset_json=self.experiment.dataset.json,
            configurations=tuple(self.experiment.configuration(configuration) for configuration in group),
            logits={
                name: tuple(self._model_folder(c) / f"fold_{fold}" / LOGITS / f"{name}.npy" for c in group)
                for name, fold in fold_of_case.items()
            },
            folder=folder,
        )
        cases = [case for case in self.experiment.dataset.cases if case.name in fold_of_case]
        rows = map_cases(
            partial(_join, job), cases, processes=self.processes, progress=self.report(" and ".join(group))
        )
        document = summary(rows)
        write_summary_document(folder / SUMMARY, document)
        return _candidate(title, group, folder, document)

    def _has_logits(self, configuration: str) -> bool:
        model = self._model_folder(configuration)
        return all(
            has_logits(model / f"fold_{fold}" / LOGITS / f"{name}.npy") for name, fold in self._fold_of_case().items()
        )

    def _begin(self, folder: Path) -> None:
        write_json(dict(self.experiment.plans_json), folder / PLANS_JSON)
        write_json(dict(self.experiment.dataset.json.document), folder / DATASET_JSON)

    def _write_information(self, candidates: Sequence[Candidate], best: Candidate, found: Postprocessing) -> Path:
        """nnU-Net's file; importing a dataset's results follows it."""
        selected = [
            {
                "configuration": configuration,
                "trainer": self.profile.trainer,
                "plans_identifier": self.experiment.plans.plans_name,
            }
            for configuration in best.configurations
        ]
        considered = [c for c in candidates if len(c.configurations) == 1]
        path = self.results / self.experiment.name / INFORMATION_JSON
        write_json(
            {
                "folds": [int(fold) for fold in self.folds],
                "dataset_name_or_id": self.experiment.name,
                "considered_models": [
                    {
                        "plans": self.experiment.plans.plans_name,
                        "configuration": c.configurations[0],
                        "trainer": self.profile.trainer,
                    }
                    for c in considered
                ],
                "ensembling_allowed": True,
                PREDICTED_BY: {
                    configuration: {fold: self._validated(configuration, fold).predictor() for fold in self.folds}
                    for configuration in best.configurations
                },
                "all_results": {c.name: c.score for c in candidates},
                "best_model_or_ensemble": {
                    "result_on_crossval_pre_pp": mean_dice(found.before),
                    "result_on_crossval_post_pp": mean_dice(found.after),
                    "postprocessing_file": str(best.folder / POSTPROCESSING_JSON),
                    "some_plans_file": str(best.folder / PLANS_JSON),
                    "selected_model_or_models": selected,
                },
            },
            path,
        )
        return path


@dataclass(frozen=True, kw_only=True)
class _Join:
    """What a worker needs to join the logits of a case. `logits`: by case, one file per configuration."""

    plans: Plans
    dataset_json: DatasetJson
    configurations: tuple[Configuration, ...]
    logits: Mapping[str, tuple[Path, ...]]
    folder: Path


def _join(job: _Join, case: Case) -> Row:
    """A label map that is newer than the logits it is made from is not made again."""
    path = job.folder / f"{case.name}{job.dataset_json.file_ending}"
    files = job.logits[case.name]
    loaded = read_case(case, job.dataset_json)
    if not has_prediction(path) or path.stat().st_mtime_ns < max(file.stat().st_mtime_ns for file in files):
        cropped = crop_to_nonzero(loaded.volume, job.plans)
        outputs = [
            network_logits(np.load(file, allow_pickle=False), cropped, configuration)
            for file, configuration in zip(files, job.configurations, strict=True)
        ]
        joined = join_outputs(outputs, cropped, job.plans, job.dataset_json.labels, loaded.volume.geometry)
        write_prediction(joined, case, path)
    return str(case.label), str(path), dict(measure_prediction(path, loaded, job.dataset_json))


def _predicts_again(configuration: str, fold: str) -> str:
    return f"`seggate train --configuration {configuration} --fold {fold}` predicts it again"


def _candidate(name: str, configurations: tuple[str, ...], folder: Path, document: Mapping[str, Any]) -> Candidate:
    return Candidate(
        name=name,
        configurations=configurations,
        folder=folder,
        score=mean_dice(document),
        invented_voxels=invented_voxels(document),
    )
