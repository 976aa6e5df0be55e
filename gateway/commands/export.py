"""`seggate export`: from what `seggate select` chose to a model bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from engine.baseline_extraction import extract_baseline
from engine.bundle import Bundle
from engine.bundle_versions import FIRST, find_bundle, made_of, next_version, note_bundle
from engine.calibration_cases import calibrate_bundle, describe
from engine.calibration_file import calibration_document
from engine.errors import EngineError
from engine.experiment import Experiment, open_experiment
from engine.manifest import Ensemble, Weights
from engine.model_card import ModelCard, read_card
from engine.model_figures import Chosen, check_choice, complete_card, learned_cases, read_choice, validation_of
from engine.parallel import default_processes
from engine.quality_estimate import MIN_DICE, Calibration
from engine.sanity_making import dataset_cases
from engine.splits import KEEPS_PATIENTS_TOGETHER
from engine.training_profile import TRAINING_PROFILES
from gateway.commands.models import importer
from gateway.commands.output import print_json, progress_bar, say

_JOINED_APART = frozenset(p.trainer for p in TRAINING_PROFILES.values() if p.ensembles_everything)


def export(
    folder: Path,
    *,
    out: Path | None,
    card: Path | None,
    name: str | None,
    semver: str | None,
    weights: Weights,
    phantoms: bool,
    sanity_cases: Sequence[str],
    plans_name: str | None,
    dataset_name: str | None,
    preprocessed: Path,
    results: Path,
    processes: int | None,
    calibrates: bool,
    as_json: bool,
) -> int:
    """0 when the bundle was written and its networks proven to compute the same, 1 when not."""
    notes: list[str] = []
    try:
        experiment = open_experiment(folder, preprocessed, plans_name=plans_name, name=dataset_name)
        described = read_card(card) if card is not None else ModelCard()
        bundle = export_chosen(
            experiment,
            results,
            out or default_folder(experiment, results, semver or described.semver),
            described,
            name=name,
            semver=semver,
            weights=weights,
            phantoms=phantoms,
            sanity_cases=sanity_cases,
            processes=processes,
            calibrates=calibrates,
            notes=notes,
            hide_bar=as_json,
        )
    except (EngineError, OSError) as error:
        if as_json:
            print_json({"ok": False, "error": str(error)})
        say(f"seggate: not exported: {error}")
        return 1
    if as_json:
        print_json({"ok": True, **document(bundle), "notes": notes})
        return 0
    for note in notes:
        say(f"note: {note}")
    say(bundle.description)
    say(f"{bundle.name} {bundle.semver}: {bundle.root}")
    say(f"to serve it: seggate models import {bundle.root}")
    return 0


def export_chosen(
    experiment: Experiment,
    results: Path,
    out: Path,
    card: ModelCard,
    *,
    name: str | None,
    semver: str | None,
    weights: Weights = "float32",
    phantoms: bool = True,
    sanity_cases: Sequence[str] = (),
    processes: int | None,
    calibrates: bool,
    notes: list[str],
    hide_bar: bool,
) -> Any:
    """The bundle (engine.bundle.Bundle). `sanity_cases` are names of the dataset's cases. Ended at any point, it
    leaves no bundle, and another one goes on with the cases that were calibrated. Raises what
    `engine.export.import_model` does, DatasetInvalid when nothing is selected or a name is no case."""
    import_model = importer("exporting a model")
    chosen = read_choice(experiment, results)
    check_choice(chosen, experiment, results)
    dice = chosen.summary["foreground_mean"]["Dice"]
    if not dice >= MIN_DICE:
        notes.append(
            f"the cross-validation's mean foreground Dice is {dice:.4f}, below {MIN_DICE}: this model should not "
            "serve. Import it with --candidate, or train it longer"
        )
    cases = learned_cases(experiment, results, chosen)
    if cases.excluded_since:
        first = cases.excluded_since[0]
        notes.append(
            f"these networks learned from {len(cases.all)} cases, and {len(cases.excluded_since)} of them are excluded "
            f"since (the first: {first}): remove the folds and train them again to be rid of it"
        )
    if (mixed := experiment.mixed_patients(chosen.folds)) is not None:
        notes.append(f"{mixed}: {KEEPS_PATIENTS_TOGETHER}")
    site_cases = dataset_cases(experiment.dataset, sanity_cases)
    with progress_bar("intensities", hidden=hide_bar) as advance:
        baseline = extract_baseline(experiment, processes=processes or default_processes(), progress=advance)
    ensemble = _ensemble(chosen)
    with Progress(console=Console(stderr=True), disable=hide_bar, transient=True) as bar:
        task = bar.add_task("exporting", total=1.0)

        def calibrate(staged: Bundle) -> tuple[Calibration, str]:
            cases = bar.add_task("estimating quality")

            def advance(done: int, total: int) -> None:
                bar.update(cases, completed=done, total=total, description=f"estimating quality {done}/{total}")

            found = calibrate_bundle(staged, experiment, chosen.folds, results, progress=advance)
            notes.extend(found.notes)
            return found, "" if card.description else describe(found)

        if not calibrates:
            notes.append("--no-calibration: the gateway will not estimate the quality of this model's results")
        bundle = import_model(
            results / experiment.name,
            out,
            name=name,
            semver=semver,
            card=complete_card(card, experiment, chosen, cases),
            folds=chosen.folds,
            ensemble=ensemble,
            weights=weights,
            baseline=baseline,
            phantoms=phantoms,
            site_cases=site_cases,
            calibrate=calibrate if calibrates else None,
            validation=validation_of(chosen, experiment.dataset.json.labels),
            excluded=experiment.dataset.excluded_names,
            progress=lambda share, what: bar.update(task, completed=share, description=what),
            notice=notes.append,
        )
    if out.absolute().parent == bundles_folder(experiment, results).absolute():
        made = made_of(experiment, results, chosen, ensemble=ensemble)
        note_bundle(bundle, made, calibrates=calibrates)
    return bundle


def newest_bundle(experiment: Experiment, results: Path, *, calibrates: bool) -> tuple[Any | None, str, str]:
    """The bundle of what is selected if it is there, with a calibration if that is wanted and can be had, else None;
    the version that a new one has, and why."""
    chosen, folder = read_choice(experiment, results), bundles_folder(experiment, results)
    wanted = made_of(experiment, results, chosen, ensemble=_ensemble(chosen))
    return find_bundle(folder, wanted, calibrates=calibrates), *next_version(folder, wanted)


def _ensemble(chosen: Chosen) -> Ensemble:
    return "probabilities-of-folds" if chosen.trainer in _JOINED_APART else "probabilities"


def bundles_folder(experiment: Experiment, results: Path) -> Path:
    return results / experiment.name / "bundles"


def default_folder(experiment: Experiment, results: Path, semver: str | None) -> Path:
    return bundles_folder(experiment, results) / (semver or FIRST)


def document(bundle: Any) -> dict[str, Any]:
    return {
        "bundle": str(bundle.root),
        "name": bundle.name,
        "semver": bundle.semver,
        "description": bundle.description,
        "weights_digest": bundle.weights_digest,
        "configurations": {c.name: [fold.fold for fold in c.folds] for c in bundle.configurations},
        "ensemble": bundle.ensemble,
        "parity": [vars(parity) for parity in bundle.parity],
        "weights": bundle.weights,
        "sanity": {case.name: dict(case.voxels) for case in bundle.evidence.sanity.cases}
        if bundle.evidence.sanity is not None
        else {},
        "baseline_cases": bundle.evidence.baseline.cases if bundle.evidence.baseline is not None else 0,
        "calibration": None if bundle.calibration is None else calibration_document(bundle.calibration),
    }
