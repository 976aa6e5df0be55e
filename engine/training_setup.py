"""What one training is: everything that decides the weights that come out (torch)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.augmentation_profile import AugmentationPlan
from engine.compilation import Compile
from engine.data_digest import data_digest
from engine.labels import LabelManager
from engine.plans import Configuration
from engine.rehearsal import Rehearsal
from engine.schedule import Schedule
from engine.stage_predictions import PreviousStage
from engine.starting_weights import StartingWeights
from engine.step_gradients import Precision


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """One fold of one configuration.

    `folder` has the preprocessed cases, ours or nnU-Net's (engine/preprocessed.py). `deterministic`: bit-identical on
    the same kind of processor with the same number of threads and processes. `init_args` go into the checkpoints, for
    nnU-Net (`training_checkpoint.init_args`). `loader_threads`: see BatchStream; `compile`: engine/compilation.py.
    `channels` are the image's own; a cascade reads the label maps of `previous`, whose labels are the augmentation's
    `previous_labels`. A fine-tuning begins at `start` instead of drawn weights, and mixes `rehearsal` into its batches.
    """

    configuration: Configuration
    batch_dice: bool
    labels: LabelManager
    channels: int
    folder: Path
    training_cases: tuple[str, ...]
    validation_cases: tuple[str, ...]
    augmentation: AugmentationPlan
    schedule: Schedule
    seed: int
    device: torch.device
    precision: Precision
    deterministic: bool
    init_args: dict[str, Any] = field(default_factory=dict)
    loader_threads: int = 0
    compile: Compile = "auto"
    previous: PreviousStage | None = None
    start: StartingWeights | None = None
    rehearsal: Rehearsal | None = None

    @property
    def input_channels(self) -> int:
        """What the network takes: the image's channels and, in a cascade, one for each label of the stage before."""
        return self.channels + len(self.augmentation.previous_labels)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a training to go on, its cases' arrays among it; plain values. Time budget and
        device may change. Raises DatasetInvalid when a case is not there."""
        schedule = self.schedule
        return {
            "configuration": self.configuration.name,
            "plans": _digest(self.configuration, self.batch_dice, self.channels),
            "labels": _digest(self.labels),
            "augmentation": _digest(self.augmentation),
            "training cases": _digest(self.training_cases),
            "validation cases": _digest(self.validation_cases),
            "training data": data_digest(self.folder, (*self.training_cases, *self.validation_cases)),
            "previous stage": None if self.previous is None else self.previous.digest,
            "seed": self.seed,
            "epochs": schedule.epochs,
            "iterations": schedule.iterations,
            "validation iterations": schedule.validation_iterations,
            "learning rate": schedule.learning_rate,
            "optimiser": [
                schedule.decay_exponent,
                schedule.momentum,
                schedule.weight_decay,
                schedule.gradient_norm,
            ],
            "encoder factor": schedule.encoder_factor,
            "start": None if self.start is None else self.start.digest,
            "rehearsal": None if self.rehearsal is None else _digest(self.rehearsal),
            "precision": self.precision,
            "deterministic": self.deterministic,
        }


def default_precision(device: torch.device) -> Precision:
    """fp16 on a GPU, as nnU-Net; bf16 on a processor that has it in hardware; else float32."""
    if device.type == "cuda":
        return "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def default_loader_threads(device: torch.device) -> int:
    """None on a processor: the network has all its cores, and a batch costs a twentieth of a step."""
    return 2 if device.type == "cuda" else 0


def _digest(*parts: object) -> str:
    """Of data classes and tuples, whose text has all that is in them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
