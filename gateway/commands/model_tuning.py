"""`seggate models tune`, and what `seggate models show` says of execution plans."""

from __future__ import annotations

import getpass
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.commands.output import console, print_json, printable, say, table
from gateway.settings import Settings, load_settings
from gateway.state import existing_database, open_registry
from gateway.time_budget import parse_budget
from storage import ledger
from storage.errors import DatabaseAway
from storage.models import RegisteredModel

if TYPE_CHECKING:
    from engine.backends import BackendChoice, Device
    from engine.bundle import Bundle
    from engine.execution_plan import CandidateFigure, ExecutionPlan, Mirroring
    from engine.volume import Volume
    from gateway.model_plans import ModelPlans

TUNED = "model-tuned"
"""Kind of the ledger's event."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What was asked for on the command line; None: as the settings of the worker say, or all of it."""

    tolerance: float | None
    mirroring: Mirroring
    device: Device | None
    threads: int | None
    runtimes: Collection[str] | None
    budget: str | None
    cases: Path | None


def tune(config: Path, name: str, *, semver: str | None, options: TuneOptions, as_json: bool) -> int:
    """0 when a plan was measured and kept, 1 when nothing computes here or nothing agrees, 2 for options that make no
    sense."""
    from engine.backends import RUNTIMES
    from engine.bundle import load_bundle
    from engine.errors import EngineError
    from engine.execution_plan import MAX_TOLERANCE
    from engine.sanity_check import STRICT_TOLERANCE
    from engine.tuning import DEFAULT_BUDGET_S, TuningRequest
    from engine.tuning import tune as measure
    from gateway.model_plans import ModelPlans

    settings = load_settings(config)
    tolerance = STRICT_TOLERANCE if options.tolerance is None else options.tolerance
    if not STRICT_TOLERANCE <= tolerance <= MAX_TOLERANCE:
        say(f"seggate: --tolerance {tolerance:g}: from {STRICT_TOLERANCE:g} (the default) to {MAX_TOLERANCE:g}")
        return 2
    try:
        budget_s = parse_budget(options.budget) or DEFAULT_BUDGET_S
    except ValueError as error:
        say(f"seggate: {error}")
        return 2
    unknown = sorted(set(options.runtimes or ()) - set(RUNTIMES))
    if unknown:
        say(f"seggate: --backend {unknown[0][:40]!r} is none of {', '.join(RUNTIMES)}")
        return 2
    worker = settings.gateway.worker
    request = TuningRequest(
        device=options.device or worker.device,
        threads=options.threads or worker.threads or None,
        runtimes=None if options.runtimes is None else [name for name in RUNTIMES if name in options.runtimes],
        tolerance=tolerance,
        mirroring=options.mirroring,
        budget_s=budget_s,
    )
    registry = open_registry(settings)
    model = registry.get(name, semver) if semver else registry.champion(name)
    plans = ModelPlans(settings.models_dir)
    try:
        bundle = load_bundle(model.folder, verify=True)
        if bundle.weights_digest != model.weights_digest:
            say(f"seggate: {model.name} {model.semver}: the weights are not those that were registered")
            return 1
        added = _added(options.cases, channels=len(bundle.channels)) if options.cases is not None else ()
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), disable=as_json, transient=True) as bar:
            task = bar.add_task("tuning", total=1.0)
            plan = measure(
                bundle,
                request,
                added=added,
                progress=lambda share, what: bar.update(task, completed=share, description=what),
            )
        path = plans.save(plan)
    except EngineError as error:
        say(f"seggate: not tuned: {error}")
        return 1
    except OSError as error:
        say(f"seggate: the plan cannot be kept in {settings.models_dir}: {error.strerror}")
        return 1
    _record(settings, model, plan)
    reasons = plan.stale_reasons(bundle, plans.machine, device=worker.device, threads=worker.threads or None)
    if as_json:
        print_json({**_document(plan, reasons), "file": str(path)})
        return 0
    _present(plan, reasons)
    for text in plan.cost:
        say(text)
    for reason in reasons:
        say(f"note: the worker will not use it: {reason}")
    if not reasons:
        say(f"{model.name} {model.semver} runs by this plan here from the worker's next start")
    return 0


def plans_shown(plans: ModelPlans, bundle: Bundle) -> dict[str, Any]:
    """For --json: the plans of every machine that shares the models folder, and which of them is of this one."""
    return {
        "execution_plans": [
            _document(plan, plan.stale_reasons(bundle, plans.machine)) for plan in plans.all(bundle.name, bundle.semver)
        ]
    }


def present_plans(plans: ModelPlans, bundle: Bundle) -> None:
    """The same for a person."""
    found = plans.all(bundle.name, bundle.semver)
    if not any(plan.machine == plans.machine for plan in found):
        console().print(
            f"\nNo execution plan for this machine: `seggate models tune {bundle.name}` measures one; else the worker "
            "does at first use, float32 alone",
            markup=False,
            soft_wrap=True,
        )
    for plan in found:
        _present(plan, plan.stale_reasons(bundle, plans.machine))


def _present(plan: ExecutionPlan, reasons: Sequence[str]) -> None:
    machine = plan.machine
    out = console()
    out.print(
        f"\nExecution plan ({plan.origin}, {plan.measured_at}): {plan.choice}, {_amount(plan.choice)}"
        + (f", without {' and '.join(plan.left_out)}" if plan.left_out else ""),
        markup=False,
        soft_wrap=True,
    )
    gpu = f", {printable(machine.gpu)}" if machine.gpu else ""
    out.print(
        f"  on {printable(machine.processor)} ({' '.join(machine.flags)}), {machine.cores} cores, "
        f"{machine.memory_gib:g} GiB{gpu}; at most {plan.tolerance:g} of the voxels may change; compared with "
        f"{printable(plan.reference)} on {', '.join(plan.cases) or 'single windows'}",
        markup=False,
        soft_wrap=True,
    )
    if reasons:
        out.print(f"  not in force here: {printable('; '.join(reasons))}", markup=False, soft_wrap=True)
    table(
        "",
        ("candidate", "threads", "windows", "mirrored", "s a window", "s for the cases", "changed voxels", "verdict"),
        [_row(figure, chosen=figure is plan.figure) for figure in plan.figures if figure.was_run],
    )
    for figure in plan.figures:
        if not figure.was_run:
            out.print(f"  not used: {figure.choice}: {printable(figure.verdict)}", markup=False, soft_wrap=True)


def _row(figure: CandidateFigure, *, chosen: bool) -> tuple[object, ...]:
    return (
        f"{figure.choice.runtime} {figure.version} on {figure.choice.provider}, {figure.choice.precision}",
        figure.choice.threads or "its own",
        figure.choice.batch,
        "yes" if figure.mirroring == "full" else "no",
        None if figure.seconds_per_window is None else f"{figure.seconds_per_window:.3g}",
        None if figure.case_seconds is None else f"{figure.case_seconds:.3g}",
        None if figure.changed_voxels is None else f"{figure.changed_voxels} of {figure.voxels}",
        "chosen" if chosen else figure.verdict,
    )


def _amount(choice: BackendChoice) -> str:
    threads = f"{choice.threads} threads" if choice.threads else "threads as it likes"
    return f"{threads}, {choice.batch} window{'s' if choice.batch > 1 else ''} at a time"


def _document(plan: ExecutionPlan, reasons: Sequence[str]) -> dict[str, Any]:
    from engine.execution_plan import plan_document

    return {**plan_document(plan), "in_force_here": not reasons, "reasons": list(reasons)}


def _record(settings: Settings, model: RegisteredModel, plan: ExecutionPlan) -> None:
    """In the ledger, since results depend on it; a gateway that was never started has none yet."""
    try:
        database = existing_database(settings)
    except DatabaseAway as error:
        say(f"note: not in the ledger: {error}")
        return
    with database.session() as session:
        ledger.append(
            session,
            subject=ledger.model_subject(model.name),
            kind=TUNED,
            actor=f"user:{getpass.getuser()}",
            detail={
                "semver": model.semver,
                "machine": plan.machine.key,
                "choice": str(plan.choice),
                "tolerance": plan.tolerance,
                "left_out": list(plan.left_out),
                "changed_voxels": plan.figure.changed_voxels,
                "voxels": plan.figure.voxels,
            },
        )
    database.close()


def _added(folder: Path, *, channels: int) -> tuple[tuple[str, Volume], ...]:
    """Images of the site, named by number: file names may be those of patients."""
    from engine.sanity_making import read_site_folder

    found = read_site_folder(folder, channels=channels)
    return tuple((f"added-{number}", case.volume) for number, case in enumerate(found, start=1))
