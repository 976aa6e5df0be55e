"""The commands of a training run, as somebody would type them: one place that knows where a run's files lie.

<models>/learning/<run>/cases/<dataset>     new cases with labels, a raw dataset
                        results/            the trained folds, in nnU-Net's layout; the joined dataset
                        card.json  bundle/  what is registered
                        logs/               what each command said
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.json_reader import read_json
from engine.planners import PLANNERS
from engine.training_profile import TRAINING_PROFILES
from gateway.errors import Permanent
from gateway.learning_settings import ModelLearning

_FOLD = re.compile(r"fold_([0-9]{1,3}|all)")
FINAL = "checkpoint_final.pth"


@dataclass(frozen=True, kw_only=True)
class RunCommands:
    """Of one run. `trained` is the model folder (TRAINER__PLANS__CONFIGURATION) of the version that it begins from,
    `old` the raw dataset that this learnt from, `old_preprocessed` the folder with its splits, where there is one."""

    folder: Path
    kind: str
    trained: Path
    old: Path
    old_preprocessed: Path | None
    learning: ModelLearning
    device: str

    def __post_init__(self) -> None:
        if len(self.trained.name.split("__")) != 3:
            raise Permanent(
                f"{self.trained.name}: no model's folder; `trained` in learning.toml is one called "
                "TRAINER__PLANS__CONFIGURATION"
            )

    @property
    def dataset_name(self) -> str:
        return self.trained.parent.name

    @property
    def plans_name(self) -> str:
        return self.trained.name.split("__")[1]

    @property
    def configuration(self) -> str:
        return self.trained.name.split("__")[2]

    @property
    def cases(self) -> Path:
        """The new cases: a raw dataset of its own."""
        return self.folder / "cases" / self.dataset_name

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def raw(self) -> Path:
        """Old and new cases together."""
        return self.results / "fine_tuning" / "raw" / self.dataset_name

    @property
    def preprocessed(self) -> Path:
        return self.results / "fine_tuning" / "preprocessed"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def card(self) -> Path:
        return self.folder / "card.json"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def fold_folder(self, fold: str) -> Path:
        return self.model_folder / f"fold_{fold}"

    @property
    def model_folder(self) -> Path:
        """What the next run of this version begins from."""
        if self.kind == "fine-tuning":
            return self.results / self.dataset_name / self.trained.name
        trainer = TRAINING_PROFILES[self.learning.retraining.profile].trainer
        return self.results / self.dataset_name / f"{trainer}__{self.plans_name}__{self.configuration}"

    def folds(self) -> list[str]:
        """Those that are trained: of a fine-tuning the configured ones, or those that the model has."""
        wanted = self.learning.fine_tuning.folds
        if wanted:
            return list(wanted)
        found = [
            match.group(1)
            for path in sorted(self.trained.iterdir())
            if (match := _FOLD.fullmatch(path.name)) and (path / FINAL).is_file()
        ]
        if not found:
            raise Permanent(f"{self.trained.name}: no fold has a {FINAL}: there is nothing to begin from")
        return found

    def plan(self) -> list[str]:
        """Of a full training: by the planner that planned the model. Raises Permanent for one that we do not have."""
        planned = read_json(self.trained / "plans.json", error=Permanent).get("experiment_planner_used")
        planner = next((name for name, known in PLANNERS.items() if known.name == planned), None)
        if planner is None:
            raise Permanent(f"{self.trained.name}: planned by {str(planned)[:60]!r}, which cannot be planned by here")
        return [
            *("plan", str(self.raw), "--planner", planner, "--profile", self.learning.retraining.profile),
            *("--plans-name", self.plans_name, "--configuration", self.configuration),
            *("--preprocessed", str(self.preprocessed), "--device", self.device),
        ]

    def train(self, fold: str) -> list[str]:
        own = self.learning.fine_tuning
        if self.kind == "fine-tuning":
            return [
                *("train", "fine-tune", str(self.trained), "--cases", str(self.cases), "--results", str(self.results)),
                *("--old", str(self.old), "--fold", fold, "--device", self.device),
                *(() if self.old_preprocessed is None else ("--preprocessed", str(self.old_preprocessed))),
                *("--epochs", str(own.epochs), "--iterations", str(own.iterations)),
                *("--rehearsal", str(own.rehearsal), *_budget(own.budget_s), *_threads(own.threads)),
            ]
        full = self.learning.retraining
        return [
            *("train", "run", str(self.raw), "--configuration", self.configuration, "--fold", fold),
            *("--profile", full.profile, "--epochs", str(full.epochs), "--iterations", str(full.iterations)),
            *(*_budget(full.budget_s), *_threads(own.threads), "--device", self.device, *self._places()),
        ]

    def select(self, folds: Sequence[str]) -> list[str]:
        named = [part for fold in folds for part in ("--fold", fold)]
        profile = self.learning.retraining.profile if self.kind == "retraining" else "nnunet"
        return [
            *("select", str(self.raw), "--profile", profile, "--configuration", self.configuration),
            *(*named, *self._places()),
        ]

    def export(self, *, name: str, semver: str) -> list[str]:
        return [
            *("export", str(self.raw), "--out", str(self.bundle), "--card", str(self.card)),
            *("--name", name, "--semver", semver, *self._places()),
        ]

    def _places(self) -> list[str]:
        return [
            *("--plans-name", self.plans_name, "--preprocessed", str(self.preprocessed)),
            *("--results", str(self.results)),
        ]


def _budget(seconds: int) -> list[str]:
    return ["--budget", f"{seconds}s"] if seconds else []


def _threads(threads: int) -> list[str]:
    return ["--threads", str(threads)] if threads else []
