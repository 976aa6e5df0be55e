"""Studies of an invented site with the facts that drift is judged by, and the check over them."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
from sqlalchemy.orm import Session

from gateway.learning.serving import PROMOTED, begin_period
from gateway.learning_settings import LearningSettings, ModelLearning
from gateway.monitoring.drift_alarms import Baselines, DriftWatch
from gateway.monitoring.drift_window import ModelDrift
from gateway.settings import DriftSettings
from storage import ledger
from storage.database import Database
from storage.models import RegisteredModel
from storage.records import ResultState, StudyFacts, StudyState, utc_now
from tests.support.story_rows import add_result, add_study, add_version

SETTINGS = DriftSettings(reference_studies=80, window_days=30)
NOW = utc_now()


def add_studies(
    session: Session,
    count: int,
    *,
    start: int = 0,
    days_ago: float = 1.0,
    manufacturer: str = "ACME",
    volume_ml: float = 3.0,
    version: str = "1.0.0",
    verdict: str | None = "pass",
) -> None:
    """Studies of one site, one minute apart, that end so many days ago."""
    random = np.random.default_rng(start + 1)
    for index in range(start, start + count):
        result = add_result(
            session,
            ResultState.RELEASED,
            result_id=f"r{index}",
            verdict=verdict,
            measurements=[
                {
                    "name": "Anterior",
                    "voxels": 900,
                    "volume_ml": volume_ml * float(random.lognormal(0, 0.1)),
                    "confidence": float(random.normal(0.95, 0.01)),
                    "components": 1,
                    "fold_dice": None,
                    "mirror_dice": 0.97,
                    "border_entropy": 0.4,
                }
            ],
            runtime={"mean_confidence": 0.95},
        )
        result.model_version = version
        middle = 30 + 1.5 * math.sin(index)
        shares = np.exp(-((np.arange(64) - middle) ** 2) / 50)
        histogram = [round(float(share), 6) for share in shares]
        channel = {"whole": histogram, "foreground": None, "percentiles": [0, 1, 2], "noise": 0.02}
        session.add(
            StudyFacts(
                result_id=result.result_id,
                model_name=result.model_name,
                model_version=version,
                scanner=f"{manufacturer} One",
                recorded_at=NOW - timedelta(days=days_ago) + timedelta(seconds=index),
                acquisition={
                    "categories": {"manufacturer": manufacturer},
                    "numbers": {"slices": float(random.integers(30, 40))},
                },
                image={
                    "channels": [channel],
                    "spacing_mm": [1.0, 1.0, 1.0],
                    "size": [9, 17, 17],
                    "volumes_ml": [3.0],
                    "foreground_share": 0.2,
                },
            )
        )
    session.flush()


def prepared(session: Session) -> None:
    add_study(session, StudyState.VERIFIED)
    add_version(session)


def serve(session: Session, version: str, *, previous: str | None = None) -> None:
    """As a promotion writes it."""
    model = RegisteredModel(
        name="tiny",
        semver=version,
        registry_version=1,
        folder=Path("unused"),
        weights_digest="w" * 64,
        configuration_digest="c" * 64,
        licence="",
        description="",
        aliases=("champion",),
        registered_at_ms=0,
    )
    ledger.hold(session, ledger.model_subject("tiny"))
    begin_period(
        session, model, kind=PROMOTED, actor="user:ann", previous=previous, ended_why="it was promoted", detail={}
    )


def check(
    database: Database,
    folder: Path,
    *,
    now: datetime = NOW,
    settings: DriftSettings = SETTINGS,
    baselines: Baselines = lambda _name, _version: None,
    on_drift: Literal["fine-tune", "pause", "nothing"] = "nothing",
) -> list[ModelDrift]:
    learning = LearningSettings(models=(ModelLearning(name="tiny", on_drift=on_drift),))
    watch = DriftWatch(database=database, settings=settings, learning=learning, state_dir=folder, baselines=baselines)
    return watch.check(now=now)
