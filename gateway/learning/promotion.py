"""LOCAL STAND-IN: a merge takes the other branch's promotion.py; only `open_period` and `roll_back` are used from here.

Which version serves: our open period is the intent, the registry's aliases follow it.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.errors import Rejected
from storage import ledger
from storage.database import Database
from storage.learning_records import ServingPeriod
from storage.models import ModelRegistry, RegisteredModel
from storage.records import utc_now


def open_period(session: Session, name: str) -> ServingPeriod | None:
    """What should serve now."""
    return session.scalars(
        select(ServingPeriod)
        .where(ServingPeriod.model_name == name, ServingPeriod.ended_at.is_(None))
        .order_by(ServingPeriod.period_id.desc())
    ).first()


def roll_back(database: Database, registry: ModelRegistry, name: str, *, actor: str, reason: str) -> RegisteredModel:
    """The previous version serves again. Raises Rejected where there is none, ModelMissing where it is gone."""
    with database.reading() as session:
        period = open_period(session, name)
        previous = period.previous_version if period is not None else None
    if previous is None:
        raise Rejected(f"{name}: no version served before the one that serves now")
    stable = registry.get(name, previous)
    with database.session() as session:
        period = open_period(session, name)
        if period is not None and period.previous_version == previous:
            now = utc_now()
            period.ended_at, period.ended_why, period.rolled_back = now, reason, True
            session.add(
                ServingPeriod(
                    model_name=name,
                    model_version=previous,
                    weights_digest=stable.weights_digest,
                    previous_version=None,
                    began_at=now,
                    began_by=actor,
                )
            )
            ledger.append(
                session,
                subject=ledger.model_subject(name),
                kind="model-rolled-back",
                actor=actor,
                detail={"semver": period.model_version, "to": previous, "reason": reason},
            )
    return registry.promote(name, previous)
