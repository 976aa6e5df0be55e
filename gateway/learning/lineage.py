"""What a registered version was trained with: its folder of checkpoints and its dataset, from which the next begins.

Those of the first version are named in learning.toml; of one that was trained here they are in its run's folder, where
the dataset has all that was learnt by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.errors import Permanent
from gateway.learning.run_commands import RunCommands
from gateway.learning.runs import run_folder
from gateway.learning_settings import ModelLearning
from gateway.settings import Settings
from storage.learning_records import LearningRun


@dataclass(frozen=True, kw_only=True)
class TrainedVersion:
    """`model`: TRAINER__PLANS__CONFIGURATION; `dataset`: raw; `preprocessed`: the folder of datasets with their splits,
    None where nobody named one."""

    model: Path
    dataset: Path
    preprocessed: Path | None


def commands_of(session: Session, settings: Settings, run: LearningRun) -> RunCommands:
    """Raises Permanent where the version that the run begins from cannot be traced to a trained folder."""
    learning = settings.learning.of(run.model_name)
    base = trained_version(session, settings, learning, run.base_version)
    return RunCommands(
        folder=run_folder(settings.models_dir, run.run_id),
        kind=run.kind,
        trained=base.model,
        old=base.dataset,
        old_preprocessed=base.preprocessed,
        learning=learning,
        device=settings.gateway.worker.device,
    )


def trained_version(session: Session, settings: Settings, learning: ModelLearning, semver: str) -> TrainedVersion:
    """Raises Permanent where nobody says what the version was trained with, or that is gone."""
    if learning.trained is None or learning.dataset is None:
        raise Permanent(
            f"{learning.name}: learning.toml does not say what it was trained with; add `trained` and `dataset`"
        )
    made_by = made_by_run(session, learning.name, semver)
    if made_by is None:
        found = TrainedVersion(
            model=settings.located(learning.trained),
            dataset=settings.located(learning.dataset),
            preprocessed=None if learning.preprocessed is None else settings.located(learning.preprocessed),
        )
    else:
        commands = commands_of(session, settings, made_by)
        found = TrainedVersion(model=commands.model_folder, dataset=commands.raw, preprocessed=commands.preprocessed)
    for folder in (found.model, found.dataset):
        if not folder.is_dir():
            raise Permanent(f"{learning.name} {semver}: {folder} is not there; a training begins from what it has")
    return found


def made_by_run(session: Session, name: str, semver: str) -> LearningRun | None:
    """The run that made a version; None for one that was imported."""
    return session.scalars(
        select(LearningRun).where(LearningRun.model_name == name, LearningRun.semver == semver).limit(1)
    ).first()
