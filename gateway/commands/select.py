"""`seggate select`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.errors import DatasetInvalid, EngineError
from engine.experiment import Experiment, is_finished, open_experiment
from engine.labels import LabelManager
from engine.parallel import default_processes
from engine.planners import ProfileName
from engine.postprocessing import KeepLargest
from engine.selection import Report, Selection, select_model
from engine.training_profile import TRAINING_PROFILES, TrainingProfile
from gateway.commands.evaluate import plain_means, present_means
from gateway.commands.output import print_json, say, table


def select(
    folder: Path,
    *,
    profile: ProfileName,
    configurations: Sequence[str],
    folds: Sequence[str],
    plans_name: str | None,
    dataset_name: str | None,
    preprocessed: Path,
    results: Path,
    processes: int | None,
    as_json: bool,
) -> int:
    """0 when a model was chosen and its post-processing written, 1 when not (the message names model and fold)."""
    try:
        experiment = open_experiment(folder, preprocessed, plans_name=plans_name, name=dataset_name)
        chosen = TRAINING_PROFILES[profile]
        found = select_trained(
            experiment, results, chosen, configurations, folds, processes=processes, hide_bar=as_json
        )
    except (EngineError, OSError) as error:
        if as_json:
            print_json({"ok": False, "error": str(error)})
        say(f"seggate: not selected: {error}")
        return 1
    labels = experiment.dataset.json.labels
    if as_json:
        print_json({"ok": True, **document(found, labels)})
    else:
        present(found, labels)
    return 0


def select_trained(
    experiment: Experiment,
    results: Path,
    profile: TrainingProfile,
    configurations: Sequence[str],
    folds: Sequence[str],
    *,
    processes: int | None,
    hide_bar: bool,
) -> Selection:
    """Of the named configurations, or of those that are trained; over the named folds, or all of the splits."""
    wanted = tuple(folds) or tuple(str(index) for index in range(len(experiment.splits())))
    for fold in wanted:
        experiment.split(fold)
        if not fold.isdecimal():
            raise DatasetInvalid(f"fold `{fold}` is trained on what it is validated on: nothing can be chosen by it")
    trained = tuple(
        name
        for name in experiment.plans.configurations
        if all(is_finished(experiment.model_folder(results, profile.trainer, name) / f"fold_{f}") for f in wanted)
    )
    names = tuple(dict.fromkeys(experiment.configuration(name).name for name in configurations)) or trained
    if not names:
        raise DatasetInvalid(
            f"no configuration has all of the folds {', '.join(wanted)} trained and validated with the profile "
            f"{profile.name}; see `seggate train status`, or choose folds with --fold"
        )
    with _bars(hidden=hide_bar) as report:
        return select_model(
            experiment,
            results,
            profile,
            configurations=names,
            folds=wanted,
            processes=processes or default_processes(),
            report=report,
        )


def document(found: Selection, labels: LabelManager) -> dict[str, Any]:
    return {
        "selected": list(found.best.configurations),
        "candidates": {c.name: c.score for c in found.candidates},
        "postprocessing": [describe(step, labels) for step in found.postprocessing.steps],
        "folder": str(found.best.folder),
        "information": str(found.information),
        "notes": list(found.notes),
        **plain_means(found.summary, labels),
    }


def present(found: Selection, labels: LabelManager) -> None:
    rows = [
        (" + ".join(c.configurations), "" if c.score is None else f"{c.score:.4f}", "*" if c is found.best else "")
        for c in found.candidates
    ]
    table("Cross-validation", ("model", "mean foreground Dice", "selected"), rows)
    present_means(found.summary, labels, "\nSelected, with post-processing")
    for step in found.postprocessing.steps:
        say(f"post-processing: {describe(step, labels)}")
    if not found.postprocessing.steps:
        say("post-processing: none, it improves nothing")
    for note in found.notes:
        say(f"note: {note}")
    say(f"written: {found.information}")


def describe(step: KeepLargest, labels: LabelManager) -> str:
    """A step in words."""
    name = next((label.name for label in labels.foreground if label.region == step.values), "all foreground")
    return f"{name}: keep the largest component" if step.count == 1 else f"{name}: keep the {step.count} largest"


@contextmanager
def _bars(*, hidden: bool) -> Iterator[Report]:
    """A bar for each part of the work, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as bar:

        def begin(what: str) -> Any:
            task = bar.add_task(what, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield begin
