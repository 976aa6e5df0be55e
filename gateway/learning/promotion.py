"""LOCAL STAND-IN: a merge takes the other branch's promotion.py; only `roll_back` is used from here.

The last stable version serves again: our open period is the intent, the registry's aliases follow it.
"""

from __future__ import annotations

from engine.bundle import load_bundle
from engine.errors import BundleInvalid
from gateway.errors import Rejected
from gateway.learning.serving import open_period, settle
from storage import ledger
from storage.database import Database
from storage.learning_records import ServingPeriod
from storage.models import ModelRegistry, RegisteredModel
from storage.records import utc_now


def roll_back(
    database: Database, registry: ModelRegistry, name: str, *, actor: str, reason: str, withdrawn: str | None = None
) -> RegisteredModel:
    """The previous version serves again; with `withdrawn` only if that version serves.

    Raises Rejected where there is none that can be loaded, ModelMissing where it is gone.
    """
    with database.reading() as session:
        period = open_period(session, name)
    if period is None:
        raise Rejected(f"{name}: no version of it serves")
    if withdrawn is not None and period.model_version != withdrawn:
        return registry.get(name, period.model_version)
    if period.previous_version is None:
        raise Rejected(f"{name}: no version served before the one that serves now")
    stable = registry.get(name, period.previous_version)
    try:
        load_bundle(stable.folder, verify=True)
    except BundleInvalid as error:
        raise Rejected(f"{name} is not rolled back: {stable.semver} cannot serve: {error}") from error
    with database.session() as session:
        current = open_period(session, name)
        if current is not None and current.period_id == period.period_id:
            now = utc_now()
            current.ended_at, current.ended_why, current.rolled_back = now, reason, True
            session.add(
                ServingPeriod(
                    model_name=name,
                    model_version=stable.semver,
                    weights_digest=stable.weights_digest,
                    previous_version=None,
                    began_at=now,
                    began_by=actor,
                    rolled_back=False,
                )
            )
            ledger.append(
                session,
                subject=ledger.model_subject(name),
                kind="model-rolled-back",
                actor=actor,
                detail={"withdrawn": current.model_version, "semver": stable.semver, "reason": reason},
            )
    settle(database, registry, name)
    return registry.get(name, stable.semver)
