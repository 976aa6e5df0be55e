"""Integrity of a raw dataset: everything that is wrong with it, found in one pass, each with its cause and remedy.

An error would fail in preprocessing or teach the network something false. A warning may be meant so. Where nnU-Net
decides otherwise, `engine.dataset.grid_difference` says so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import MappingProxyType

from engine.dataset import (
    DATASET_JSON,
    Case,
    DatasetJson,
    RawDataset,
    count_labels,
    grid_difference,
    open_dataset,
    undeclared_labels,
    unused_files,
)
from engine.errors import DatasetInvalid, InputRejected, NotFinite
from engine.exclusions import EXCLUSIONS_JSON, Exclusion
from engine.nifti import narrowed, read_nifti, read_whole_numbers
from engine.parallel import Progress, map_cases
from engine.sides import ONE_ORIENTATION, has_sides, lateral_direction, paired_labels, unpaired_labels
from engine.splits import KEEPS_PATIENTS_TOGETHER, SPLITS_JSON, Split, mixed_patients, read_splits
from engine.volume import AS_STORED, Geometry, LabelMap

_NNUNET_NAME = re.compile(r"Dataset\d{3}_.+")
_AXES = ("z", "y", "x")
_MOST_NAMED = 10


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"


_ERROR, _WARNING = Severity.ERROR, Severity.WARNING

# Every kind of finding: how grave it is, and what to do.
KINDS: Mapping[str, tuple[Severity, str]] = MappingProxyType(
    {
        "dataset-json": (_ERROR, "correct dataset.json or the folder, then check again: the rest was not looked at"),
        "dataset-name": (_WARNING, "rename the folder to DatasetNNN_Name where nnU-Net's own commands shall find it"),
        "num-training": (_ERROR, "set numTraining in dataset.json to the number of cases, or restore the missing ones"),
        "file-name": (_ERROR, "name it CASE_0000 with the dataset's ending, or move it out of imagesTr"),
        "label-without-image": (_WARNING, "add the image, or move the label map away: it is not used"),
        "duplicate-case": (_ERROR, "list every file under one case only"),
        "duplicate-name": (_WARNING, "rename one: on some file systems they are one file"),
        "duplicate-image": (_WARNING, "remove one: a copy in training and validation makes the validation too good"),
        "unknown-patient-case": (_WARNING, "correct the case's name under `patients` in dataset.json"),
        "unknown-excluded-case": (_WARNING, "correct the case's name: `seggate dataset exclude CASE --undo`"),
        "mixed-patients": (_WARNING, KEEPS_PATIENTS_TOGETHER),
        "splits": (_ERROR, "correct splits_final.json, or remove it so that a new one is made"),
        "channel-count": (_ERROR, "give every case one file per channel, CASE_0000 and on, as channel_names says"),
        "missing-image": (_ERROR, "restore the file, or correct its path in dataset.json"),
        "missing-label": (_ERROR, "add the label map, or move the case's images out of imagesTr"),
        "unreadable": (_ERROR, "export the file again from its source"),
        "not-finite": (_ERROR, "replace NaN and infinity by a value that means something for this kind of image"),
        "unexpected-label": (_ERROR, "correct the label map, or declare the value under `labels` in dataset.json"),
        "grid": (
            _ERROR,
            "resample label and channels onto the grid of the case's first image",
        ),
        "position": (
            _WARNING,
            "make sure that label and image overlap: voxels are matched by index, as in nnU-Net",
        ),
        "all-zero": (_ERROR, "remove the case, or export its image again"),
        "constant-image": (_WARNING, "export it again if it should show something: nothing can be learnt from it"),
        "empty-foreground": (_WARNING, "keep it only if nothing is to be found in this image; it teaches background"),
        "orientation": (_WARNING, f"the network then learns every one of them, with less of each. {ONE_ORIENTATION}"),
        "mixed-sides": (_ERROR, f"a network cannot know which side is which. {ONE_ORIENTATION}"),
        "unpaired-side": (
            _WARNING,
            "so nothing is mirrored from side to side; name its other side alike, or state `pairs` in dataset.json "
            "([]: no label is a side)",
        ),
        "thin-volume": (_WARNING, "remove the case if it is no 2D image: a single slice has no context to learn from"),
        "flat-dataset": (_WARNING, "expected for 2D images; otherwise export the whole volumes"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong. `case` and `file` (its name) are None where it concerns the whole dataset."""

    kind: str
    cause: str
    case: str | None = None
    file: str | None = None

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind][0]

    @property
    def remedy(self) -> str:
        return KINDS[self.kind][1]


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All findings, those of the whole dataset first, then by case; `num_cases` is how many were read. Excluded cases
    are not."""

    num_cases: int
    findings: tuple[Finding, ...]
    excluded: tuple[Exclusion, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether there is no error; warnings are allowed."""
        return all(finding.severity is not Severity.ERROR for finding in self.findings)


def check_dataset(
    folder: Path, *, processes: int, planned: Path | None = None, progress: Progress | None = None
) -> CheckReport:
    """Reads every file of the dataset. `planned`: <preprocessed>/<name>, whose folds were made with the patients that
    were stated then; absent where nothing is planned yet. What is wrong with the dataset is in the report and is not
    raised; WorkerDied is, when memory runs out."""
    try:
        dataset = open_dataset(folder)
        findings = [*_check_names(dataset), *_check_references(dataset), *_check_patients(dataset, planned)]
    except DatasetInvalid as error:
        return CheckReport(num_cases=0, findings=(Finding(kind="dataset-json", cause=str(error)),))
    check = partial(_check_case, dataset_json=dataset.json)
    seen = map_cases(check, dataset.cases, processes=processes, progress=progress)
    findings += _check_copies(dataset, seen)
    findings += _check_orientations(dataset, seen)
    if all(case.thin for case in seen):
        findings.append(Finding(kind="flat-dataset", cause="every volume is one voxel thin: 2D is all that is planned"))
    for case in seen:
        findings += case.findings
        if case.thin and not all(other.thin for other in seen):
            findings.append(Finding(kind="thin-volume", case=case.name, cause=f"one voxel along {case.thin}"))
    excluded = tuple(dataset.exclusions[case.name] for case in dataset.excluded)
    return CheckReport(num_cases=len(dataset.cases), findings=tuple(findings), excluded=excluded)


def _check_names(dataset: RawDataset) -> Iterable[Finding]:
    if not _NNUNET_NAME.fullmatch(dataset.name):
        yield Finding(kind="dataset-name", cause=f"the folder {dataset.name} is not called DatasetNNN_Name")
    # Excluded cases count: nnU-Net compares numTraining with the files, and does not know exclusions.json.
    stated, found = (n + len(dataset.excluded) for n in (dataset.json.num_training, len(dataset.cases)))
    if stated != found:
        cause = f"numTraining is {stated}, {found} cases were found"
        yield Finding(kind="num-training", cause=cause, file=DATASET_JSON)
    images, labels = unused_files(dataset)
    for path in images:
        yield Finding(kind="file-name", cause="is not named CASE_0000, CASE_0001, ...", file=path.name)
    for path in labels:
        yield Finding(kind="label-without-image", cause="no image belongs to it", file=path.name)
    lower: dict[str, str] = {}
    for case in (*dataset.cases, *dataset.excluded):
        first = lower.setdefault(case.name.casefold(), case.name)
        if first != case.name:
            yield Finding(kind="duplicate-name", case=case.name, cause=f"differs from {first} in capital letters only")


def _check_references(dataset: RawDataset) -> Iterable[Finding]:
    """Explicit lists may name a file twice; `patients` and splits_final.json may name cases that are not there, `pairs`
    labels."""
    paired_labels(dataset.json)
    for name in unpaired_labels(dataset.json):
        cause = f"the label {name!r} says left or right, and no label is its other side"
        yield Finding(kind="unpaired-side", file=DATASET_JSON, cause=cause)
    used: dict[Path, str] = {}
    for case in dataset.cases:
        for path in (*case.channels.values(), case.label):
            if path.resolve() in used:
                cause = f"is already a file of {used[path.resolve()]}"
                yield Finding(kind="duplicate-case", case=case.name, file=path.name, cause=cause)
            used.setdefault(path.resolve(), case.name)
    names = {case.name for case in dataset.cases}
    there = names | {case.name for case in dataset.excluded}
    for name in dataset.exclusions:
        if name not in there:
            cause = f"{name} is excluded, which is no case"
            yield Finding(kind="unknown-excluded-case", file=EXCLUSIONS_JSON, cause=cause)
    for name in dataset.json.patients:
        if name not in there:
            cause = f"`patients` names {name}, which is no case"
            yield Finding(kind="unknown-patient-case", file=DATASET_JSON, cause=cause)
    splits = dataset.folder / SPLITS_JSON
    if splits.exists():
        try:
            read_splits(splits, sorted(names), excluded=dataset.excluded_names)
        except DatasetInvalid as error:
            yield Finding(kind="splits", file=SPLITS_JSON, cause=str(error))


def _check_patients(dataset: RawDataset, planned: Path | None) -> Iterable[Finding]:
    """The folds that are trained: those of the plans, or else the dataset's own."""
    path = dataset.folder / SPLITS_JSON if planned is None or not planned.is_dir() else planned / SPLITS_JSON
    splits: tuple[Split, ...] = ()
    # Folds of cases that are gone end `plan` and `train`, with names; the dataset is no worse for them.
    with suppress(DatasetInvalid):
        splits = read_splits(path, [case.name for case in dataset.cases], excluded=dataset.excluded_names)
    mixed = mixed_patients(splits, dataset.json.patients)
    if mixed is not None:
        yield Finding(kind="mixed-patients", file=SPLITS_JSON, cause=mixed)


@dataclass(frozen=True, kw_only=True)
class _CheckedCase:
    """`thin`: names of the axes with one voxel. `orientation`: of its first image; None when that cannot be read.
    `digest`: of the image's values; None when not all can be read."""

    name: str
    findings: tuple[Finding, ...]
    thin: str
    orientation: str | None
    digest: str | None


def _check_orientations(dataset: RawDataset, seen: list[_CheckedCase]) -> Iterable[Finding]:
    if dataset.json.orientation != AS_STORED:
        return
    cases: dict[str, list[str]] = {}
    for case in seen:
        if case.orientation is not None:
            cases.setdefault(case.orientation, []).append(case.name)
    if len(cases) < 2:
        return
    differs = len({lateral_direction(code) for code in cases}) > 1
    kind = "mixed-sides" if differs and has_sides(dataset.json) else "orientation"
    described = (
        f"{code} in {len(names)} ({', '.join(names[:_MOST_NAMED])}{' and more' if len(names) > _MOST_NAMED else ''})"
        for code, names in cases.items()
    )
    yield Finding(kind=kind, cause=f"the cases' voxels do not run in the same directions: {'; '.join(described)}")


def _check_copies(dataset: RawDataset, seen: list[_CheckedCase]) -> Iterable[Finding]:
    first: dict[str, str] = {}
    for case, checked in zip(dataset.cases, seen, strict=True):
        if checked.digest is None:
            continue
        other = first.setdefault(checked.digest, case.name)
        if other != case.name:
            yield Finding(kind="duplicate-image", case=case.name, cause=f"the image is that of {other}, value by value")


def _check_case(case: Case, *, dataset_json: DatasetJson) -> _CheckedCase:
    """All that is wrong with one case. Each file is read whatever is wrong with the others."""
    findings: list[Finding] = []
    wanted = len(dataset_json.channel_names)
    if list(case.channels) != list(range(wanted)):
        found = ", ".join(f"{index:04}" for index in case.channels)
        cause = f"channels {found}; channel_names has {wanted}, from 0000 on"
        findings.append(Finding(kind="channel-count", case=case.name, cause=cause))
    grid: Geometry | None = None
    digest = hashlib.blake2b(digest_size=16)
    read = 0
    all_zero = True
    for path in case.channels.values():
        if not path.is_file():
            findings.append(Finding(kind="missing-image", case=case.name, file=path.name, cause="is not there"))
            continue
        try:
            volume = read_nifti([path])
        except (InputRejected, OSError, MemoryError, ValueError) as error:
            findings.append(_unreadable(case, path, error))
            continue
        if grid is None:
            grid = volume.geometry
        else:
            findings += _compared(case, path, grid, volume.geometry)
        read += 1
        digest.update(volume.array.data)
        all_zero = all_zero and not volume.array.any()
        low, high = float(volume.array.min()), float(volume.array.max())
        if low == high != 0:
            cause = f"every voxel of the image is {low:g}"
            findings.append(Finding(kind="constant-image", case=case.name, file=path.name, cause=cause))
    if read and all_zero:
        findings.append(Finding(kind="all-zero", case=case.name, cause="every voxel of the image is 0"))
    labels = _read_labels(case, findings)
    if labels is not None:
        if grid is not None:
            findings += _compared(case, case.label, grid, labels.geometry)
        findings += _check_values(case, labels, dataset_json)
    shape = grid.shape if grid is not None else labels.geometry.shape if labels is not None else ()
    thin = " and ".join(axis for axis, edge in zip(_AXES, shape, strict=False) if edge == 1)
    return _CheckedCase(
        name=case.name,
        findings=tuple(findings),
        thin=thin,
        orientation=None if grid is None else grid.orientation,
        digest=digest.hexdigest() if read == len(case.channels) else None,
    )


def _read_labels(case: Case, findings: list[Finding]) -> LabelMap | None:
    if not case.label.is_file():
        findings.append(Finding(kind="missing-label", case=case.name, file=case.label.name, cause="is not there"))
        return None
    try:
        return read_whole_numbers(case.label)
    except (InputRejected, OSError, MemoryError, ValueError) as error:
        findings.append(_unreadable(case, case.label, error))
        return None


def _unreadable(case: Case, path: Path, error: Exception) -> Finding:
    # A header that claims an absurd size ends in MemoryError.
    cause = str(error).removeprefix(f"{path.name}: ") or type(error).__name__
    kind = "not-finite" if isinstance(error, NotFinite) else "unreadable"
    return Finding(kind=kind, case=case.name, file=path.name, cause=cause)


def _compared(case: Case, path: Path, grid: Geometry, other: Geometry) -> Iterable[Finding]:
    difference = grid_difference(grid, other)
    if difference is not None:
        kind = "grid" if difference.is_error else "position"
        yield Finding(kind=kind, case=case.name, file=path.name, cause=difference.text)


def _check_values(case: Case, labels: LabelMap, dataset_json: DatasetJson) -> Iterable[Finding]:
    manager = dataset_json.labels
    if unexpected := undeclared_labels(labels, manager):
        yield Finding(kind="unexpected-label", case=case.name, file=case.label.name, cause=unexpected)
    elif not any(value not in (0, manager.ignore_label) for value in count_labels(narrowed(labels))):
        yield Finding(kind="empty-foreground", case=case.name, file=case.label.name, cause="holds no foreground label")
