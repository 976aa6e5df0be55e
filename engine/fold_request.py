"""What is asked of the training of one fold, and where somebody hears how it goes (torch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.cascade_stage import StageFold
from engine.compilation import Compile
from engine.experiment import Experiment
from engine.parallel import Progress
from engine.rehearsal import Rehearsal
from engine.schedule import Schedule
from engine.sides import MirrorPolicy, SidesPolicy
from engine.starting_weights import StartingWeights
from engine.step_gradients import Precision
from engine.training_log import EpochRecord
from engine.training_profile import TrainingProfile


@dataclass(frozen=True, kw_only=True)
class FoldRequest:
    """What is to be trained. The fold's own seed is `seed` plus its number, so that the members of an ensemble start
    differently. `keeps_logits`: for ensembles of configurations (engine/selection.py). `any_precision`: a fold that is
    finished may have been trained in another one. `probes`: a step's memory is measured before the first
    (engine/memory_probe.py). `start` and `rehearsal`: of a fine-tuning (engine/fine_tuning.py)."""

    experiment: Experiment
    results: Path
    configuration: str
    fold: str
    profile: TrainingProfile
    schedule: Schedule
    seed: int
    device: torch.device
    precision: Precision
    deterministic: bool
    sides: SidesPolicy = "keep"
    mirror: MirrorPolicy = "all"
    keeps_logits: bool = True
    loader_threads: int = 1
    any_precision: bool = False
    compile: Compile = "auto"
    probes: bool = True
    start: StartingWeights | None = None
    rehearsal: Rehearsal | None = None

    @property
    def model_folder(self) -> Path:
        return self.experiment.model_folder(self.results, self.profile.trainer, self.configuration)

    @property
    def folder(self) -> Path:
        return self.stage.folder

    @property
    def stage(self) -> StageFold:
        return StageFold(
            experiment=self.experiment,
            results=self.results,
            trainer=self.profile.trainer,
            configuration=self.configuration,
            fold=self.fold,
        )


@dataclass(frozen=True, kw_only=True)
class FoldReport:
    """Where somebody wants to know how it goes: `line` gets what also goes into the log, `epoch` the record and the
    epochs of the schedule, `case` validated cases and how many there are."""

    line: Callable[[str], None] = lambda _text: None
    epoch: Callable[[EpochRecord, int], None] = lambda _record, _epochs: None
    case: Progress = lambda _done, _total: None
