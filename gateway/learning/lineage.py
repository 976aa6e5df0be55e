"""Which trained folder a registered version came from: what the next training begins from.

The first version's is named in learning.toml; of one that was trained here it is in its run's folder.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.errors import Permanent
from gateway.learning.run_commands import RunCommands
from gateway.learning.runs import run_folder
from gateway.learning_settings import ModelLearning
from gateway.settings import Settings
from storage.learning_records import LearningRun


def commands_of(session: Session, settings: Settings, run: LearningRun) -> RunCommands:
    """Raises Permanent where the version that the run begins from cannot be traced to a trained folder."""
    learning = settings.learning.of(run.model_name)
    return RunCommands(
        folder=run_folder(settings.models_dir, run.run_id),
        kind=run.kind,
        trained=trained_folder(session, settings, learning, run.base_version),
        learning=learning,
        device=settings.gateway.worker.device,
    )


def trained_folder(session: Session, settings: Settings, learning: ModelLearning, semver: str) -> Path:
    """The model folder (TRAINER__PLANS__CONFIGURATION) of a version. Raises Permanent."""
    if learning.trained is None or learning.dataset is None:
        raise Permanent(
            f"{learning.name}: learning.toml does not say what it was trained with; add `trained` and `dataset`"
        )
    made_by = session.scalars(
        select(LearningRun).where(LearningRun.model_name == learning.name, LearningRun.semver == semver).limit(1)
    ).first()
    folder = learning.trained if made_by is None else commands_of(session, settings, made_by).model_folder
    if not folder.is_dir():
        raise Permanent(f"{learning.name} {semver}: {folder} is not there; a training begins from its checkpoints")
    return folder
