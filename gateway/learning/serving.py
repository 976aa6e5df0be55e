"""Which version of a model serves: our serving periods say it, the registry's aliases follow.

A change is written in two steps: first, in one transaction, the old period is closed, the new one opened and the
ledger told why (the intent); then the aliases are moved. A process that dies in between leaves an intent whose aliases
are still to be moved: `settle` does so, however often it is called. The alias `champion` goes from one version to the
next in one step, so at every moment one version serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from engine.bundle import Bundle, load_bundle
from gateway.monitoring.drift_closing import close_drift_of
from storage import ledger
from storage.database import Database
from storage.errors import ModelChanged
from storage.learning_records import ServingPeriod
from storage.models import CHAMPION, PREVIOUS, ModelRegistry, RegisteredModel
from storage.records import LedgerEvent, utc_now

IMPORTED, PROMOTED, ROLLED_BACK = "model-imported", "model-promoted", "model-rolled-back"
"""Kinds of ledger events of a model."""


def open_period(session: Session, name: str) -> ServingPeriod | None:
    """The period of the version that is to serve; None before the first."""
    return session.scalars(_open(name)).first()


def overtaken(session: Session, name: str, semver: str) -> bool:
    """Whether another version is to serve than this one; if not, that stays so to the end of the transaction. False for
    a model that has no periods yet."""
    period = session.scalars(_open(name).with_for_update(read=True)).first()
    if period is not None:
        return period.model_version != semver
    # Somebody has just ended it, and what follows is not to be seen in this statement's snapshot.
    return session.scalars(select(ServingPeriod).where(ServingPeriod.model_name == name).limit(1)).first() is not None


def _open(name: str) -> Select[ServingPeriod]:
    return (
        select(ServingPeriod)
        .where(ServingPeriod.model_name == name, ServingPeriod.ended_at.is_(None))
        .order_by(ServingPeriod.period_id.desc())
        .limit(1)
    )


def periods(session: Session, name: str) -> list[ServingPeriod]:
    """All periods of a model, oldest first."""
    found = select(ServingPeriod).where(ServingPeriod.model_name == name).order_by(ServingPeriod.period_id)
    return list(session.scalars(found))


def registrations(session: Session, name: str) -> dict[str, Mapping[str, Any]]:
    """Version → its registration as the ledger has it; of several the last."""
    found = session.scalars(
        select(LedgerEvent)
        .where(LedgerEvent.subject == ledger.model_subject(name), LedgerEvent.kind == IMPORTED)
        .order_by(LedgerEvent.sequence)
    )
    return {event.detail["semver"]: event.detail for event in found}


def registered_bundle(model: RegisteredModel, recorded: Mapping[str, Any] | None) -> Bundle:
    """The bundle of a version, every file hashed; `recorded` is its registration in the ledger.

    Raises BundleInvalid for files that are damaged, ModelChanged for those that are not the registered ones.
    """
    bundle = load_bundle(model.folder, verify=True)
    if bundle.weights_digest != model.weights_digest:
        raise ModelChanged("the weights are not those that were registered")
    if bundle.configuration_digest != model.configuration_digest:
        raise ModelChanged("the configuration is not the one that was registered")
    # Events from before there were such digests lack them.
    known = recorded or {}
    if known.get("weights_digest") != model.weights_digest or (
        known.get("configuration_digest", model.configuration_digest) != model.configuration_digest
    ):
        raise ModelChanged("the registration differs from the ledger: someone changed the registry by hand")
    if known.get("evidence_digest", bundle.evidence_digest) != bundle.evidence_digest:
        raise ModelChanged("the sanity cases, provenance or figures of backends are not those that were registered")
    return bundle


def begin_period(
    session: Session,
    model: RegisteredModel,
    *,
    kind: str,
    actor: str,
    previous: str | None,
    ended_why: str,
    detail: Mapping[str, Any],
) -> ServingPeriod:
    """The intent: closes the open period, opens the model's, and tells the ledger, in the caller's transaction. What
    was told of the drift of the version before is closed.

    The caller holds the model's chain (`storage.ledger.hold`). `previous` is what to roll back to.
    """
    now = utc_now()
    before = open_period(session, model.name)
    if before is not None:
        before.ended_at, before.ended_why, before.rolled_back = now, ended_why, kind == ROLLED_BACK
    period = ServingPeriod(
        model_name=model.name,
        model_version=model.semver,
        weights_digest=model.weights_digest,
        previous_version=previous,
        began_at=now,
        began_by=actor,
        rolled_back=False,
    )
    session.add(period)
    ledger.append(
        session,
        subject=ledger.model_subject(model.name),
        kind=kind,
        actor=actor,
        detail={
            "semver": model.semver,
            "registry_version": model.registry_version,
            "weights_digest": model.weights_digest,
            "configuration_digest": model.configuration_digest,
            "previous": previous,
            **detail,
        },
        at=now,
    )
    if before is not None and before.model_version != model.semver:
        close_drift_of(session, model.name, before.model_version, by=actor, reason=f"{model.semver} serves")
    session.flush()
    return period


def settle(database: Database, registry: ModelRegistry, name: str) -> bool:
    """Moves the aliases to where the open period wants them; whether anything was left to do.

    Whoever promotes at the same time waits: the aliases follow the newest intent, never an overtaken one. Raises
    ModelMissing where the version that is to serve is not registered any more, DatabaseAway.
    """
    registry.versions(name)  # MLflow takes seconds to open; nobody shall wait for that
    with database.session() as session:
        ledger.hold(session, ledger.model_subject(name))
        period = open_period(session, name)
        if period is None:
            return False
        before = aliases(registry, name)
        registry.serve(name, period.model_version, previous=period.previous_version)
        settled = registry.settled_period(name) == period.period_id
        if not settled:
            registry.note_settled(name, period.period_id)
        return not settled or aliases(registry, name) != before


def aliases(registry: ModelRegistry, name: str) -> tuple[str | None, str | None]:
    """The versions that the registry calls champion and previous."""
    versions = registry.versions(name)
    champion, previous = (
        next((model.semver for model in versions if alias in model.aliases), None) for alias in (CHAMPION, PREVIOUS)
    )
    return champion, previous


def adopt(database: Database, registry: ModelRegistry, name: str) -> bool:
    """Opens the period of a champion that was promoted before there were periods, if the ledger says the same; whether
    there is an open period now."""
    champion = next((m for m in registry.versions(name) if CHAMPION in m.aliases), None)
    with database.session() as session:
        ledger.hold(session, ledger.model_subject(name))
        if open_period(session, name) is not None:
            return True
        told = [e for e in ledger.events(session, ledger.model_subject(name)) if e.kind in (PROMOTED, ROLLED_BACK)]
        if champion is None or not told:
            return False
        last = told[-1]
        if (last.detail["semver"], last.detail["weights_digest"]) != (champion.semver, champion.weights_digest):
            return False
        session.add(
            ServingPeriod(
                model_name=name,
                model_version=champion.semver,
                weights_digest=champion.weights_digest,
                previous_version=last.detail.get("previous"),
                began_at=last.at,
                began_by=last.actor,
                rolled_back=False,
            )
        )
    settle(database, registry, name)
    return True
