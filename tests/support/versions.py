"""Versions of a model without torch, and what speaks for them: gate reports, studies in shadow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.bundle import Bundle
from gateway.learning.registration import register_bundle
from gateway.learning_settings import ChangePlan
from storage.database import Database
from storage.learning_records import GateReport, ShadowRun
from storage.models import ModelRegistry, RegisteredModel
from storage.records import Result, ResultState, StudyState, utc_now
from tests.support.intensity_model import Band, write_intensity_bundle
from tests.support.story_rows import add_result, add_study, add_version

PLAN = ChangePlan(shadow_studies=0)


def write_version(folder: Path, name: str, semver: str, *, edge: float = 500) -> Bundle:
    """A bundle of two structures; another `edge` between their intensities gives other weights."""
    bands = {
        "left structure": Band(low=200, high=edge, laterality="left", pair="right structure"),
        "right structure": Band(low=edge, high=800, laterality="right", pair="left structure"),
    }
    return write_intensity_bundle(folder / name / semver, name=name, bands=bands, semver=semver)


def register_versions(
    database: Database, registry: ModelRegistry, folder: Path, name: str, *semvers: str
) -> list[RegisteredModel]:
    """Each with other weights; the first serves, the others are candidates."""
    return [
        register_bundle(
            database,
            registry,
            write_version(folder, name, semver, edge=450 + 10 * number),
            candidate=False,
            actor="user:importer",
        )
        for number, semver in enumerate(semvers)
    ]


def add_report(
    database: Database,
    model: RegisteredModel,
    *,
    against: str | None = "1.0.0",
    verdict: str = "ACCEPTED",
    plan: ChangePlan = PLAN,
    requested_by: str = "user:requester",
    **changes: Any,
) -> None:
    """A gate report on a version; `against` is the champion that it was compared with."""
    values: dict[str, Any] = {
        "model_name": model.name,
        "model_version": model.semver,
        "champion_version": against,
        "weights_digest": model.weights_digest,
        "plan_digest": plan.digest,
        "change": "fine-tuning",
        "requested_by": requested_by,
        "examined_at": utc_now(),
        "verdict": verdict,
        "report": {
            "reasons": [],
            "figures": {
                "dice": {"candidate": 0.93, "champion": 0.9, "cases": 12},
                "labels": {"left structure": {"dice": {"candidate": 0.95, "champion": 0.91, "cases": 12}}},
            },
        },
    }
    with database.session() as session:
        session.add(GateReport(**values | changes))


def add_shadow_runs(database: Database, model: RegisteredModel, *states: str) -> None:
    """A study in shadow for each state, beside results that are there afterwards."""
    with database.session() as session:
        for number, state in enumerate(states):
            session.add(
                ShadowRun(
                    result_id=_result(session, number),
                    model_name=model.name,
                    model_version=model.semver,
                    workflow_id=f"shadow {model.name} {model.semver} {number}",
                    ordered_at=utc_now(),
                    finished_at=None if state == "pending" else utc_now(),
                    state=state,
                    verdict="pass" if state == "done" else None,
                    dice={"left structure": 0.9 + 0.02 * number} if state == "done" else None,
                )
            )


def _result(session: Session, number: int) -> str:
    known = f"r{number}"
    if session.scalars(select(Result.result_id).where(Result.result_id == known)).first() is None:
        uid = f"1.2.3.{number}"
        add_study(session, StudyState.PROCESSING, uid=uid)
        add_version(session, uid=uid)
        add_result(session, ResultState.RELEASED, result_id=known, uid=uid)
    return known
