"""`seggate plan`: fingerprint, plans and splits, then the preprocessed cases that a training reads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.dataset import DATASET_JSON, DatasetJson, RawDataset, open_dataset, read_dataset_json
from engine.dataset_lock import reading_dataset
from engine.errors import DatasetInvalid, EngineError, MemoryExceeded, TrainingRefused
from engine.experiment import OWN, open_experiment, preprocess_experiment
from engine.fingerprint import FINGERPRINT_JSON, Fingerprint, extract_fingerprint, read_fingerprint
from engine.parallel import default_processes
from engine.planners import PROFILES, PlannerName, ProfileName
from engine.planning import Planned, PlanRequest, plan_experiment, write_plans
from engine.split_extension import extend_splits, uncovered
from engine.splits import (
    FOLDS,
    SPLITS_JSON,
    Split,
    mixed_patients,
    nnunet_splits,
    read_splits,
    stratified_splits,
    write_splits,
)
from gateway.commands.output import print_json, progress_bar, say, table
from gateway.training_device import DeviceName, PrecisionName, chosen_device, chosen_precision, training_packages

if TYPE_CHECKING:
    from engine.plan_probe import PlanProbe

SplitsKind = Literal["nnunet", "stratified", "extend"]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the command line says; None where it says nothing."""

    folder: Path | None
    fingerprint: Path | None
    dataset_json: Path | None
    dataset_name: str | None
    planner: PlannerName
    profile: ProfileName
    gpu_memory_gb: float | None
    overwrite_target_spacing: tuple[float, float, float] | None
    plans_name: str | None
    splits: SplitsKind | None
    preprocessed: Path
    out: Path | None
    processes: int | None
    plans_only: bool = False
    configurations: tuple[str, ...] = ()
    probe: bool | None = None
    device: DeviceName = "auto"
    precision: PrecisionName = "auto"


def plan(options: PlanOptions, *, as_json: bool) -> int:
    """0 when all was written, 1 when not (the message says why), 2 for options that do not go together."""
    wrong = _wrong_usage(options)
    if wrong:
        say(f"seggate: {wrong}")
        return 2
    try:
        if options.folder is None:
            document = _plan_files(options, hide_bar=as_json)
        else:
            document = plan_folder(options, options.folder, hide_bar=as_json)
    except (EngineError, OSError) as error:
        if as_json:
            print_json({"ok": False, "error": str(error)})
        say(f"seggate: not planned: {error}")
        return 1
    if as_json:
        print_json(document)
    else:
        _present(document)
    return 0


def _wrong_usage(options: PlanOptions) -> str | None:
    files = (options.fingerprint, options.dataset_json)
    if options.folder is not None and any(files):
        return "give a dataset's folder, or --fingerprint and --dataset-json, not both"
    if options.folder is None and not all(files):
        return "give a dataset's folder, or --fingerprint and --dataset-json"
    if options.folder is None and (options.splits is not None or options.processes is not None):
        return "--splits and --processes need a dataset's folder: a fingerprint alone has no cases"
    if options.configurations and (options.plans_only or options.folder is None):
        return "--configuration chooses what is preprocessed; with --plans-only or --fingerprint nothing is"
    if options.folder is not None and options.out is not None and not options.plans_only:
        return "--out needs --plans-only: a training looks for the plans beside the preprocessed cases"
    if options.overwrite_target_spacing is not None and min(options.overwrite_target_spacing) <= 0:
        return "--overwrite-target-spacing: three numbers above 0 are needed"
    for option, name in (("--dataset-name", options.dataset_name), ("--plans-name", options.plans_name)):
        if name is not None and (not name or Path(name).name != name):
            return f"{option} {name!r}: becomes a file's name, and is none"
    return None


def _plan_files(options: PlanOptions, *, hide_bar: bool) -> dict[str, Any]:
    """From a fingerprint that was made elsewhere."""
    if options.fingerprint is None or options.dataset_json is None:
        raise ValueError("both files are needed")
    name = options.dataset_name or options.dataset_json.resolve().parent.name
    notes: list[str] = []
    planned = _planned(
        options,
        name,
        read_dataset_json(options.dataset_json),
        read_fingerprint(options.fingerprint),
        notes,
        hide_bar=hide_bar,
    )
    return _document(planned, {"plans": _write_plans(options, name, planned)}, notes)


def plan_folder(options: PlanOptions, folder: Path, *, hide_bar: bool) -> dict[str, Any]:
    """Fingerprint, plans and splits of a dataset, all written into its folder of preprocessed data, the plans last,
    and the preprocessed cases after them. Returns what `--json` prints.

    Raises DatasetBusy while the dataset is being converted, DatasetInvalid, InputRejected, ImportRefused, DiskTooSmall,
    MemoryExceeded, WorkerDied, OSError.
    """
    with reading_dataset(folder):
        return _plan_folder(options, folder, hide_bar=hide_bar)


def _plan_folder(options: PlanOptions, folder: Path, *, hide_bar: bool) -> dict[str, Any]:
    dataset = open_dataset(folder)
    name = options.dataset_name or dataset.name
    with progress_bar("fingerprint", hidden=hide_bar) as advance:
        fingerprint = extract_fingerprint(dataset, processes=options.processes or default_processes(), progress=advance)
    notes: list[str] = []
    planned = _planned(options, name, dataset.json, fingerprint, notes, hide_bar=hide_bar)
    target = options.preprocessed / name
    if dataset.excluded:
        notes.append(f"{len(dataset.excluded)} excluded case(s) are left out")
    written = {"fingerprint": target / FINGERPRINT_JSON}
    splits = _splits(options, dataset, fingerprint, target / SPLITS_JSON, notes)
    fingerprint.write(target / FINGERPRINT_JSON)
    shutil.copyfile(folder / DATASET_JSON, target / DATASET_JSON)
    if splits:
        write_splits(splits, target / SPLITS_JSON)
        written["splits"] = target / SPLITS_JSON
    written["plans"] = _write_plans(options, name, planned)
    if not options.plans_only:
        written |= _preprocess(options, folder, name, planned, hide_bar=hide_bar)
    return _document(planned, written, notes)


def _preprocess(options: PlanOptions, folder: Path, name: str, planned: Planned, *, hide_bar: bool) -> dict[str, Path]:
    """The cases of the configurations asked for, or of all; what is there already is not made again."""
    experiment = open_experiment(folder, options.preprocessed, plans_name=planned.plans["plans_name"], name=name)
    chosen = options.configurations or tuple(planned.plans["configurations"])
    folders = experiment.job(chosen).folders
    with progress_bar("preprocessing", hidden=hide_bar) as advance:
        preprocess_experiment(
            experiment, chosen, processes=options.processes or default_processes(), tell=say, progress=advance
        )
    return {f"preprocessed {configuration}": path for configuration, path in folders.items()}


def _planned(
    options: PlanOptions,
    name: str,
    dataset_json: DatasetJson,
    fingerprint: Fingerprint,
    notes: list[str],
    *,
    hide_bar: bool,
) -> Planned:
    """The plans, with what was measured where the device is probed. Raises what the planner does, MemoryExceeded where
    nothing fits into the device, TrainingRefused where there is no such device."""
    probe = _probe(options, dataset_json, notes, hide_bar=hide_bar)
    fits = probe is not None and PROFILES[options.profile].fills_device
    request = _request(options, name, dataset_json, fingerprint)
    planned = plan_experiment(replace(request, fit=probe.fit) if probe is not None and fits else request)
    notes += planned.notes
    if probe is not None:
        from engine.memory_probe import check_step

        for configuration, memory in probe.add_to(planned.plans).items():
            try:
                check_step(memory)
            except MemoryExceeded as error:
                notes.append(f"{configuration} does not fit: {error}")
    return planned


def _probe(options: PlanOptions, dataset_json: DatasetJson, notes: list[str], *, hide_bar: bool) -> PlanProbe | None:
    """None where nothing is to be measured: by default only a profile that fills a device is, where there is a GPU."""
    if options.probe is False or (options.probe is None and not PROFILES[options.profile].fills_device):
        return None
    try:
        with training_packages():
            from engine.plan_probe import PlanProbe
        device = chosen_device("cuda" if options.probe is None and options.device == "auto" else options.device)
    except TrainingRefused as error:
        if options.probe or options.device != "auto":
            raise
        notes.append(f"patch and batch are by nnU-Net's estimate, not measured ({error}); --probe measures here")
        return None
    return PlanProbe(
        dataset_json,
        options.planner,
        device=device,
        precision=chosen_precision(options.precision, device),
        report=lambda text: None if hide_bar else say(text),
    )


def _request(options: PlanOptions, name: str, dataset_json: DatasetJson, fingerprint: Fingerprint) -> PlanRequest:
    return PlanRequest(
        dataset_name=name,
        dataset_json=dataset_json,
        fingerprint=fingerprint,
        planner=options.planner,
        profile=options.profile,
        gpu_memory_gb=options.gpu_memory_gb,
        overwrite_target_spacing=options.overwrite_target_spacing,
        plans_name=options.plans_name,
    )


def _write_plans(options: PlanOptions, name: str, planned: Planned) -> Path:
    path = options.out or options.preprocessed / name / f"{planned.plans['plans_name']}.json"
    write_plans(planned.plans, path)
    return path


def _splits(
    options: PlanOptions, dataset: RawDataset, fingerprint: Fingerprint, target: Path, notes: list[str]
) -> tuple[Split, ...]:
    """The dataset's own splits, or new ones; those that are already there are kept, or extended by the cases that are
    new. Empty for too small a dataset.

    Raises DatasetInvalid when there are none to extend, or when splits are there that differ from the dataset's own or
    from the kind asked for: what was trained on them would no longer fit.
    """
    names = [case.name for case in dataset.cases]
    read = partial(read_splits, cases=names, excluded=dataset.excluded_names)
    own = dataset.folder / SPLITS_JSON
    wanted: tuple[Split, ...] = ()
    if own.exists():
        if options.splits is not None:
            raise DatasetInvalid(f"--splits: the dataset brings its own {SPLITS_JSON}; remove it to make others")
        wanted = read(own)
    elif options.splits is None and target.exists():
        wanted = read(target)
    elif options.splits == "extend":
        return _extended(dataset, fingerprint, target, notes)
    elif len(names) < FOLDS and options.splits is None:
        notes.append(f"no {SPLITS_JSON}: {len(names)} case(s), {FOLDS} are needed; train the fold `all`")
        return ()
    elif (options.splits or ("stratified" if dataset.json.patients else "nnunet")) == "stratified":
        wanted = stratified_splits(fingerprint.cases, patients=dataset.json.patients)
    else:
        wanted = nnunet_splits(names)
    if target.exists() and read(target) != wanted:
        raise DatasetInvalid(
            f"{target}: other splits are already there; remove the file, and train again what was trained on them"
        )
    _note_cases(wanted, dataset, notes)
    return wanted


def _extended(dataset: RawDataset, fingerprint: Fingerprint, target: Path, notes: list[str]) -> tuple[Split, ...]:
    names = [case.name for case in dataset.cases]
    if not target.exists():
        raise DatasetInvalid(f"--splits extend: {target} is not there; plan without it first")
    before = read_splits(target, names, excluded=dataset.excluded_names)
    new = uncovered(before, names)
    wanted = extend_splits(before, fingerprint.cases, patients=dataset.json.patients)
    if new:
        notes.append(
            f"{len(new)} new case(s) are in the folds now ({_first(new)}); what was trained on the old folds has to be "
            "trained again"
        )
    _note_cases(wanted, dataset, notes)
    return wanted


def _note_cases(splits: tuple[Split, ...], dataset: RawDataset, notes: list[str]) -> None:
    """What is amiss with the cases of these folds."""
    left = uncovered(splits, [case.name for case in dataset.cases])
    if left:
        notes.append(
            f"{len(left)} case(s) are in no fold: {_first(left)}; nothing but the fold `all` is trained on them. "
            "--splits extend deals them to the folds, and leaves the others where they are"
        )
    mixed = mixed_patients(splits, dataset.json.patients)
    if mixed is not None:
        notes.append(f"{mixed}; --splits stratified keeps patients together")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _document(planned: Planned, written: dict[str, Path], notes: list[str]) -> dict[str, Any]:
    return {
        "ok": True,
        "dataset_name": planned.plans["dataset_name"],
        "plans_name": planned.plans["plans_name"],
        "written": {what: str(path) for what, path in written.items()},
        "configurations": planned.plans["configurations"],
        "memory": planned.plans.get(OWN, {}).get("memory"),
        "notes": notes,
    }


def _present(document: dict[str, Any]) -> None:
    rows = []
    for name, configuration in document["configurations"].items():
        if "inherits_from" in configuration:
            rows.append((name, *[""] * 4, f"as {configuration['inherits_from']}, on {configuration['previous_stage']}"))
            continue
        rows.append(
            (
                name,
                _by(configuration["patch_size"]),
                configuration["batch_size"],
                _by(configuration["spacing"]),
                _by(configuration["median_image_size_in_voxels"]),
                f"{configuration['architecture']['arch_kwargs']['n_stages']} stages",
            )
        )
    columns = ("configuration", "patch", "batch", "spacing (mm)", "median image", "network")
    table(f"{document['plans_name']} of {document['dataset_name']}, coarsest axis first", columns, rows)
    if document["memory"] is not None:
        _present_memory(document["memory"])
    for note in document["notes"]:
        say(f"note: {note}")
    for what, path in document["written"].items():
        say(f"{what}: {path}")


def _present_memory(memory: dict[str, Any]) -> None:
    def gigabytes(count: int | None) -> str:
        return "does not fit" if count is None else f"{count / 1e9:.2f}"

    table(
        "memory of a training step, in GB",
        ("configuration", "device", "precision", "measured", "free", "in all", "nnU-Net's estimate"),
        [
            (
                name,
                row["device"],
                row["precision"],
                *(gigabytes(row[f"{key}_bytes"]) for key in ("peak", "available", "total", "estimate")),
            )
            for name, row in memory.items()
        ],
    )


def _by(values: list[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
