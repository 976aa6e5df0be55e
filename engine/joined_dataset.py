"""A model's own dataset and new cases as one dataset, in nnU-Net's formats.

    <joined>/raw/<dataset>/            dataset.json  imagesTr  labelsTr
    <joined>/preprocessed/<dataset>/   the model's plans and fingerprint, splits_final.json, preprocessed cases

Nothing is planned: patches, spacing and the statistics of intensities are the model's. Files are linked (copied where
the disk does not allow that), so the joined dataset costs little and stays whole when the others go. It may be exported
from, trained on, and joined again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.dataset import DATASET_JSON, IMAGES, LABELS, Case, DatasetJson, RawDataset, open_dataset
from engine.errors import DatasetInvalid, TrainingRefused
from engine.json_writer import write_json
from engine.whole_file import whole_file

_ORDER = "regions_class_order"
_OWN_KEYS = ("dataset", "numTraining", "patients")
# Of a preprocessed case, the one that says that it is whole last (engine/preprocessed.py).
_PARTS = (".npy", "_seg.npy", "_locations.npz", ".json")


def refuse_other_task(known: DatasetJson, other: DatasetJson, *, what: str) -> None:
    """Raises DatasetInvalid when `other` has other labels, channels or file format: no weights can be kept then."""
    pairs: tuple[tuple[str, Any, Any], ...] = (
        ("labels", known.document["labels"], other.document["labels"]),
        (_ORDER, known.document.get(_ORDER), other.document.get(_ORDER)),
        ("channels", list(known.channel_names), list(other.channel_names)),
    )
    for name, then, now in pairs:
        if then != now:
            raise DatasetInvalid(
                f"{what}: {DATASET_JSON}: {name} are {_short(now)}, the model's are {_short(then)}. A model with other "
                "labels or channels is a MAJOR version: train it anew, with all cases"
            )
    for name, then, now in (
        ("file_ending", known.file_ending, other.file_ending),
        ("the reader of images", known.image_reader_writer, other.image_reader_writer),
    ):
        if then != now:
            raise DatasetInvalid(f"{what}: {DATASET_JSON}: {name} is {now}, the model's {then}; convert the files")


def refuse_same_names(old: RawDataset, new: RawDataset) -> None:
    """Raises DatasetInvalid, naming a case that both have."""
    known = {case.name for case in (*old.cases, *old.excluded)}
    both = [case.name for case in new.cases if case.name in known]
    if both:
        raise DatasetInvalid(
            f"{new.name}: {both[0]} is the name of a case of {old.name} too ({len(both)} such): give new cases "
            "names of their own"
        )


def join_raw(old: RawDataset, new: RawDataset | None, folder: Path) -> RawDataset:
    """Both datasets' cases in `folder`, or the old one's alone; what is there already is left. Raises DatasetInvalid
    when files are missing, TrainingRefused when `folder` has other cases, OSError."""
    ending = old.json.file_ending
    cases = (*old.cases, *(new.cases if new is not None else ()))
    wanted = {f"{case.name}{ending}" for case in cases}
    for sub in (IMAGES, LABELS):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    others = sorted(
        path.name
        for path in (folder / LABELS).glob(f"*{ending}")
        if not path.name.startswith(".") and path.name not in wanted
    )
    if others:
        raise TrainingRefused(
            f"{folder}: holds the cases of another fine-tuning ({others[0].removesuffix(ending)}, {len(others)} such); "
            "choose another --results"
        )
    for case in cases:
        for source, target in _files(case, folder, ending):
            _take_over(source, target, case)
    document = {key: value for key, value in old.json.document.items() if key not in _OWN_KEYS}
    patients = _patients(old, new)
    write_json(
        {**document, "numTraining": len(cases), **({"patients": patients} if patients else {})}, folder / DATASET_JSON
    )
    return open_dataset(folder)


def link_preprocessed(names: Sequence[str], source: Path, target: Path) -> int:
    """Takes over the preprocessed cases of `source` that `target` lacks; returns how many. Whether they are still those
    of their images is for `preprocess_dataset` to see, which makes others anew."""
    target.mkdir(parents=True, exist_ok=True)
    taken = 0
    for name in names:
        files = [(source / f"{name}{part}", target / f"{name}{part}") for part in _PARTS]
        if files[-1][1].exists() or not all(path.is_file() for path, _ in files):
            continue
        for path, link in files:
            _link(path, link)
        taken += 1
    return taken


def _files(case: Case, folder: Path, ending: str) -> list[tuple[Path, Path]]:
    images = [(path, folder / IMAGES / f"{case.name}_{index:04}{ending}") for index, path in case.channels.items()]
    return [*images, (case.label, folder / LABELS / f"{case.name}{ending}")]


def _take_over(source: Path, target: Path, case: Case) -> None:
    try:
        now = source.stat()
    except FileNotFoundError as error:
        raise DatasetInvalid(
            f"{case.name}: {source.name} is not there; `seggate dataset check` lists what is"
        ) from error
    if target.exists():
        there = target.stat()
        if (there.st_size, there.st_mtime_ns) == (now.st_size, now.st_mtime_ns):
            return
    _link(source, target)


def _link(source: Path, target: Path) -> None:
    with whole_file(target) as made:
        try:
            os.link(source.resolve(), made)
        except OSError:  # another disk, or another user's file
            shutil.copy2(source, made)


def _patients(old: RawDataset, new: RawDataset | None) -> Mapping[str, str]:
    both = [old] if new is None else [old, new]
    used = {case.name for dataset in both for case in dataset.cases}
    return {case: who for dataset in both for case, who in dataset.json.patients.items() if case in used}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
