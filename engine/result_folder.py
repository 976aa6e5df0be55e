"""Finds what there is to import: nnU-Net's result folders, their zip, or one checkpoint beside its plans.

Nothing of a checkpoint is read here, but for a lone one whose folder does not say which configuration it is.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import ImportRefused
from engine.json_reader import Reader, read_json
from engine.labels import LabelManager
from engine.model_archive import unpack_model
from engine.plans import Plans, read_plans
from engine.postprocessing import KEEP_SEVERAL, KNOWN_ARGUMENTS, MAX_COMPONENTS

CheckpointKind = Literal["final", "best", "given"]

_FOLD = re.compile(r"fold_(\d{1,3}|all)")
_CROSSVAL = re.compile(r"crossval_results_folds_((?:\d{1,3}|all)(?:_(?:\d{1,3}|all))*)")
_CHECKPOINTS: tuple[tuple[str, CheckpointKind], ...] = (
    ("checkpoint_final.pth", "final"),
    ("checkpoint_best.pth", "best"),
)


@dataclass(frozen=True, kw_only=True)
class ResultFold:
    fold: str
    checkpoint: Path
    kind: CheckpointKind


@dataclass(frozen=True, kw_only=True)
class ResultConfiguration:
    """A trained configuration. `folder` is the result folder, `folder_name` what nnU-Net's ensembles call it."""

    name: str
    trainer: str
    folder: Path
    folds: tuple[ResultFold, ...]


@dataclass(frozen=True, kw_only=True)
class ResultFolder:
    """Everything that belongs to one model. `notes` say what was chosen and what was left out."""

    plans: Plans
    plans_json: Mapping[str, Any]
    dataset_json: Mapping[str, Any]
    fingerprint_json: Mapping[str, Any] | None
    label_manager: LabelManager
    configurations: tuple[ResultConfiguration, ...]
    postprocessing: Mapping[str, Any] | None
    notes: tuple[str, ...]


@contextlib.contextmanager
def open_result(
    path: Path,
    *,
    configurations: Collection[str] | None = None,
    folds: Collection[str] | None = None,
    checkpoint: str | None = None,
) -> Iterator[ResultFolder]:
    """The model at `path`, for as long as the context lasts (a zip is unpacked into a temporary folder).

    `path`: a result folder (`Trainer__Plans__configuration` with fold_*), a folder with several of them, nnU-Net's
    export zip, or one checkpoint with plans.json and dataset.json beside it or above its fold folder.
    `configurations` and `folds` choose a part; without them, nnU-Net's own choice in inference_information.json, else
    everything that is there. `checkpoint` is the file's name in each fold (default: checkpoint_final.pth, else
    checkpoint_best.pth). Raises ImportRefused with the file or folder, and what to do.
    """
    path = path.absolute()
    if path.is_dir():
        yield _from_folder(path, configurations, folds, checkpoint)
    elif path.is_file() and path.suffix.casefold() == ".zip":
        with tempfile.TemporaryDirectory(prefix="seggate-import-") as unpacked:
            unpack_model(path, Path(unpacked))
            yield _from_folder(Path(unpacked), configurations, folds, checkpoint)
    elif path.is_file():
        yield _from_checkpoint(path)
    else:
        raise ImportRefused(f"{path.name}: there is no such file or folder")


def _from_folder(
    path: Path, configurations: Collection[str] | None, folds: Collection[str] | None, checkpoint: str | None
) -> ResultFolder:
    notes: list[str] = []
    if _is_result_folder(path):
        candidates = [path]
    else:
        candidates = _result_folders_below(path)
        if not candidates:
            raise ImportRefused(
                f"{path.name}: no result folder of nnU-Net v2 found; one has plans.json, dataset.json and fold_*"
            )
    found = {folder: _names_of(folder) for folder in candidates}
    if configurations is not None:
        absent = sorted(set(configurations) - {name for _, _, name in found.values()})
        if absent:
            there = ", ".join(sorted(name for _, _, name in found.values()))
            raise ImportRefused(f"{path.name}: no configuration {absent[0][:80]!r}; there are {there}")
        found = {folder: names for folder, names in found.items() if names[2] in configurations}
    elif len(found) > 1:
        found = _chosen_by_nnunet(candidates[0].parent, found, notes)
    _add_previous_stages(found, notes)
    _check_one_model(found)
    chosen = []
    for folder, (trainer, _, name) in sorted(found.items(), key=lambda item: item[1][2]):
        chosen.append(
            ResultConfiguration(
                name=name, trainer=trainer, folder=folder, folds=_folds(folder, folds, checkpoint, notes)
            )
        )
    return _described(tuple(chosen), notes)


def _from_checkpoint(path: Path) -> ResultFolder:
    folder = next((f for f in (path.parent, path.parent.parent) if _has_plans(f)), None)
    if folder is None:
        raise ImportRefused(f"{path.name}: plans.json and dataset.json must lie beside it or above its fold folder")
    named = _FOLD.fullmatch(path.parent.name)
    parts = folder.name.split("__")
    if len(parts) == 3:
        trainer, name = parts[0], parts[2]
        fold = named.group(1) if named else "0"
    else:
        # torch is needed only here, and only with the extra `train`.
        from engine.checkpoint import read_checkpoint

        checkpoint = read_checkpoint(path)
        if checkpoint.configuration is None:
            raise ImportRefused(
                f"{path.name}: does not say its configuration; put it into Trainer__Plans__configuration/"
            )
        trainer, name = checkpoint.trainer, checkpoint.configuration
        fold = named.group(1) if named else _plain_fold(checkpoint.fold)
    configuration = ResultConfiguration(
        name=name, trainer=trainer, folder=folder, folds=(ResultFold(fold=fold, checkpoint=path, kind="given"),)
    )
    return _described((configuration,), [f"{name}: fold {fold} from {path.name} alone"])


def _plain_fold(fold: str | None) -> str:
    return fold if fold is not None and _FOLD.fullmatch(f"fold_{fold}") else "0"


def _has_plans(folder: Path) -> bool:
    return (folder / "plans.json").is_file() and (folder / "dataset.json").is_file()


def _is_result_folder(folder: Path) -> bool:
    return _has_plans(folder) and any(_FOLD.fullmatch(child.name) for child in folder.iterdir() if child.is_dir())


def _result_folders_below(path: Path) -> list[Path]:
    """Result folders one level down, else (results root, unpacked zip) in the only dataset folder there is."""
    children = sorted(child for child in path.iterdir() if child.is_dir())
    direct = [child for child in children if _is_result_folder(child)]
    if direct:
        return direct
    datasets = [c for c in children if any(_is_result_folder(g) for g in c.iterdir() if g.is_dir())]
    if len(datasets) > 1:
        names = ", ".join(dataset.name for dataset in datasets[:10])
        raise ImportRefused(f"{path.name}: several datasets ({names}); name one of their folders")
    return _result_folders_below(datasets[0]) if datasets else []


def _names_of(folder: Path) -> tuple[str, str, str]:
    """Trainer, plans and configuration from the folder's name; a lone renamed folder of one configuration is taken."""
    parts = folder.name.split("__")
    if len(parts) == 3 and all(parts):
        return parts[0], parts[1], parts[2]
    document = read_json(folder / "plans.json", error=ImportRefused)
    plans = Reader(document, where="plans.json", error=ImportRefused)
    names = list(plans.child("configurations").keys())
    if len(names) == 1:
        return "unknown", plans.text("plans_name"), names[0]
    raise ImportRefused(
        f"{folder.name}: the folder's name must be Trainer__Plans__configuration to say which of "
        f"{', '.join(names[:10])} it holds"
    )


def _chosen_by_nnunet(
    dataset: Path, found: dict[Path, tuple[str, str, str]], notes: list[str]
) -> dict[Path, tuple[str, str, str]]:
    """nnUNetv2_find_best_configuration writes down the single model or the pair that it found best."""
    file = dataset / "inference_information.json"
    if not file.is_file():
        notes.append(f"all {len(found)} result folders are used together; choose with --configuration")
        return found
    information = Reader(read_json(file, error=ImportRefused), where=file.name, error=ImportRefused)
    best = information.child("best_model_or_ensemble")
    wanted = set()
    for entry in best.children("selected_model_or_models", lengths=(1, 8)):
        wanted.add((entry.text("trainer"), entry.text("plans_identifier"), entry.text("configuration")))
    chosen = {folder: names for folder, names in found.items() if names in wanted}
    if len(chosen) != len(wanted):
        raise ImportRefused(f"{file.name}: nnU-Net chose a model that is not there; choose with --configuration")
    notes.append(f"{file.name}: nnU-Net's choice is used: {', '.join(sorted(name for _, _, name in chosen.values()))}")
    return chosen


def _add_previous_stages(found: dict[Path, tuple[str, str, str]], notes: list[str]) -> None:
    """A cascade needs its low-resolution stage, which lies in a sister folder with the same trainer and plans."""
    for folder, (trainer, plans_name, name) in list(found.items()):
        plans = read_plans(folder / "plans.json", configurations=[name])
        previous = plans.configurations[name].previous_stage
        if previous is None:
            continue
        if previous in {other for _, _, other in found.values()}:
            # nnU-Net may choose the two as a pair; in a bundle a stage serves its cascade only.
            notes.append(f"{previous} is run for {name}, whose first stage it is, and not joined into the result")
            continue
        sister = folder.parent / f"{trainer}__{plans_name}__{previous}"
        if "__" in previous or "/" in previous or not _is_result_folder_at(sister):
            raise ImportRefused(
                f"{folder.name}: is a cascade; its previous stage {previous[:80]!r} is needed in {sister.name[:200]}"
            )
        found[sister] = (trainer, plans_name, previous)


def _is_result_folder_at(folder: Path) -> bool:
    return folder.is_dir() and _is_result_folder(folder)


def _check_one_model(found: Mapping[Path, tuple[str, str, str]]) -> None:
    names = [name for _, _, name in found.values()]
    if len(set(names)) != len(names) or len({plans for _, plans, _ in found.values()}) > 1:
        folders = ", ".join(sorted(folder.name for folder in found))
        raise ImportRefused(f"several models are here ({folders}); name one of the result folders")


def _folds(
    folder: Path, wanted: Collection[str] | None, checkpoint: str | None, notes: list[str]
) -> tuple[ResultFold, ...]:
    kinds = {name: kind for name, kind in _CHECKPOINTS if checkpoint in (None, name)}
    if checkpoint is not None and not kinds:
        kinds = {checkpoint: "given"}
    sought = " or ".join(kinds)
    present: dict[str, Path] = {}
    for child in folder.iterdir():
        named = _FOLD.fullmatch(child.name)
        if named and child.is_dir():
            present[named.group(1)] = child
    if wanted is not None:
        absent = sorted(set(wanted) - set(present))
        if absent:
            raise ImportRefused(f"{folder.name}: no fold {absent[0][:20]!r}; there are {', '.join(sorted(present))}")
        present = {fold: child for fold, child in present.items() if fold in wanted}
    folds = []
    for fold, child in sorted(present.items(), key=lambda item: (not item[0].isdecimal(), item[0].zfill(3))):
        for file_name, kind in kinds.items():
            if (child / file_name).is_file():
                folds.append(ResultFold(fold=fold, checkpoint=child / file_name, kind=kind))
                if kind == "best" and checkpoint is None:
                    notes.append(f"{folder.name}: fold {fold} has no checkpoint_final.pth; checkpoint_best.pth is used")
                break
        else:
            if wanted is not None:
                raise ImportRefused(f"{folder.name}: fold {fold} has no {sought}")
            notes.append(f"{folder.name}: fold {fold} has no checkpoint and is left out")
    if not folds:
        raise ImportRefused(f"{folder.name}: no fold has a {sought}")
    return tuple(folds)


def _described(configurations: tuple[ResultConfiguration, ...], notes: list[str]) -> ResultFolder:
    plans_json = _merged_plans(configurations)
    plans = read_plans(plans_json, configurations=[configuration.name for configuration in configurations])
    first = configurations[0].folder
    dataset_json = read_json(first / "dataset.json", error=ImportRefused)
    label_manager = LabelManager.from_dataset_json(dataset_json)
    for configuration in configurations[1:]:
        other = read_json(configuration.folder / "dataset.json", error=ImportRefused)
        for key in ("labels", "channel_names", "modality", "regions_class_order"):
            # As text: the order of the labels counts.
            if str(other.get(key)) != str(dataset_json.get(key)):
                raise ImportRefused(f"{configuration.folder.name}: dataset.json: {key} differs from {first.name}")
    for configuration in configurations:
        planned = plans.configurations[configuration.name].previous_stage
        if planned is not None and planned not in plans.configurations:
            raise ImportRefused(
                f"{configuration.name}: is a cascade; its previous stage {planned[:80]!r} is needed too"
            )
    fingerprint = first / "dataset_fingerprint.json"
    return ResultFolder(
        plans=plans,
        plans_json=plans_json,
        dataset_json=dataset_json,
        fingerprint_json=read_json(fingerprint, error=ImportRefused) if fingerprint.is_file() else None,
        label_manager=label_manager,
        configurations=configurations,
        postprocessing=_postprocessing(configurations, plans, label_manager, notes),
        notes=tuple(notes),
    )


def _merged_plans(configurations: tuple[ResultConfiguration, ...]) -> dict[str, Any]:
    """One plans.json for all. Each folder has the copy of the day its training began: what is used must be equal."""
    merged = read_json(configurations[0].folder / "plans.json", error=ImportRefused)
    for configuration in configurations[1:]:
        other = read_json(configuration.folder / "plans.json", error=ImportRefused)
        own, theirs = merged.get("configurations"), other.get("configurations")
        if not isinstance(own, dict) or not isinstance(theirs, dict):
            raise ImportRefused(f"{configuration.folder.name}: plans.json: configurations is no object")
        for key in sorted((set(merged) | set(other)) - {"configurations"}):
            if merged.get(key) != other.get(key):
                raise ImportRefused(f"{configuration.folder.name}: plans.json: {key} differs from the other folder's")
        shared = set(own) & set(theirs)
        if any(own[name] != theirs[name] for name in shared):
            raise ImportRefused(
                f"{configuration.folder.name}: plans.json: configurations differ from the other folder's"
            )
        own.update({name: value for name, value in theirs.items() if name not in own})
    return merged


def _postprocessing(
    configurations: tuple[ResultConfiguration, ...], plans: Plans, label_manager: LabelManager, notes: list[str]
) -> dict[str, Any] | None:
    """nnU-Net's post-processing that goes with exactly these configurations, reduced to what is to be done."""
    earlier = {plans.configurations[c.name].previous_stage for c in configurations}
    final = [c for c in configurations if c.name not in earlier]
    folds = "_".join(fold.fold for fold in final[0].folds)
    if len(final) == 1:
        parents = [child for child in final[0].folder.iterdir() if _CROSSVAL.fullmatch(child.name)]
        suffix = f"folds_{folds}"
    else:
        names = {configuration.folder.name for configuration in final}
        ensembles = final[0].folder.parent / "ensembles"
        parents = []
        for child in ensembles.iterdir() if ensembles.is_dir() else ():
            parts = child.name.split("___")
            if len(parts) >= 4 and parts[0] == "ensemble" and set(parts[1:-1]) == names:
                parents.append(child)
        suffix = f"___{folds}"
    files = sorted(parent / "postprocessing.json" for parent in parents if (parent / "postprocessing.json").is_file())
    if not files:
        if any((parent / "postprocessing.pkl").is_file() for parent in parents):
            notes.append("postprocessing.pkl is not read (it is a program, not data); postprocessing.json is missing")
        else:
            notes.append("no post-processing was found")
        return None
    matching = [file for file in files if file.parent.name.endswith(suffix)]
    if not matching and len(files) > 1:
        raise ImportRefused(f"{files[0].parent.parent.name}: several postprocessing.json and none for folds {folds}")
    file = (matching or files)[0]
    notes.append(f"post-processing from {file.parent.name}")
    return _checked_postprocessing(
        Reader(read_json(file, error=ImportRefused), where=file.name, error=ImportRefused), label_manager
    )


def _checked_postprocessing(document: Reader, label_manager: LabelManager) -> dict[str, Any]:
    functions = document.texts("postprocessing_fns", lengths=(0, 1000))
    arguments = document.children("postprocessing_kwargs", lengths=(len(functions), len(functions)))
    steps = []
    for function, kwargs in zip(functions, arguments, strict=True):
        if function not in KNOWN_ARGUMENTS:
            known = ", ".join(KNOWN_ARGUMENTS)
            raise document.fail("postprocessing_fns", f"{function[:80]!r} is not supported; known: {known}")
        kwargs.only(KNOWN_ARGUMENTS[function])
        background = kwargs.integer("background_label", 0, 65535, 0)
        value = kwargs.raw("labels_or_regions")
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            for label in entry if isinstance(entry, list) else [entry]:
                if kwargs.check_integer("labels_or_regions", label, 0, 65535) not in label_manager.values:
                    raise kwargs.fail("labels_or_regions", f"{label} is no label of this model")
        count = kwargs.integer("count", 1, MAX_COMPONENTS, 1)
        steps.append(
            {
                "labels_or_regions": value,
                "background_label": background,
                **({"count": count} if function == KEEP_SEVERAL else {}),
            }
        )
    return {"postprocessing_fns": list(functions), "postprocessing_kwargs": steps}
