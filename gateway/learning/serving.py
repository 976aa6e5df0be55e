"""LOCAL STAND-IN: a merge takes the other branch's serving.py; only `open_period` and `settle` are used from here.

Which version of a model serves: our serving periods say it, the registry's aliases follow.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.database import Database
from storage.learning_records import ServingPeriod
from storage.models import ModelRegistry


def open_period(session: Session, name: str) -> ServingPeriod | None:
    """What is to serve now."""
    return session.scalars(
        select(ServingPeriod)
        .where(ServingPeriod.model_name == name, ServingPeriod.ended_at.is_(None))
        .order_by(ServingPeriod.period_id.desc())
        .limit(1)
    ).first()


def settle(database: Database, registry: ModelRegistry, name: str) -> bool:
    """Moves the aliases to where the open period wants them; whether anything was left to do."""
    with database.reading() as session:
        period = open_period(session, name)
    if period is None or registry.champion(name).semver == period.model_version:
        return False
    registry.promote(name, period.model_version)
    return True
