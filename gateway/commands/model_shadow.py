"""`seggate models shadow|watch`: a version beside the one that serves, and the first studies of the one that does."""

from __future__ import annotations

import getpass
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.commands.output import console, local, print_json, printable, say, table
from gateway.settings import load_settings
from gateway.state import existing_database, open_registry
from storage.models import SHADOW

if TYPE_CHECKING:
    from gateway.learning.shadow import ShadowProgress
    from gateway.learning.watch import Watched

_REASONS_SHOWN = 5


def shadow(config: Path, name: str, semver: str | None, *, as_json: bool) -> int:
    """Start a version in shadow, or stop the one that is (None). 1 where that is refused, with the reason."""
    from engine.errors import BundleInvalid
    from gateway.errors import Rejected
    from gateway.learning.shadow import start_shadow, stop_shadow

    settings = load_settings(config)
    database, registry = existing_database(settings), open_registry(settings)
    actor = f"user:{getpass.getuser()}"
    try:
        if semver is None:
            stopped = stop_shadow(database, registry, name, actor=actor)
            said = f"{name} {stopped} runs in shadow no more" if stopped else f"no version of {name} runs in shadow"
            document = {"name": name, "shadow": None, "stopped": stopped}
        else:
            start_shadow(database, registry, settings.learning, name, semver, actor=actor)
            studies = settings.learning.of(name).change_plan.shadow_studies
            said = f"{name} {semver} runs in shadow until {studies} studies are compared: `seggate models watch {name}`"
            document = {"name": name, "shadow": semver, "stopped": None}
    except (BundleInvalid, Rejected) as error:
        say(f"seggate: {error}")
        return 1
    if as_json:
        print_json(document)
    else:
        say(said)
    return 0


def watch(config: Path, name: str, *, as_json: bool) -> int:
    """0, whatever the rates are; 1 for a name that is not registered."""
    from gateway.learning.rollback import recent_periods
    from gateway.learning.shadow import shadow_progress
    from gateway.learning.watch import is_watched, watched_rates

    settings = load_settings(config)
    versions = open_registry(settings).versions(name)
    if not versions:
        say(f"seggate: no model {name!r} is registered")
        return 1
    plan = settings.learning.of(name).change_plan
    beside = next((m.semver for m in versions if SHADOW in m.aliases), None)
    with existing_database(settings).reading() as session:
        periods = recent_periods(session, name)
        serving = periods[0] if periods and periods[0].ended_at is None else None
        rates = watched_rates(session, serving, plan) if serving is not None else None
        progress = shadow_progress(session, name, beside, wanted=plan.shadow_studies) if beside else None
    document: dict[str, Any] = {
        "name": name,
        "serves": serving.model_version if serving is not None else None,
        "since": serving.began_at if serving is not None else None,
        "previous": serving.previous_version if serving is not None else None,
        "watched": is_watched(periods),
        "kept_at": serving.watched_until if serving is not None else None,
        "watch": asdict(rates) if rates is not None else None,
        "shadow": {"version": beside, **asdict(progress)} if progress is not None else None,
    }
    if as_json:
        print_json(document)
        return 0
    console().print(printable(_serving(document)), markup=False)
    if rates is not None:
        _print_rates(rates)
    if progress is None:
        console().print("\nno version runs in shadow", markup=False)
    else:
        _print_shadow(str(beside), progress)
    return 0


def _serving(document: dict[str, Any]) -> str:
    if document["serves"] is None:
        return f"{document['name']}: nothing is recorded of the version that serves"
    since = local(document["since"])
    if document["watched"]:
        state = f"watched; beyond a limit {document['previous']} serves again"
    elif document["kept_at"] is not None:
        state = f"kept since {local(document['kept_at'])}"
    else:
        state = "not watched: there is no version to go back to"
    return f"{document['name']} {document['serves']} serves since {since}, {state}"


def _print_rates(rates: Watched) -> None:
    rows = [
        (rate.what, rate.studies, f"{rate.studies / rates.studies:.0%}" if rates.studies else "", f"{rate.limit:.0%}")
        for rate in rates.rates
    ]
    table(f"\nStudies: {rates.studies} of {rates.wanted}", ("studies that", "number", "rate", "limit"), rows)


def _print_shadow(semver: str, progress: ShadowProgress) -> None:
    title = (
        f"\nIn shadow: {semver}, {progress.done} of {progress.wanted} studies compared, {progress.pending} wait, "
        f"{progress.failed} failed, {progress.skipped} skipped"
    )
    rows = [(label, f"{mean:.4f}", f"{least:.4f}") for label, (mean, least) in progress.dice.items()]
    table(title, ("label", "mean Dice to what serves", "lowest"), rows)
    out = console()
    for change, count in progress.other_verdicts.items():
        out.print(f"QA judged otherwise ({change}): {count}", markup=False)
    for reason in progress.reasons[:_REASONS_SHOWN]:
        out.print(f"failed: {printable(reason)}", markup=False)
