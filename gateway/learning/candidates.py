"""What becomes of a candidate that passed the sanity suite: promoted by policy where the change plan says so and the
shadow studies are done, else a person is told that it waits."""

from __future__ import annotations

from gateway.learning import runs
from gateway.learning.promotion import IN_SHADOW, POLICY, PromotionRefused, grounds, promote
from gateway.settings import Settings
from storage import alarms
from storage.database import Database
from storage.learning_records import RunState
from storage.models import ModelRegistry


def consider_promotion(database: Database, registry: ModelRegistry, settings: Settings, model_name: str) -> str:
    """ "promoted"; "shadow" while its studies in shadow are not done; "waits" with an alarm that says for what; "none"
    without a candidate. A repeat is free."""
    plan, subject = settings.learning.of(model_name).change_plan, f"model:{model_name}"
    with database.session() as session:
        runs.close_decided(session, model_name)
        found = runs.runs_of(session, model_name, [RunState.CANDIDATE])
    if not found:
        return "none"
    run = found[0]
    model = registry.get(model_name, str(run.semver))
    with database.reading() as session:
        missing = grounds(session, model, plan, actor=POLICY, requested_by=run.requested_by).missing
    if any(reason.startswith(IN_SHADOW) for reason in missing):
        return "shadow"
    if plan.approval == "automatic":
        try:
            promote(
                database,
                registry,
                model_name,
                model.semver,
                actor=POLICY,
                requested_by=run.requested_by,
                reason=f"training {run.run_id}: {run.reason}",
                plan=plan,
            )
        except PromotionRefused as error:
            words = str(error)
        else:
            with database.session() as session:
                runs.close_decided(session, model_name)
            return "promoted"
    else:
        words = (
            f"{model_name} {run.semver} passed its tests and waits for somebody other than {run.requested_by}: "
            f"`seggate models compare {model_name} {run.base_version} {run.semver}`, then "
            f"`seggate models promote {model_name} {run.semver}`"
        )
    with database.session() as session:
        if runs.get_run(session, run.run_id, lock=True).state != RunState.CANDIDATE:
            return "none"  # given up meanwhile
        alarms.raise_alarm(session, kind=runs.WAITS, subject=subject, message=words)
    return "waits"
