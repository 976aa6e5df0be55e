"""A verified bundle becomes a version of its model: under the rule of versions, with its provenance and its event.

What is registered first serves at once; whatever comes later is a candidate until it is promoted.
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from typing import Any

from engine.bundle import Bundle, load_bundle
from engine.errors import BundleInvalid
from engine.manifest import semver_numbers
from gateway.learning.model_provenance import provenance_of
from gateway.learning.promotion import serve_first
from gateway.learning.serving import IMPORTED, registrations
from gateway.learning.versions import check_step
from gateway.settings import Settings
from gateway.state import open_registry, prepare_state
from storage import ledger
from storage.database import Database
from storage.errors import ModelChanged
from storage.models import CHAMPION, ModelRegistry, RegisteredModel


def register(
    settings: Settings, bundle: Bundle, *, candidate: bool, actor: str, orientation_stated: bool = True
) -> RegisteredModel:
    """`register_bundle` for a command: where there is no database or registry yet, they are made."""
    database = prepare_state(settings)
    try:
        return register_bundle(
            database,
            open_registry(settings),
            bundle,
            candidate=candidate,
            actor=actor,
            orientation_stated=orientation_stated,
        )
    finally:
        database.close()


def register_bundle(
    database: Database,
    registry: ModelRegistry,
    bundle: Bundle,
    *,
    candidate: bool,
    actor: str,
    orientation_stated: bool = True,
) -> RegisteredModel:
    """Register a verified bundle, one process at a time, with its ledger events. Where no version of the model serves
    yet it does from now on, unless `candidate`.

    The event of the import is written when the ledger lacks it, so that a crash between registry and ledger heals at
    the next import. `orientation_stated`: whether somebody said which voxel order the model was trained in; one that
    was guessed can never be promoted.

    Raises VersionRefused for a version that is too low or too near; ModelChanged where it is registered with other
    content, here or in the ledger; ValueError for a malformed name or version; DatabaseAway.
    """
    registry.folder.mkdir(parents=True, exist_ok=True)
    with (registry.folder / "register.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with database.reading() as session:
            recorded = registrations(session, bundle.name)
        _check_version(registry, bundle, recorded)
        model = registry.register(
            bundle.root,
            name=bundle.name,
            semver=bundle.semver,
            weights_digest=bundle.weights_digest,
            configuration_digest=bundle.configuration_digest,
            licence=bundle.licence,
            description=bundle.description,
            serve=False,
            provenance=provenance_of(bundle),
        )
        _record(database, model, bundle, recorded.get(model.semver), actor, orientation_stated)
        serving = next((m.semver for m in registry.versions(model.name) if CHAMPION in m.aliases), None)
        if not candidate and serving in (None, model.semver):
            return serve_first(database, registry, model.name, model.semver, actor=actor)
        return model


def _check_version(registry: ModelRegistry, bundle: Bundle, recorded: Mapping[str, Mapping[str, Any]]) -> None:
    """The same content again is free: also of a version that the registry has lost."""
    there = {model.semver: model for model in registry.versions(bundle.name)}
    known = recorded.get(bundle.semver)
    if known is not None:
        if (known["weights_digest"], known["configuration_digest"]) != (
            bundle.weights_digest,
            bundle.configuration_digest,
        ):
            raise ModelChanged(
                f"{bundle.name} {bundle.semver} was registered with other content; choose a new version number: "
                "`seggate export DATASET --semver V`, or another name with --name"
            )
        return
    if bundle.semver in there:
        return  # its registration died before the ledger had it; the registry compares the digests
    taken = {*there, *recorded}
    newest = None
    for semver in sorted(there, key=semver_numbers, reverse=True):
        try:
            newest = load_bundle(there[semver].folder, verify=False)
            break
        except BundleInvalid:
            continue
    check_step(newest, bundle, taken=taken)


def _record(
    database: Database,
    model: RegisteredModel,
    bundle: Bundle,
    known: Mapping[str, Any] | None,
    actor: str,
    orientation_stated: bool,
) -> None:
    if known is not None and known["weights_digest"] == model.weights_digest:
        return
    with database.session() as session:
        ledger.append(
            session,
            subject=ledger.model_subject(model.name),
            kind=IMPORTED,
            actor=actor,
            detail={
                "semver": model.semver,
                "registry_version": model.registry_version,
                "weights_digest": model.weights_digest,
                "configuration_digest": model.configuration_digest,
                "evidence_digest": bundle.evidence_digest,
                "licence": model.licence,
                "orientation_stated": orientation_stated,
                "provenance": dict(model.provenance),
            },
        )
