"""`seggate models promote|rollback|history`."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import BundleInvalid
from gateway.commands.output import local, print_json, say, table
from gateway.learning.promotion import PromotionRefused, promote, roll_back
from gateway.learning.registry_check import check_model
from gateway.learning.runs import close_decided
from gateway.learning.serving import open_period, periods
from gateway.settings import Settings, load_settings
from gateway.state import existing_database, open_registry
from storage import ledger
from storage.database import Database
from storage.errors import ModelChanged
from storage.models import ModelRegistry, RegisteredModel


def promote_model(
    config: Path,
    name: str,
    semver: str,
    *,
    reason: str,
    force: bool,
    requested_by: str | None,
    by: str | None,
    as_json: bool,
) -> int:
    """0 when the version serves, also where it did before; 1 when it is refused, with all that is missing."""
    settings = load_settings(config)
    actor, system_user = acting(by)
    with _opened(settings) as (database, registry):
        before = _serving(database, name)
        try:
            model = promote(
                database,
                registry,
                name,
                semver,
                actor=actor,
                plan=settings.learning.of(name).change_plan,
                requested_by=requested_by,
                reason=reason,
                force=force,
                system_user=system_user,
            )
        except (PromotionRefused, ModelChanged, BundleInvalid) as error:
            return _refused(error, as_json=as_json)
        with database.session() as session:
            close_decided(session, name)
        return _told(database, registry, model, before, as_json=as_json)


def roll_back_model(config: Path, name: str, *, reason: str, by: str | None, as_json: bool) -> int:
    """0 when the last stable version serves, 1 when there is none."""
    actor, system_user = acting(by)
    with _opened(load_settings(config)) as (database, registry):
        before = _serving(database, name)
        try:
            model = roll_back(database, registry, name, actor=actor, reason=reason, system_user=system_user)
        except PromotionRefused as error:
            return _refused(error, as_json=as_json)
        return _told(database, registry, model, before, as_json=as_json)


def show_history(config: Path, name: str, *, as_json: bool) -> int:
    """0; 1 when nothing is known of such a model."""
    database = existing_database(load_settings(config))
    with database.reading() as session:
        served = periods(session, name)
        events = ledger.events(session, ledger.model_subject(name))
    database.close()
    if not served and not events:
        say(f"seggate: the ledger knows no model {name[:80]!r}")
        return 1
    if as_json:
        print_json(
            {
                "model": name,
                "served": [
                    {
                        "semver": p.model_version,
                        "weights_digest": p.weights_digest,
                        "previous": p.previous_version,
                        "began_at": p.began_at,
                        "began_by": p.began_by,
                        "watched_until": p.watched_until,
                        "ended_at": p.ended_at,
                        "ended_why": p.ended_why,
                        "rolled_back": p.rolled_back,
                    }
                    for p in served
                ],
                "events": [
                    {"sequence": e.sequence, "at": e.at, "kind": e.kind, "actor": e.actor, "detail": e.detail}
                    for e in events
                ],
            }
        )
        return 0
    rows = [
        (
            p.model_version,
            local(p.began_at),
            local(p.ended_at) or "serves",
            p.began_by,
            _end(p.rolled_back, p.ended_why),
        )
        for p in served
    ]
    table("Served", ("version", "from", "to", "by", "ended because"), rows)
    table(
        "\nLedger",
        ("#", "at", "event", "version", "by", "what"),
        [(e.sequence, local(e.at), e.kind, e.detail.get("semver"), e.actor, _what(e.detail)) for e in events],
    )
    return 0


def acting(by: str | None) -> tuple[str, str | None]:
    """Who acts, as the ledger writes it, and the account, where that is another name. Behind sudo it is who called it:
    the service's account is nobody's."""
    account = getpass.getuser()
    person = by.strip() if by and by.strip() else os.environ.get("SUDO_USER") or account
    return f"user:{person}", None if person == account else account


@contextmanager
def _opened(settings: Settings) -> Iterator[tuple[Database, ModelRegistry]]:
    database = existing_database(settings)
    try:
        yield database, open_registry(settings)
    finally:
        database.close()


def _serving(database: Database, name: str) -> str | None:
    with database.reading() as session:
        period = open_period(session, name)
    return None if period is None else period.model_version


def _refused(error: Exception, *, as_json: bool) -> int:
    if as_json:
        missing = error.missing if isinstance(error, PromotionRefused) else (str(error),)
        print_json({"ok": False, "error": str(error), "missing": list(missing)})
    say(f"seggate: {error}")
    return 1


def _told(
    database: Database, registry: ModelRegistry, model: RegisteredModel, before: str | None, *, as_json: bool
) -> int:
    fault = check_model(database, registry, model.name)
    if as_json:
        document = {"ok": True, "name": model.name, "semver": model.semver, "weights_digest": model.weights_digest}
        print_json({**document, "before": before, "registry": fault or "as the ledger says"})
    else:
        since = "serves already" if before == model.semver else f"serves from now on, before it {before or 'none'}"
        say(f"{model.name} {model.semver} {since}; workers notice within two seconds")
    if fault:
        say(f"the registry differs from the ledger: {fault}")
    return 0


def _end(rolled_back: bool, why: str | None) -> str:
    return f"rolled back: {why}" if rolled_back else why or ""


def _what(detail: dict[str, Any]) -> str:
    """What a person wants to know of an event of a model."""
    parts = []
    if detail.get("withdrawn"):
        parts.append(f"{detail['withdrawn']} withdrawn")
    if detail.get("forced"):
        parts.append(f"forced without: {'; '.join(detail.get('overridden', ())) or 'nothing missing'}")
    gate = detail.get("gate")
    if gate:
        parts.append(f"gate report {gate['report_id']} {gate['verdict']}")
    if detail.get("verdict"):
        parts.append(str(detail["verdict"]))
    if detail.get("requested_by"):
        parts.append(f"asked for by {detail['requested_by']}")
    if detail.get("reason"):
        parts.append(str(detail["reason"]))
    return "; ".join(parts)
