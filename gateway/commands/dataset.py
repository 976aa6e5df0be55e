"""`seggate dataset check` and `seggate dataset exclude`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.case_exposure import BundleExposure, FoldExposure, bundles_trained_on, folds_that_know
from engine.dataset import RawDataset, open_dataset
from engine.dataset_check import CheckReport, Severity, check_dataset
from engine.errors import DatasetInvalid, EngineError
from engine.exclusions import Exclusion, exclude, read_exclusions, readmit
from engine.fingerprint import FINGERPRINT_JSON, read_fingerprint
from engine.parallel import default_processes
from engine.splits import SPLITS_JSON, Split, read_splits
from gateway.commands.output import console, print_json, progress_bar, say, table


def check(folder: Path, *, dataset_name: str | None, preprocessed: Path, processes: int | None, as_json: bool) -> int:
    """0 when the dataset can be trained on (warnings are allowed), 1 otherwise."""
    try:
        with progress_bar("reading cases", hidden=as_json) as advance:
            report = check_dataset(
                folder,
                processes=processes or default_processes(),
                planned=preprocessed / (dataset_name or folder.resolve().name),
                progress=advance,
            )
    except (EngineError, OSError) as error:
        if as_json:
            print_json({"ok": False, "error": str(error), "cases": 0, "findings": [], "excluded": []})
        say(f"seggate: {error}")
        return 1
    if as_json:
        print_json(_check_document(report))
    else:
        _present_check(report)
    return 0 if report.is_usable else 1


def _check_document(report: CheckReport) -> dict[str, Any]:
    return {
        "ok": report.is_usable,
        "cases": report.num_cases,
        "findings": [
            {
                "severity": str(f.severity),
                "kind": f.kind,
                "case": f.case,
                "file": f.file,
                "cause": f.cause,
                "remedy": f.remedy,
            }
            for f in report.findings
        ],
        "excluded": [vars(e) for e in report.excluded],
    }


def _present_check(report: CheckReport) -> None:
    if report.findings:
        columns = ("", "case", "file", "what is wrong", "what to do")
        table("", columns, [(f.severity, f.case, f.file, f.cause, f.remedy) for f in report.findings])
    if report.excluded:
        table("", ("excluded", "since", "reason"), [(e.case, e.excluded_at, e.reason) for e in report.excluded])
    counts = Counter(f.severity for f in report.findings)
    apart = f", {len(report.excluded)} excluded" if report.excluded else ""
    console().print(
        f"{report.num_cases} cases, {counts[Severity.ERROR]} errors, {counts[Severity.WARNING]} warnings{apart}",
        markup=False,
    )


@dataclass(frozen=True, kw_only=True)
class ExcludeOptions:
    """What the command line says. `reason` is needed unless the exclusion is taken back (`undo`)."""

    case: str
    folder: Path
    reason: str | None
    undo: bool
    dataset_name: str | None
    preprocessed: Path
    results: Path


def exclude_case(options: ExcludeOptions, *, as_json: bool) -> int:
    """0 when the case is excluded (or, with `undo`, used again); 1 when not; 2 for options that do not go together."""
    if options.undo == (options.reason is not None):
        say("seggate: give --reason TEXT, or --undo to take an exclusion back")
        return 2
    try:
        exclusion, dataset = _readmitted(options) if options.undo else _excluded(options)
    except (EngineError, OSError) as error:
        return _not_done(f"nothing changed: {error}", as_json=as_json)
    try:
        document = _exclusion_document(options, exclusion, dataset)
    except (EngineError, OSError) as error:
        state = "used again" if options.undo else "excluded"
        return _not_done(f"{options.case} is {state}, but what knows it cannot be listed: {error}", as_json=as_json)
    if as_json:
        print_json({"ok": True, **document})
    else:
        _present_exclusion(document)
    return 0


def _not_done(message: str, *, as_json: bool) -> int:
    if as_json:
        print_json({"ok": False, "error": message})
    say(f"seggate: {message}")
    return 1


def _excluded(options: ExcludeOptions) -> tuple[Exclusion, RawDataset]:
    dataset = open_dataset(options.folder)
    names = {case.name for case in dataset.cases}
    if options.case not in {*names, *(case.name for case in dataset.excluded)}:
        raise DatasetInvalid(f"{options.case[:80]!r} is no case of {dataset.name}")
    if names == {options.case}:
        raise DatasetInvalid(f"{options.case} is the only case that is left; a dataset needs one")
    return exclude(options.folder, options.case, options.reason or ""), open_dataset(options.folder)


def _readmitted(options: ExcludeOptions) -> tuple[Exclusion, RawDataset]:
    if options.case not in read_exclusions(options.folder):
        raise DatasetInvalid(f"{options.case[:80]!r} is not excluded")
    dataset = open_dataset(options.folder)
    return readmit(options.folder, options.case) or dataset.exclusions[options.case], open_dataset(options.folder)


def _exclusion_document(options: ExcludeOptions, exclusion: Exclusion, dataset: RawDataset) -> dict[str, Any]:
    name = options.dataset_name or dataset.name
    planned = options.preprocessed / name
    splits = _raw_splits(planned, dataset, options.case)
    folds = folds_that_know(options.results / name, options.case, splits=splits)
    # Folds may have been trained after other cases were excluded.
    others = dataset.excluded_names - {options.case}
    kept = tuple(Split(train=_without(split.train, others), val=_without(split.val, others)) for split in splits)
    bundles = bundles_trained_on(options.results / name, options.case, folds, splits=(*splits, *kept))
    return {
        "case": options.case,
        "state": "used" if options.undo else "excluded",
        "reason": exclusion.reason,
        "excluded_at": exclusion.excluded_at,
        "cases": len(dataset.cases),
        "excluded": [case.name for case in dataset.excluded],
        "folds": [_fold_row(fold) for fold in folds],
        "bundles": [_bundle_row(bundle) for bundle in bundles],
        "notes": [*_plan_notes(options, planned, splits), *_notes(options, dataset, name, folds)],
    }


def _raw_splits(planned: Path, dataset: RawDataset, case: str) -> tuple[Split, ...]:
    """The planned folds as they are in the file: with the case, where they were made with it."""
    path = planned / SPLITS_JSON
    if not path.exists():
        return ()
    names = {case, *(c.name for c in (*dataset.cases, *dataset.excluded))}
    return read_splits(path, sorted(names | dataset.excluded_names))


def _without(names: Sequence[str], excluded: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in excluded)


def _plan_notes(options: ExcludeOptions, planned: Path, splits: tuple[Split, ...]) -> list[str]:
    """What an already planned dataset does with the change."""
    if not (planned / FINGERPRINT_JSON).exists():
        return []
    in_folds = any(options.case in {*split.train, *split.val} for split in splits)
    if options.undo:
        if splits and not in_folds:
            return [
                f"{planned} was planned without {options.case}, and no fold has it: remove {SPLITS_JSON} there and "
                "plan again to use it, and train anew"
            ]
        return [f"{planned}: its folds have {options.case} again"]
    described = any(c.name == options.case for c in read_fingerprint(planned / FINGERPRINT_JSON).cases)
    if not in_folds and not described:
        return []
    return [
        f"{planned} was planned with {options.case}: its folds drop the case from now on, and a fold that is half "
        "trained will not go on with other cases (remove it, and it begins anew). Plan again, so that fingerprint and "
        "plans are made without it"
    ]


def _notes(options: ExcludeOptions, dataset: RawDataset, name: str, folds: tuple[FoldExposure, ...]) -> list[str]:
    notes = []
    patient = dataset.json.patients.get(options.case)
    if patient is not None and not options.undo:
        others = [c.name for c in dataset.cases if dataset.json.patients.get(c.name) == patient]
        if others:
            notes.append(f"other cases of the same patient stay in use: {', '.join(others)}")
    if not (options.results / name).is_dir():
        notes.append(f"no models were looked for: {options.results / name} is not there (--results)")
    elif any(fold.trained_on for fold in folds) and not options.undo:
        notes.append("models that learnt from the case know it until they are trained again")
    if any("unknown" in fold.roles for fold in folds):
        notes.append(
            "what a fold with the role `unknown` saw is not recorded: nnU-Net trained it, and its splits are gone"
        )
    return notes


def _fold_row(fold: FoldExposure) -> dict[str, Any]:
    return {
        "model": fold.model,
        "fold": fold.fold,
        "roles": list(fold.roles),
        "trained_on": fold.trained_on,
        "finished": fold.finished,
        "folder": str(fold.folder),
    }


def _bundle_row(bundle: BundleExposure) -> dict[str, Any]:
    return {
        "name": bundle.name,
        "semver": bundle.semver,
        "folds": list(bundle.folds),
        "untraced": bundle.untraced,
        "folder": str(bundle.folder),
    }


def _present_exclusion(document: dict[str, Any]) -> None:
    case, cases = document["case"], document["cases"]
    if document["state"] == "excluded":
        say(f"{case} is excluded since {document['excluded_at']}: {document['reason']}; {cases} cases are used")
    else:
        say(f"{case} is used again; {cases} cases are used")
    if document["folds"]:
        rows = [
            (f["model"], f["fold"], ", ".join(f["roles"]), "finished" if f["finished"] else "not finished")
            for f in document["folds"]
        ]
        table(f"\nWhat knows {case}", ("model", "fold", "as", ""), rows, whole=("model",))
    if document["bundles"]:
        bundles = [
            (f"{b['name']} {b['semver']}", "; ".join(filter(None, [", ".join(b["folds"]), b["untraced"]])), b["folder"])
            for b in document["bundles"]
        ]
        table(f"\nBundles with networks that were trained on {case}", ("bundle", "folds", "folder"), bundles)
    for note in document["notes"]:
        say(f"note: {note}")
