"""Which version serves, changed: promoted by whoever may, or rolled back to the last stable one (ART-22, ART-23).

Both write down what shall be before they move an alias, and finish what was begun when they are called again
(gateway/learning/serving.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import distinct, func, select
from sqlalchemy.orm import Session

from engine.bundle import Bundle
from engine.errors import BundleInvalid
from gateway.errors import Rejected
from gateway.learning.model_provenance import provenance_of
from gateway.learning.serving import (
    PROMOTED,
    ROLLED_BACK,
    adopt,
    begin_period,
    open_period,
    periods,
    registered_bundle,
    registrations,
    settle,
)
from gateway.learning_settings import ChangePlan
from storage import ledger
from storage.database import Database
from storage.errors import ModelChanged, ModelMissing
from storage.learning_records import GateReport, ServingPeriod, ShadowRun
from storage.models import ModelRegistry, RegisteredModel
from storage.records import Result

ACCEPTED = "ACCEPTED"
IN_SHADOW = "it ran in shadow"
"""How a reason begins that time alone removes."""
POLICY = "policy"
"""The actor of a promotion that no person asked for."""
_IN_LEDGER = ("plans_digest", "dataset_digest", "cases_digest", "exclusions_digest", "validation")


class PromotionRefused(Rejected):
    """What serves stays as it is; `missing` says what there must be first, one text each."""

    def __init__(self, what: str, missing: Sequence[str]) -> None:
        super().__init__(f"{what}: {'; '.join(missing)}")
        self.missing = tuple(missing)


@dataclass(frozen=True, kw_only=True)
class Grounds:
    """What speaks for a version: its last examination under the plan, and its studies in shadow. `missing`: what the
    plan asks for besides."""

    report: GateReport | None
    shadow_studies: int
    requested_by: str | None
    missing: tuple[str, ...]


def promote(
    database: Database,
    registry: ModelRegistry,
    name: str,
    semver: str,
    *,
    actor: str,
    plan: ChangePlan,
    requested_by: str | None = None,
    reason: str = "",
    force: bool = False,
    system_user: str | None = None,
) -> RegisteredModel:
    """Make a version the champion. One that is it already is left alone; what a promotion of it left undone is done.

    `requested_by` is who asked for the version, by default who had it examined. `force` goes without what the plan
    asks for, never without files that are the registered ones, and needs a reason. `system_user`: whose account it
    was, where that is another name than the actor's; only told to the ledger.

    Raises PromotionRefused with all that is missing, ModelMissing, ModelChanged or BundleInvalid for files that are not
    what was registered, DatabaseAway.
    """
    what = f"{name} {semver} is not promoted"
    if force and (actor == POLICY or not reason.strip()):
        raise PromotionRefused(what, ["only a person may force it, with a reason"])
    model = registry.get(name, semver)
    adopt(database, registry, name)
    with database.reading() as session:
        recorded = registrations(session, name).get(semver)
        serves = _serves(open_period(session, name), model)
    if not serves:
        # Before the transaction: hashing the weights of a large model must not keep other writers waiting.
        bundle = registered_bundle(model, recorded)
        if recorded is not None and not recorded.get("orientation_stated", True):
            raise PromotionRefused(
                what, ["nobody stated its voxel order: import it with --orientation and the next PATCH version"]
            )
        with database.session() as session:
            ledger.hold(session, ledger.model_subject(name))
            before = open_period(session, name)
            if not _serves(before, model):
                found = grounds(session, model, plan, actor=actor, requested_by=requested_by)
                if found.missing and not force:
                    raise PromotionRefused(what, [*found.missing, *_by_force_alone(found)])
                begin_period(
                    session,
                    model,
                    kind=PROMOTED,
                    actor=actor,
                    previous=before.model_version if before is not None else None,
                    ended_why=f"{semver} was promoted",
                    detail={
                        **_evidence(bundle, found, plan),
                        "reason": reason.strip(),
                        "forced": force,
                        "overridden": list(found.missing) if force else [],
                        **({} if system_user is None else {"system_user": system_user}),
                    },
                )
    settle(database, registry, name)
    return registry.get(name, semver)


def serve_first(database: Database, registry: ModelRegistry, name: str, semver: str, *, actor: str) -> RegisteredModel:
    """Make the very first version of a model serve, or the one that is to serve and was lost: nothing serves that it
    could be worse than. Does nothing where another one is to serve. Raises ModelMissing, DatabaseAway."""
    model = registry.get(name, semver)
    if not adopt(database, registry, name):
        with database.session() as session:
            ledger.hold(session, ledger.model_subject(name))
            if open_period(session, name) is None:
                detail = {"reason": "the first version of the model", "forced": False}
                begin_period(session, model, kind=PROMOTED, actor=actor, previous=None, ended_why="", detail=detail)
    with database.reading() as session:
        period = open_period(session, name)
    if _serves(period, model):
        settle(database, registry, name)
    return registry.get(name, semver)


def roll_back(
    database: Database,
    registry: ModelRegistry,
    name: str,
    *,
    actor: str,
    reason: str,
    withdrawn: str | None = None,
    system_user: str | None = None,
) -> RegisteredModel:
    """Take the champion out of service; the last stable version serves again, and is returned.

    Stable is what the champion replaced, or what that one replaced, …: the first whose files are what was registered,
    and that was not rolled back itself. `withdrawn`: only if that version serves; a call that is repeated then never
    rolls back twice. Without it, a rollback that was begun and not finished is finished, and no other one begun.

    Raises PromotionRefused where there is nothing to go back to, DatabaseAway.
    """
    adopt(database, registry, name)
    finished = settle(database, registry, name)
    with database.reading() as session:
        known = periods(session, name)
        recorded = registrations(session, name)
    now = known[-1] if known else None
    if now is None:
        raise PromotionRefused(f"{name} is not rolled back", ["no version of it serves"])
    if withdrawn is not None and now.model_version != withdrawn:
        return registry.get(name, now.model_version)
    if withdrawn is None and finished and len(known) > 1 and known[-2].rolled_back:
        return registry.get(name, now.model_version)
    target, passed_over = None, {}
    stable = stable_before(known)
    for semver in stable:
        try:
            target = registry.get(name, semver)
            registered_bundle(target, recorded.get(semver))
            break
        except (ModelMissing, ModelChanged, BundleInvalid) as error:
            target, passed_over[semver] = None, str(error)
    if target is None:
        why = [f"{semver} cannot serve: {error}" for semver, error in passed_over.items()]
        what = f"{name} {now.model_version} is not rolled back"
        raise PromotionRefused(what, why or ["there is no earlier version that was stable"])
    after = stable[stable.index(target.semver) + 1 :]
    with database.session() as session:
        ledger.hold(session, ledger.model_subject(name))
        current = open_period(session, name)
        if current is not None and current.period_id == now.period_id:
            period = begin_period(
                session,
                target,
                kind=ROLLED_BACK,
                actor=actor,
                previous=after[0] if after else None,
                ended_why=reason.strip() or "no reason given",
                detail={
                    "withdrawn": now.model_version,
                    "withdrawn_weights_digest": now.weights_digest,
                    "reason": reason.strip(),
                    "passed_over": passed_over,
                    **({} if system_user is None else {"system_user": system_user}),
                },
            )
            # It was watched when it was new; if that had not ended, it goes on.
            period.watched_until = next(p.watched_until for p in reversed(known) if p.model_version == target.semver)
    # Somebody else was faster: what they decided stands.
    settle(database, registry, name)
    return registry.champion(name)


def stable_before(known: Sequence[ServingPeriod]) -> list[str]:
    """The versions to roll back to from the last of a model's periods, the nearest first: what it replaced, what that
    one replaced, …, without those whose own last period ended in a rollback."""
    found: list[str] = []
    earlier = list(known)
    wanted = known[-1].previous_version
    while wanted is not None:
        earlier = [p for p in earlier if p.period_id < earlier[-1].period_id]
        while earlier and earlier[-1].model_version != wanted:
            earlier.pop()
        last = next((p for p in reversed(known[:-1]) if p.model_version == wanted), None)
        if wanted not in found and wanted != known[-1].model_version and (last is None or not last.rolled_back):
            found.append(wanted)
        wanted = earlier[-1].previous_version if earlier else None
    return found


def grounds(
    session: Session, model: RegisteredModel, plan: ChangePlan, *, actor: str, requested_by: str | None
) -> Grounds:
    """What speaks for a version that is to follow the one that serves now, and what the plan asks for besides."""
    known = periods(session, model.name)
    report = session.scalars(
        select(GateReport)
        .where(
            GateReport.model_name == model.name,
            GateReport.model_version == model.semver,
            GateReport.weights_digest == model.weights_digest,
            GateReport.plan_digest == plan.digest,
        )
        .order_by(GateReport.report_id.desc())
        .limit(1)
    ).first()
    done = session.scalar(
        select(func.count(distinct(Result.study_instance_uid)))
        .select_from(ShadowRun)
        .join(Result, Result.result_id == ShadowRun.result_id)
        .where(ShadowRun.model_name == model.name, ShadowRun.model_version == model.semver, ShadowRun.state == "done")
    )
    studies = int(done or 0)
    who = requested_by or (report.requested_by if report is not None else None)
    missing: list[str] = []
    if known:  # before the first there is nothing that a version could be worse than
        missing += _missing_of_report(report, model, known)
        if studies < plan.shadow_studies:
            missing.append(f"{IN_SHADOW} on {studies} of {plan.shadow_studies} studies")
        if plan.approval == "other-person":
            missing += _missing_of_person(actor, {who, report.requested_by if report is not None else None})
    return Grounds(report=report, shadow_studies=studies, requested_by=who, missing=tuple(missing))


def _missing_of_report(report: GateReport | None, model: RegisteredModel, known: Sequence[ServingPeriod]) -> list[str]:
    again = f"run `seggate models test {model.name} {model.semver}`"
    if report is None:
        return [f"no gate report for these weights under the change plan as it is now: {again}"]
    if report.verdict != ACCEPTED:
        reasons = "; ".join(str(reason["text"]) for reason in report.report.get("reasons") or ())
        return [f"gate report {report.report_id} says {report.verdict}{reasons and f': {reasons}'}"]
    if report.champion_version != known[-1].model_version:
        against = report.champion_version or "no version"
        return [
            f"gate report {report.report_id} compares it with {against}, and {known[-1].model_version} serves: {again}"
        ]
    withdrawn = [p.ended_at for p in known if p.rolled_back and p.model_version == model.semver and p.ended_at]
    if withdrawn and report.examined_at <= withdrawn[-1]:
        return [f"it was rolled back since gate report {report.report_id}: {again}"]
    return []


def _by_force_alone(found: Grounds) -> list[str]:
    """The way on where there can be no ACCEPTED: nothing that serves has such labels or channels to compare."""
    reasons = found.report.report.get("reasons") or () if found.report is not None else ()
    if not any(reason["outside"] and reason["check"] in ("labels", "channels") for reason in reasons):
        return []
    return [
        "a version with other labels or channels is promoted with --force --reason TEXT alone, by whoever has "
        "validated it by other means"
    ]


def _missing_of_person(actor: str, requesters: set[str | None]) -> list[str]:
    if actor == POLICY:
        return ["a person: the change plan lets nothing be promoted automatically"]
    if _person(actor) in {_person(who) for who in requesters if who is not None}:
        return [f"another person: {_person(actor)} asked for it (approval = other-person in its change plan)"]
    return []


def _person(actor: str) -> str:
    return actor.removeprefix("user:")


def _serves(period: ServingPeriod | None, model: RegisteredModel) -> bool:
    return period is not None and (period.model_version, period.weights_digest) == (model.semver, model.weights_digest)


def _evidence(bundle: Bundle, found: Grounds, plan: ChangePlan) -> Mapping[str, Any]:
    """What the ledger keeps of the reasons for a promotion: digests and verdicts, no names of cases."""
    report, provenance = found.report, provenance_of(bundle)
    return {
        "evidence_digest": bundle.evidence_digest,
        **{key: provenance[key] for key in _IN_LEDGER if key in provenance},
        "requested_by": found.requested_by,
        "approval": plan.approval,
        "change_plan_digest": plan.digest,
        "gate": None
        if report is None
        else {
            "report_id": report.report_id,
            "verdict": report.verdict,
            "change": report.change,
            "compared_with": report.champion_version,
            "examined_at": report.examined_at.isoformat(),
            "report_digest": _digest(report.report),
            "reasons": report.report.get("reasons"),
            "figures": report.report.get("figures"),
        },
        "shadow_studies": found.shadow_studies,
        "shadow_studies_asked": plan.shadow_studies,
    }


def _digest(document: Mapping[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


__all__ = [
    "ACCEPTED",
    "POLICY",
    "Grounds",
    "PromotionRefused",
    "grounds",
    "open_period",
    "promote",
    "roll_back",
    "serve_first",
    "stable_before",
]
