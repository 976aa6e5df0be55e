"""What becomes of a candidate that passed the sanity suite: promoted by policy where the change plan says so and the
shadow studies are done, else a person is told that it waits."""

from __future__ import annotations

from gateway.learning import runs
from gateway.learning.promotion import POLICY, PromotionRefused, promote
from gateway.settings import Settings
from storage import alarms
from storage.database import Database
from storage.learning_records import RunState
from storage.models import ModelRegistry

WAITS = "candidate-waits"


def consider_promotion(database: Database, registry: ModelRegistry, settings: Settings, model_name: str) -> str:
    """ "promoted", or "waits" with an alarm that says for what; "none" without a candidate. A repeat is free."""
    with database.reading() as session:
        found = runs.runs_of(session, model_name, [RunState.CANDIDATE])
    if not found:
        return "none"
    run, plan = found[0], settings.learning.of(model_name).change_plan
    subject = f"model:{model_name}"
    if plan.approval != "automatic":
        with database.session() as session:
            alarms.raise_alarm(
                session,
                kind=WAITS,
                subject=subject,
                message=(
                    f"{model_name} {run.semver} passed its tests and waits for somebody other than {run.requested_by}: "
                    f"`seggate models compare {model_name} {run.base_version} {run.semver}`, then "
                    f"`seggate models promote {model_name} {run.semver}`"
                ),
            )
        return "waits"
    try:
        promote(
            database,
            registry,
            model_name,
            str(run.semver),
            actor=POLICY,
            requested_by=run.requested_by,
            reason=f"training {run.run_id}: {run.reason}",
            plan=plan,
        )
    except PromotionRefused:
        return "waits"
    with database.session() as session:
        runs.move(session, runs.get_run(session, run.run_id, lock=True), RunState.PROMOTED, "by the change plan")
        alarms.clear_alarms(session, kind=WAITS, subject=subject, by=POLICY)
    return "promoted"
