"""`seggate train fine-tune`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import DatasetInvalid, EngineError
from engine.parallel import default_processes
from gateway.commands.output import print_json, progress_bar, say
from gateway.commands.train import failed, fold_rows, launched, present_folds, reporting
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
from gateway.training_launcher import is_launched, is_orphaned

if TYPE_CHECKING:
    from engine.compilation import Compile
    from engine.fine_tuning import FineTuning
    from engine.fold_request import FoldReport, FoldRequest

_RAW = "nnUNet_raw"


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """What the command line says; None or nothing where it says nothing."""

    model: Path
    cases: Path
    results: Path
    old: Path | None
    preprocessed: Path | None
    folds: tuple[str, ...]
    epochs: int
    iterations: int
    rehearsal: float
    budget: str | None
    precision: PrecisionName
    deterministic: bool
    seed: int
    device: DeviceName
    devices: int
    compile: Compile
    probes: bool
    threads: int | None
    keeps_logits: bool
    processes: int | None


def fine_tune(options: FineTuneOptions, *, as_json: bool) -> int:
    """As `seggate train run`: 0 when every fold was trained and validated, and when it was told to stop (`state` says
    which); 1 when something failed; 2 for options that do not go together."""
    wrong = _wrong_usage(options)
    if wrong:
        say(f"seggate: {wrong}")
        return 2
    if options.devices > 1 and not is_launched():
        return launched(options.devices)
    try:
        with training_packages():
            from engine.fine_tuning import fine_tune as run
        tuning = _tuning(options)
        with (
            stop_requests() as stop,
            training_processes(options.device) as processes,
            ExitStack() as preprocessing,
        ):
            hidden = as_json or not processes.is_first
            advance = preprocessing.enter_context(progress_bar("preprocessing", hidden=hidden))

            def begin(request: FoldRequest) -> AbstractContextManager[FoldReport]:
                preprocessing.close()  # one bar at a time
                return reporting(request, hidden=hidden)

            found = run(
                tuning,
                stop=lambda: stop.is_set() or is_orphaned(),
                reporting=begin,
                tell=say,
                progress=advance,
                processes=processes,
            )
    except (EngineError, OSError) as error:
        return failed("not fine-tuned", error, as_json=as_json)
    if not processes.is_first:
        return 0
    state, rows = "finished" if found.is_finished else "stopped", fold_rows(found.folds)
    if as_json:
        print_json({"ok": True, "state": state, "model": str(found.model_folder), "folds": rows})
    else:
        present_folds(rows)
        say(str(found.model_folder) if found.is_finished else "stopped; the same command goes on")
    return 0


def _tuning(options: FineTuneOptions) -> FineTuning:
    """Raises DatasetInvalid when nobody says where the old dataset is, TrainingRefused for a device that is not there
    or a package that is missing."""
    from engine.fine_tuning import FineTuning
    from engine.training_setup import default_loader_threads

    device = chosen_device(options.device)
    set_threads(options.threads, device)
    kept = _kept_with(options.model)
    return FineTuning(
        model=options.model,
        old=options.old or (None if kept is None else kept[0]) or _raw_dataset(options.model),
        cases=options.cases,
        results=options.results,
        preprocessed=options.preprocessed or (None if kept is None else kept[1]),
        folds=options.folds,
        epochs=options.epochs,
        iterations=options.iterations,
        rehearsal=options.rehearsal,
        budget_s=parse_budget(options.budget),
        seed=options.seed,
        device=device,
        precision=chosen_precision(options.precision, device),
        any_precision=options.precision == "auto",
        deterministic=options.deterministic,
        keeps_logits=options.keeps_logits,
        loader_threads=default_loader_threads(device),
        compile=options.compile,
        probes=options.probes,
        workers=options.processes or default_processes(),
    )


def _kept_with(model: Path) -> tuple[Path, Path] | None:
    """The raw dataset and the folder of preprocessed ones that are kept with a model which was fine-tuned itself."""
    from engine.fine_tuning import JOINED

    dataset = model.resolve().parent
    raw = dataset.parent / JOINED / "raw" / dataset.name
    return (raw, dataset.parent / JOINED / "preprocessed") if raw.is_dir() else None


def _raw_dataset(model: Path) -> Path:
    name, folder = model.resolve().parent.name, os.environ.get(_RAW)
    if folder is None or not (Path(folder) / name).is_dir():
        raise DatasetInvalid(
            f"{name}, which the model was trained on, is not in the folder that the variable {_RAW} names; name its "
            "folder with --old"
        )
    return Path(folder) / name


def _wrong_usage(options: FineTuneOptions) -> str | None:
    try:
        parse_budget(options.budget)
    except ValueError as error:
        return str(error)
    if options.deterministic and options.budget is not None:
        return (
            "--budget and --deterministic exclude each other: within a budget the learning rate follows the clock, so "
            "that no two runs are alike; give --epochs and --iterations instead"
        )
    if options.deterministic and options.compile == "on":
        return "--compile on changes how sums are formed, which --deterministic excludes"
    return None
