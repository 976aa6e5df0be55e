"""Start-up check: the registry's aliases and versions against our serving periods and the ledger (ART-22).

Tags and aliases can be changed by anyone with a client of MLflow, and versions deleted. A promotion or rollback that
died before its last alias was moved is finished, an alias that is nowhere is set again; what nobody here has done is
the alarm `registry-differs`.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from sqlalchemy import select

from gateway.learning.serving import adopt, aliases, open_period, registrations, settle
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.errors import ModelMissing
from storage.learning_records import ServingPeriod
from storage.models import ModelRegistry
from storage.records import Alarm

ALARM = "registry-differs"
_log = structlog.get_logger(__name__)


def check_registry(database: Database, registry: ModelRegistry) -> Mapping[str, str]:
    """Checks every model and returns what is wrong, by name; empty when all is well. Raises DatabaseAway."""
    with database.reading() as session:
        told = set(session.scalars(select(ServingPeriod.model_name).distinct()))
    names = sorted(told | {model.name for model in registry.all()})
    faults = {name: check_model(database, registry, name) for name in names}
    return {name: fault for name, fault in faults.items() if fault}


def check_model(database: Database, registry: ModelRegistry, name: str) -> str:
    """What is wrong with one model, "" when nothing is; the alarm is raised or cleared. Raises DatabaseAway."""
    fault = "; ".join(_faults(database, registry, name))
    subject = ledger.model_subject(name)
    with database.reading() as session:
        query = select(Alarm.alarm_id).where(Alarm.kind == ALARM, Alarm.subject == subject, Alarm.cleared_at.is_(None))
        alarmed = session.scalars(query.limit(1)).first() is not None
    if fault or alarmed:
        with database.session() as session:
            if fault:
                raise_alarm(session, kind=ALARM, subject=subject, message=fault)
            else:
                clear_alarms(session, kind=ALARM, subject=subject, by="gateway")
    return fault


def _faults(database: Database, registry: ModelRegistry, name: str) -> list[str]:
    champion, previous = aliases(registry, name)
    if champion is not None and not adopt(database, registry, name):
        return [
            f"{champion} serves and the ledger knows no promotion of it: import it again, or "
            f"`seggate models promote {name} {champion}`"
        ]
    with database.reading() as session:
        period, recorded = open_period(session, name), registrations(session, name)
    faults = []
    there = {model.semver: model for model in registry.versions(name)}
    if gone := [semver for semver in recorded if semver not in there]:
        faults.append(f"{', '.join(gone)} was registered and is not there any more: import it again")
    changed = [
        semver
        for semver, detail in recorded.items()
        if semver in there and there[semver].weights_digest != detail["weights_digest"]
    ]
    if changed:
        faults.append(f"{', '.join(changed)} has other digests than the ledger: someone changed the registry by hand")
    if period is None:
        return faults
    wanted = period.model_version
    if wanted not in there:
        return faults or [f"{wanted} is to serve and is not registered any more: import it again"]
    before = period.previous_version if period.previous_version in there else None
    nowhere = champion is None or (champion == wanted and previous is None and before is not None)
    if nowhere or registry.settled_period(name) != period.period_id:
        try:
            settle(database, registry, name)
        except ModelMissing as error:
            return [*faults, str(error)]
        _log.warning("what a promotion left undone is done", model=name, serves=wanted)
    champion, previous = aliases(registry, name)
    if champion != wanted:
        faults.append(
            f"the alias champion is at {champion}, and {wanted} was promoted: someone moved it by hand; "
            f"`seggate models promote {name} {wanted}` puts it back"
        )
    elif previous != before:
        faults.append(
            f"the alias previous is at {previous or 'no version'}, and {wanted} followed "
            f"{period.previous_version or 'none'}: `seggate models promote {name} {wanted}` puts it back"
        )
    return faults
