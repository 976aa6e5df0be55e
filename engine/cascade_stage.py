"""What a stage of a cascade needs from the one before it, and owes to the one after (nnU-Net v2; torch).

    3d_lowres, fold k ─▶ validates its cases ─▶ predicted_next_stage ─▶ 3d_cascade_fullres, any fold

A fold of a cascade is trained on predictions of every fold of the stage before: those have to be trained first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.case_results import network_logits
from engine.checkpoint import load_network, read_checkpoint
from engine.dataset import read_case
from engine.errors import TrainingRefused
from engine.experiment import ALL, LOGITS, Experiment, is_finished
from engine.parallel import Progress
from engine.preprocessing import crop_to_nonzero
from engine.stage_predictions import (
    NextStage,
    PreviousStage,
    is_predicted,
    predicted_by,
    stage_digest,
    stage_folder,
)
from engine.training_checkpoint import FINAL
from engine.validation import ModelInTraining, TorchBackend, cases_named


@dataclass(frozen=True, kw_only=True)
class StageFold:
    """One fold of one configuration, seen as a stage. `trainer` is the first part of the result folders' names."""

    experiment: Experiment
    results: Path
    trainer: str
    configuration: str
    fold: str

    @property
    def folder(self) -> Path:
        return self._model_folder(self.configuration) / f"fold_{self.fold}"

    def next_stages(self) -> tuple[NextStage, ...]:
        """Where the fold's predictions go: one folder for each configuration whose previous stage this is, as a rule
        none."""
        return tuple(
            NextStage(
                folder=stage_folder(self._model_folder(self.configuration), planned.name),
                configuration=planned,
                labels=self.experiment.dataset.json.labels,
                fold=self.fold,
            )
            for planned in self.experiment.plans.configurations.values()
            if planned.previous_stage == self.configuration
        )

    def previous_stage(self, names: Sequence[str]) -> PreviousStage | None:
        """The predictions that the fold reads for these cases; None where there is no stage before.

        Raises TrainingRefused, naming case and fold, where one is absent, or was made by the fold `all`, which was
        trained on the case: only a cascade's own fold `all` takes that.
        """
        stages = self.experiment.previous_stages(self.configuration)
        if not stages:
            return None
        folder = stage_folder(self._model_folder(stages[-1]), self.configuration)
        absent = [name for name in names if not is_predicted(folder, name)]
        if absent:
            raise TrainingRefused(self._refusal(stages[-1], absent, "has no prediction"))
        known = [] if self.fold == ALL else [name for name in names if predicted_by(folder, name) == ALL]
        if known:
            what = f"has only its fold `{ALL}`'s prediction, of a network that was trained on the case,"
            raise TrainingRefused(self._refusal(stages[-1], known, what))
        self._check_finished(stages[-1], folder, names)
        return PreviousStage(folder=folder, digest=stage_digest(folder, names))

    def _check_finished(self, previous: str, folder: Path, names: Sequence[str]) -> None:
        """Predictions of a fold that was removed, or is being trained anew, are leftovers of another network."""
        by_fold: dict[str, list[str]] = {}
        for name in names:
            fold = predicted_by(folder, name)
            if fold is not None:  # None: nnU-Net's
                by_fold.setdefault(fold, []).append(name)
        for fold, predicted in by_fold.items():
            if not is_finished(self._model_folder(previous) / f"fold_{fold}"):
                what = f"has the prediction of its fold {fold}, which is gone or not finished,"
                raise TrainingRefused(self._refusal(previous, predicted, what))

    def complete(self, *, device: torch.device, stop: Callable[[], bool], progress: Progress) -> bool:
        """For a finished fold: predicts what the next stages lack of its cases, from the logits that it kept, else with
        the network of its final checkpoint. False when it was told to stop between two cases.

        Raises ImportRefused for a checkpoint that is absent or does not fit, InputRejected, DatasetInvalid, OSError.
        """
        experiment, stages = self.experiment, self.next_stages()
        dataset, names = experiment.dataset, experiment.split(self.fold).val
        lacking = [name for name in names if any(stage.lacks(name) for stage in stages)]
        model: ModelInTraining | None = None
        for done, case in enumerate(cases_named(dataset, lacking), start=1):
            if stop():
                return False
            cropped = crop_to_nonzero(read_case(case, dataset.json).volume, experiment.plans)
            stored = self.folder / LOGITS / f"{case.name}.npy"
            if stored.exists():
                logits = np.load(stored, allow_pickle=False)
                output = network_logits(logits, cropped, experiment.configuration(self.configuration))
            else:
                model = model or self._trained(device, names)
                output = model.logits(cropped, case=case.name)
            for stage in stages:
                if stage.lacks(case.name):
                    stage.write(case.name, output, cropped)
            progress(done, len(lacking))
        return True

    def _model_folder(self, configuration: str) -> Path:
        return self.experiment.model_folder(self.results, self.trainer, configuration)

    def _trained(self, device: torch.device, names: Sequence[str]) -> ModelInTraining:
        experiment, labels = self.experiment, self.experiment.dataset.json.labels
        planned, previous = experiment.configuration(self.configuration), self.previous_stage(names)
        checkpoint = read_checkpoint(self.folder / FINAL)
        network = load_network(
            checkpoint,
            planned.architecture,
            channels=len(experiment.dataset.json.channel_names)
            + (0 if previous is None else len(labels.foreground_labels)),
            heads=labels.num_heads,
            where=f"{self.folder.parent.name}/{self.folder.name}/{FINAL}",
        )
        return ModelInTraining(
            plans=experiment.plans,
            configuration=planned,
            labels=labels,
            backends=(TorchBackend(network.to(device)),),
            mirror_axes=checkpoint.mirror_axes,
            previous=previous,
        )

    def _refusal(self, previous: str, names: Sequence[str], what: str) -> str:
        """Who lacks which case, and the command that helps."""
        name, command = names[0], f"seggate train --configuration {previous}"
        if self.fold == ALL:
            remedy = f"train {previous} first: `{command}`, or `{command} --fold {ALL}`"
        else:
            validating = [index for index, split in enumerate(self.experiment.splits()) if name in split.val]
            remedy = (
                f"train {previous} folds first: `{command}` (fold {validating[0]} predicts {name})"
                if validating
                else f"no fold of the splits validates it, and a cascade needs folds that cover every case (or the "
                f"fold `{ALL}`)"
            )
        return f"{self.configuration}, fold {self.fold}: {previous} {what} of {name} ({len(names)} such): {remedy}"
