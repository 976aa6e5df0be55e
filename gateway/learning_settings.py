"""learning.toml: per model what a drift leads to, how it is trained further, and what a new version must pass."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gateway.setting_types import Name, Section

Share = Annotated[float, Field(ge=0, le=1)]
Change = Literal["fine-tuning", "retraining", "import"]


class SelectionSettings(Section):
    """[models.selection]: which cases are learnt from (ART-21)."""

    least: int = Field(default=50, ge=1)  # with fewer labelled cases nothing is trained
    most: int = Field(default=100, ge=1)
    recent_days: int = Field(default=180, ge=1)
    random_share: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # chosen by chance, kept for unbiased monitoring
    corrected_share: Share = 0.3  # of a batch that was read: as many corrected, and the corrections are queued (ART-26)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least: {self.least} is more than most ({self.most})")
        return self


class FineTuningSettings(Section):
    """[models.fine_tuning] (ART-21): the learning rate is 1e-4, the encoder's half of that."""

    epochs: int = Field(default=10, ge=1, le=10)
    iterations: int = Field(default=250, ge=1)  # steps of an epoch
    rehearsal: Annotated[float, Field(ge=0.25, le=0.5)] = 0.5  # the share of old cases in every batch
    folds: tuple[Annotated[str, Field(pattern=r"^([0-9]|all)$")], ...] = ()  # empty = those that the model has
    budget_s: int = Field(default=0, ge=0)  # of each fold; 0 = the epochs decide
    threads: int = Field(default=0, ge=0)  # of the training; 0 = half the cores


class RetrainingSettings(Section):
    """[models.retraining]: a training from the beginning, with the old and all labelled cases."""

    profile: Literal["nnunet", "article"] = "nnunet"
    epochs: int = Field(default=1000, ge=1)
    iterations: int = Field(default=250, ge=1)
    budget_s: int = Field(default=0, ge=0)  # of each fold; 0 = the epochs decide


class ChangePlan(Section):
    """[models.change_plan]: what may change, and what a new version must pass before it serves (ART-23).

    What is not within the plan is OUTSIDE_PLAN, what fails a limit REJECTED. Dice limits are losses against the version
    that serves, on the locked cases.
    """

    allowed: tuple[Change, ...] = ("fine-tuning", "retraining", "import")
    approval: Literal["other-person", "automatic"] = "other-person"
    least_locked_cases: int = Field(default=10, ge=1)
    max_dice_loss: Share = 0.01  # mean of all labels
    max_dice_loss_per_label: Share = 0.03
    max_dice_loss_per_stratum: Share = 0.03
    max_runtime_ratio: Annotated[float, Field(gt=0)] = 1.5
    max_memory_ratio: Annotated[float, Field(gt=0)] = 1.5
    shadow_studies: int = Field(default=20, ge=0)  # run beside the champion before it may serve; 0 = none
    watch_studies: int = Field(default=30, ge=1)  # the first of a new champion, watched for the rates below
    watch_least: int = Field(default=3, ge=1)  # rates of fewer studies say nothing
    max_error_rate: Share = 0.2
    max_hold_rate: Share = 0.5
    max_empty_rate: Share = 0.3

    @property
    def digest(self) -> str:
        """SHA-256 of its canonical JSON (sorted keys, no blanks): which plan a version was measured by."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class ModelLearning(Section):
    """[[models]] in learning.toml."""

    name: Name
    on_drift: Literal["fine-tune", "pause", "nothing"] = "fine-tune"
    trained: Path | None = None  # nnU-Net's model folder of the first version: TRAINER__PLANS__CONFIGURATION
    dataset: Path | None = None  # its dataset in nnUNet_raw: for rehearsal, and for a full retraining
    preprocessed: Path | None = None  # nnUNet_preprocessed, for the splits of folds that nnU-Net itself has trained
    locked: Path | None = None  # cases that no training sees, a dataset in nnUNet_raw's layout
    selection: SelectionSettings = SelectionSettings()
    fine_tuning: FineTuningSettings = FineTuningSettings()
    retraining: RetrainingSettings = RetrainingSettings()
    change_plan: ChangePlan = ChangePlan()

    @model_validator(mode="after")
    def _learns_from_something(self) -> Self:
        if (self.trained is None) != (self.dataset is None):
            raise ValueError("trained and dataset: give both, or neither")
        return self

    @property
    def can_learn(self) -> bool:
        return self.trained is not None and self.dataset is not None


class LearningSettings(Section):
    """learning.toml. A model without an entry is watched and never trained."""

    models: tuple[ModelLearning, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [model.name for model in self.models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"models: {', '.join(twice)} has two entries")
        return self

    def of(self, name: str) -> ModelLearning:
        """The entry of a model; one that is watched and never trained where it has none."""
        known = next((m for m in self.models if m.name == name), None)
        # Not checked: a name that no model can have has no entry either.
        return known or ModelLearning.model_construct(name=name, on_drift="nothing")
