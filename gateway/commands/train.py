"""`seggate train`, `seggate train status`, `seggate train stop`."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.errors import EngineError, TrainingDiverged, TrainingRefused, WorkerDied
from engine.experiment import Experiment, open_experiment, preprocess_experiment
from engine.parallel import default_processes
from engine.planners import ProfileName
from engine.sides import MirrorPolicy, SidesPolicy
from engine.training_lock import ask_to_stop, holder, is_asked_to_stop, training_lock
from engine.training_profile import TRAINING_PROFILES
from gateway.commands.output import print_json, progress_bar, say, table
from gateway.stop_signal import stop_requests
from gateway.time_budget import parse_budget
from gateway.training_device import (
    DeviceName,
    PrecisionName,
    chosen_device,
    chosen_precision,
    set_threads,
    training_packages,
    training_processes,
)
from gateway.training_launcher import is_launched, is_orphaned, launch, own_command

if TYPE_CHECKING:
    from engine.compilation import Compile
    from engine.fold_request import FoldReport, FoldRequest
    from engine.training_processes import TrainingProcesses

ALL_FOLDS = "all-folds"

# Every process of a training fails with these at once: the first one says it for all.
_SAID_BY_THE_FIRST = (WorkerDied, TrainingRefused, TrainingDiverged)


class _Stopped(Exception):
    """Leaves preprocessing between two cases."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What the command line says; None or nothing where it says nothing."""

    folder: Path
    configurations: tuple[str, ...]
    folds: tuple[str, ...]
    profile: ProfileName
    epochs: int | None
    iterations: int | None
    budget: str | None
    patience: int | None
    precision: PrecisionName
    deterministic: bool
    seed: int
    device: DeviceName
    devices: int
    compile: Compile
    probes: bool
    threads: int | None
    sides: SidesPolicy
    mirror: MirrorPolicy
    keeps_logits: bool
    plans_name: str | None
    dataset_name: str | None
    preprocessed: Path
    results: Path
    processes: int | None
    calibrates: bool = True


def train(options: TrainOptions, *, as_json: bool) -> int:
    """0 when all was trained and validated, and when it was told to stop (`state` says which); 1 when something failed;
    2 for options that do not go together."""
    wrong = wrong_usage(options)
    if wrong:
        say(f"seggate: {wrong}")
        return 2
    if not options.calibrates:
        say("seggate: --no-calibration needs --all: only an export calibrates")
        return 2
    budget_s = parse_budget(options.budget)
    if options.devices > 1 and not is_launched():
        return launched(options.devices)
    try:
        experiment = open_experiment(
            options.folder, options.preprocessed, plans_name=options.plans_name, name=options.dataset_name
        )
        requests = fold_requests(options, experiment, budget_s)
        with stop_requests() as stop, training_processes(options.device) as processes:
            state, folders = run_folds(requests, options, experiment, stop, processes, hide_bar=as_json)
    except (EngineError, OSError) as error:
        return failed("not trained", error, as_json=as_json)
    if not processes.is_first:
        return 0
    rows = fold_rows(folders)
    if as_json:
        print_json({"ok": True, "state": state, "folds": rows})
    else:
        present_folds(rows)
        if state == "stopped":
            say("stopped; the same command goes on")
    return 0


def launched(devices: int) -> int:
    """The same command in so many processes; its exit code."""
    with stop_requests() as stop:
        return launch(own_command(), devices, stop)


def run_folds(
    requests: Sequence[FoldRequest],
    options: TrainOptions,
    experiment: Experiment,
    stop: threading.Event,
    processes: TrainingProcesses,
    *,
    hide_bar: bool,
) -> tuple[Literal["finished", "stopped"], list[Path]]:
    """Preprocesses what is missing, then trains fold after fold, with a report after each; those that are finished are
    left as they are. All processes of the training call it, and the first one shows bars."""
    from engine.fold_training import train_fold
    from engine.model_report import write_report

    def asked() -> bool:
        return stop.is_set() or is_orphaned()

    folders: list[Path] = []
    hide_bar = hide_bar or not processes.is_first
    if not processes.on_first(lambda: _preprocess_for(requests, experiment, options, asked, hide_bar=hide_bar)):
        return "stopped", folders
    for request in requests:
        if processes.agreed(asked)():
            return "stopped", folders
        folders.append(request.folder)
        with reporting(request, hidden=hide_bar) as report:
            finished = train_fold(request, stop=asked, report=report, processes=processes)
        if processes.is_first:
            write_report(request.model_folder, experiment.dataset.json)
        if not finished:
            return "stopped", folders
    return "finished", folders


def _preprocess_for(
    requests: Sequence[FoldRequest],
    experiment: Experiment,
    options: TrainOptions,
    stop: Callable[[], bool],
    *,
    hide_bar: bool,
) -> bool:
    """Holds the first fold meanwhile, so that `seggate train status` and `stop` see that it is at work."""
    first = requests[0].folder
    configurations = [request.configuration for request in requests]

    def asked() -> bool:
        return stop() or is_asked_to_stop(first)

    with training_lock(first):
        made = preprocess_missing(experiment, configurations, options, asked, hide_bar=hide_bar)
        return made and not asked()


def preprocess_missing(
    experiment: Experiment,
    configurations: Sequence[str],
    options: TrainOptions,
    stop: Callable[[], bool],
    *,
    hide_bar: bool,
) -> bool:
    """False when it was told to stop. What nnU-Net preprocessed is taken as it is."""
    own = [c for c in dict.fromkeys(configurations) if not any(experiment.data_folder(c).glob("*.b2nd"))]
    if not own:
        return True
    with progress_bar("preprocessing", hidden=hide_bar) as advance:

        def advance_or_stop(done: int, total: int) -> None:
            advance(done, total)
            if stop() and done < total:
                raise _Stopped

        try:
            preprocess_experiment(
                experiment,
                own,
                processes=options.processes or default_processes(),
                tell=say,
                progress=advance_or_stop,
            )
        except _Stopped:
            return False
    return True


def fold_requests(options: TrainOptions, experiment: Experiment, budget_s: float | None) -> list[FoldRequest]:
    """Each fold of each configuration, the first stage of a cascade before the cascade. Raises DatasetInvalid for one
    that is not there, TrainingRefused for a device that is not there or a package that is missing."""
    with training_packages():
        from engine.fold_request import FoldRequest
        from engine.schedule import Schedule
        from engine.training_setup import default_loader_threads
    device = chosen_device(options.device)
    set_threads(options.threads, device)
    profile = TRAINING_PROFILES[options.profile]
    schedule = Schedule(
        **{k: v for k, v in (("epochs", options.epochs), ("iterations", options.iterations)) if v is not None},
        budget_s=budget_s,
        patience=options.patience or profile.patience,
    )
    configurations = options.configurations or (default_configuration(experiment),)
    return [
        FoldRequest(
            experiment=experiment,
            results=options.results,
            configuration=experiment.configuration(configuration).name,
            fold=fold,
            profile=profile,
            schedule=schedule,
            seed=options.seed,
            device=device,
            precision=chosen_precision(options.precision, device),
            any_precision=options.precision == "auto",
            deterministic=options.deterministic,
            sides=options.sides,
            mirror=options.mirror,
            keeps_logits=options.keeps_logits,
            loader_threads=default_loader_threads(device),
            compile=options.compile,
            probes=options.probes,
        )
        for configuration in experiment.in_stage_order(configurations)
        for fold in chosen_folds(experiment, options.folds)
    ]


def default_configuration(experiment: Experiment) -> str:
    planned = experiment.plans.configurations
    return "3d_fullres" if "3d_fullres" in planned else next(iter(planned))


def chosen_folds(experiment: Experiment, folds: Sequence[str]) -> list[str]:
    """`all-folds` (the default) is every fold of the splits. Raises DatasetInvalid."""
    named: list[str] = []
    for fold in folds or (ALL_FOLDS,):
        named += [str(index) for index in range(len(experiment.splits()))] if fold == ALL_FOLDS else [fold]
    for fold in named:
        experiment.split(fold)
    return list(dict.fromkeys(named))


def wrong_usage(options: TrainOptions) -> str | None:
    try:
        parse_budget(options.budget)
    except ValueError as error:
        return str(error)
    if options.deterministic and options.budget is not None:
        return (
            "--budget and --deterministic exclude each other: within a budget the learning rate follows the clock, so "
            "that no two runs are alike; give --epochs and --iterations instead"
        )
    if options.patience is not None and TRAINING_PROFILES[options.profile].hold_out_share is None:
        return f"--patience needs a hold-out, which the profile {options.profile} does not have"
    if options.deterministic and options.compile == "on":
        return "--compile on changes how sums are formed, which --deterministic excludes"
    return None


def failed(what: str, error: Exception, *, as_json: bool) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        if not isinstance(error, _SAID_BY_THE_FIRST):
            say(f"seggate: process {rank}: {what}: {error}")
        return 1
    if as_json:
        print_json({"ok": False, "error": str(error)})
    say(f"seggate: {what}: {error}")
    return 1


def status(folder: Path, results: Path, *, as_json: bool) -> int:
    """0 with a row for each fold that was ever begun; 1 when there is none."""
    folders = _fold_folders(results, folder)
    rows, who = fold_rows(folders), holder(results / _dataset_name(folder))
    if as_json:
        print_json({"ok": bool(rows), "folds": rows, "process": who})
    elif rows:
        present_folds(rows)
    if who is not None:
        say(f"process {who['pid']} on {who['host']} plans, selects or exports")
    if not rows:
        say(f"seggate: nothing was trained in {results / _dataset_name(folder)}")
    return 0 if rows else 1


def stop(folder: Path, results: Path, *, configurations: Sequence[str], folds: Sequence[str], as_json: bool) -> int:
    """0 when something was running and has been asked; 1 when nothing was."""
    asked = []
    whole = results / _dataset_name(folder)
    # `train --all` holds it while it plans, selects or exports, which is of no one fold.
    if not configurations and not folds and holder(whole):
        ask_to_stop(whole)
        asked.append(str(whole))
    for path in _fold_folders(results, folder):
        configuration = path.parent.name.rpartition("__")[2]
        wanted = configuration in (configurations or [configuration])
        if wanted and path.name.removeprefix("fold_") in (folds or [path.name.removeprefix("fold_")]) and holder(path):
            ask_to_stop(path)
            asked.append(str(path))
    if as_json:
        print_json({"ok": bool(asked), "asked": asked})
    for text in asked:
        say(f"asked to stop: {text}")
    if not asked:
        say("seggate: nothing is being trained there")
    return 0 if asked else 1


def _dataset_name(folder: Path) -> str:
    """DATASET of status and stop may be gone, or be the name alone."""
    return folder.resolve().name if folder.exists() else folder.name


def _fold_folders(results: Path, folder: Path) -> list[Path]:
    return sorted(path for path in (results / _dataset_name(folder)).glob("*__*__*/fold_*") if path.is_dir())


def fold_rows(folders: Sequence[Path]) -> list[dict[str, Any]]:
    return [_row(folder) for folder in folders]


def _row(folder: Path) -> dict[str, Any]:
    """What a fold's folder says about itself; needs no torch."""
    lines = (folder / "training_log.jsonl").read_text().splitlines() if (folder / "training_log.jsonl").exists() else []
    last = json.loads(lines[-1]) if lines else {}
    request = json.loads((folder / "training.json").read_text()) if (folder / "training.json").exists() else {}
    summary = folder / "validation" / "summary.json"
    metrics = {k: v for k, v in _foreground_mean(summary).items() if not math.isnan(v)}
    who = holder(folder)
    if who is not None:
        state = "running"
    elif "result" in request:
        state = "finished"
    elif (folder / "checkpoint_final.pth").exists():
        state = "trained, not validated"
    else:
        state = "stopped"
    return {
        "folder": str(folder),
        "model": folder.parent.name,
        "fold": folder.name.removeprefix("fold_"),
        "state": state,
        "process": who,
        "epochs": len(lines),
        "of_epochs": request.get("schedule", {}).get("epochs"),
        "minutes": sum(json.loads(line)["seconds"] for line in lines) / 60,
        "train_loss": last.get("train_loss"),
        "ema_dice": last.get("ema_dice"),
        "score": last.get("score"),
        "dice": metrics.get("Dice"),
        "hd95_mm": metrics.get("HD95"),
        "surface_dice": metrics.get("SurfaceDice"),
    }


def _foreground_mean(summary: Path) -> dict[str, float]:
    if not summary.exists():
        return {}
    found: dict[str, float] = json.loads(summary.read_text())["foreground_mean"]
    return found


def present_folds(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("model", "fold", "state", "epochs", "minutes", "loss", "Dice (patches)", "Dice (cases)", "HD95 (mm)")
    table(
        "",
        columns,
        [
            (
                row["model"],
                row["fold"],
                row["state"],
                f"{row['epochs']} of {row['of_epochs'] or '?'}",
                f"{row['minutes']:.1f}",
                *(_figure(row[key]) for key in ("train_loss", "ema_dice", "dice", "hd95_mm")),
            )
            for row in rows
        ],
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


@contextmanager
def reporting(request: FoldRequest, *, hidden: bool) -> Iterator[FoldReport]:
    """A bar for the epochs and then for the cases; lines of the log above it, all on standard error."""
    from engine.fold_request import FoldReport

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), disable=hidden) as bar:
        name = f"{request.configuration} fold {request.fold}"
        epochs = bar.add_task(name, total=request.schedule.epochs)
        cases = bar.add_task(f"{name}: validation", total=len(request.experiment.split(request.fold).val))
        yield FoldReport(
            line=lambda text: None if hidden else bar.console.print(text, markup=False, highlight=False),
            epoch=lambda record, total: bar.update(epochs, completed=record.epoch + 1, total=total),
            case=lambda done, total: bar.update(cases, completed=done, total=total),
        )
