"""`seggate train --all`: from a folder of images to a model bundle. Each step leaves what is done already as it is."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.errors import DatasetInvalid, EngineError
from engine.experiment import Experiment, open_experiment
from engine.model_card import ModelCard
from engine.planners import plans_name
from engine.training_lock import is_asked_to_stop, training_lock
from engine.training_profile import TRAINING_PROFILES
from gateway.commands import export, select
from gateway.commands.output import print_json, say
from gateway.commands.plan import PlanOptions, plan_folder
from gateway.commands.train import (
    TrainOptions,
    failed,
    fold_requests,
    fold_rows,
    launched,
    present_folds,
    run_folds,
    wrong_usage,
)
from gateway.stop_signal import StopRequested, raised_when_stopped, stop_requests
from gateway.time_budget import parse_budget
from gateway.training_device import training_processes
from gateway.training_launcher import is_launched

if TYPE_CHECKING:
    from engine.training_processes import TrainingProcesses

_LOOKS_EVERY_S = 0.2


def train_all(options: TrainOptions, *, as_json: bool) -> int:
    """0 when the bundle is there, and when it was told to stop; 1 when something failed; 2 for options that do not go
    together. Started again after anything, it goes on."""
    wrong = wrong_usage(options) or _wrong_usage(options)
    if wrong:
        say(f"seggate: {wrong}")
        return 2
    if options.devices > 1 and not is_launched():
        return launched(options.devices)
    try:
        with stop_requests() as stop, training_processes(options.device) as processes:
            document = _run(options, stop, processes, as_json=as_json)
    except (EngineError, OSError) as error:
        return failed("not finished", error, as_json=as_json)
    if document is None:
        return 0
    if as_json:
        print_json({"ok": True, **document})
    elif document["state"] == "stopped":
        say("stopped; the same command goes on")
    else:
        say(document["description"])
        say(f"bundle: {document['bundle']}")
        say(f"to serve it: seggate models import {document['bundle']}, and name the model in routes.toml")
    return 0


def _wrong_usage(options: TrainOptions) -> str | None:
    if options.folds:
        return "--all trains every fold: it needs no --fold"
    if not options.keeps_logits and TRAINING_PROFILES[options.profile].ensembles_everything:
        return f"the profile {options.profile} joins all configurations: it needs their logits"
    return None


def _run(
    options: TrainOptions, stop: threading.Event, processes: TrainingProcesses, *, as_json: bool
) -> dict[str, Any] | None:
    """What `--json` prints; None in all processes of the training but the first, which plans, selects and exports."""
    name = processes.on_first(lambda: _planned(options, stop, hide_bar=as_json))
    if name is None:
        return {"state": "stopped", "folds": [], "notes": []} if processes.is_first else None
    experiment = open_experiment(options.folder, options.preprocessed, plans_name=name, name=options.dataset_name)
    notes: list[str] = []
    configurations = experiment.in_stage_order(options.configurations or _trainable(experiment, notes))
    # A cascade brings the stages before it, whether they are to be chosen from or not.
    trained = experiment.in_stage_order(configurations, complete=True)
    requests = fold_requests(replace(options, configurations=trained), experiment, parse_budget(options.budget))
    state, folders = run_folds(requests, options, experiment, stop, processes, hide_bar=as_json)
    if not processes.is_first:
        return None
    rows = fold_rows(folders)
    if not as_json:
        present_folds(rows)
    made = None
    if state == "finished":
        with suppress(StopRequested), _stoppable(experiment.name, options, stop):
            made = _model_of(experiment, configurations, options, notes, as_json=as_json)
    if made is None:
        return {"state": "stopped", "folds": rows, "notes": notes}
    if not as_json:
        for note in notes:
            say(f"note: {note}")
    return {"state": state, "folds": rows, **made, "notes": notes}


def _planned(options: TrainOptions, stop: threading.Event, *, hide_bar: bool) -> str | None:
    """The name of the plans; None when it was told to stop."""
    name = options.dataset_name or options.folder.resolve().name
    with suppress(StopRequested), _stoppable(name, options, stop):
        return _plan(options, hide_bar=hide_bar)
    return None


@contextmanager
def _stoppable(name: str, options: TrainOptions, stop: threading.Event) -> Iterator[None]:
    """Holds the dataset's results as a fold is held while it is trained, so that `seggate train stop` ends what no fold
    is held for; by a signal, as everything else that stops it does. Raises TrainingRefused when another process has
    them, StopRequested when told to stop."""
    folder, ended = options.results / name, threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOKS_EVERY_S):
            if is_asked_to_stop(folder):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    with training_lock(folder), raised_when_stopped(stop):
        watcher = threading.Thread(target=watch, name="stop", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _model_of(
    experiment: Experiment, configurations: Sequence[str], options: TrainOptions, notes: list[str], *, as_json: bool
) -> dict[str, Any]:
    """Selects and exports; what `--json` prints of both."""
    selection = select.select_trained(
        experiment,
        options.results,
        TRAINING_PROFILES[options.profile],
        configurations,
        (),
        processes=options.processes,
        hide_bar=as_json,
    )
    labels = experiment.dataset.json.labels
    if not as_json:
        select.present(selection, labels)
    bundle, semver, why = export.newest_bundle(experiment, options.results, calibrates=options.calibrates)
    if bundle is not None:
        notes.append(
            f"{bundle.root} was there already, of these very networks; `seggate export --semver` makes another"
        )
    else:
        out = export.default_folder(experiment, options.results, semver)
        if why:
            notes.append(f"{why}: this is {semver}")
        bundle = export.export_chosen(
            experiment,
            options.results,
            out,
            ModelCard(),
            name=None,
            semver=semver,
            processes=options.processes,
            calibrates=options.calibrates,
            notes=notes,
            hide_bar=as_json,
        )
    return {"selection": select.document(selection, labels), **export.document(bundle)}


def _trainable(experiment: Experiment, notes: list[str]) -> tuple[str, ...]:
    """Every planned configuration; no cascade where its first stage could not predict every case honestly."""
    planned = experiment.plans.configurations
    lacking = experiment.never_validated()
    left = [name for name in planned if lacking and planned[name].previous_stage is not None]
    for name in left:
        notes.append(
            f"{name} is not trained: no fold of the splits validates {lacking[0]} ({len(lacking)} such), so that its "
            "first stage has no prediction of it by a network that does not know it"
        )
    return tuple(name for name in planned if name not in left)


def _plan(options: TrainOptions, *, hide_bar: bool) -> str:
    """The name of the plans that are there, or of new ones by the profile. Raises DatasetInvalid when there are too few
    cases."""
    name = options.plans_name or plans_name("ExperimentPlanner", options.profile)
    folder = options.preprocessed / (options.dataset_name or options.folder.resolve().name)
    if not (folder / f"{name}.json").exists():
        if options.plans_name is not None:
            raise DatasetInvalid(f"{folder / name}.json is not there; without --plans-name it is made")
        plan_folder(
            PlanOptions(
                folder=options.folder,
                fingerprint=None,
                dataset_json=None,
                dataset_name=options.dataset_name,
                planner="ExperimentPlanner",
                profile=options.profile,
                gpu_memory_gb=None,
                overwrite_target_spacing=None,
                plans_name=None,
                splits=None,
                preprocessed=options.preprocessed,
                out=None,
                processes=options.processes,
                plans_only=True,
                probe=None if options.probes else False,
                device=options.device,
                precision=options.precision,
            ),
            options.folder,
            hide_bar=hide_bar,
        )
    return name
