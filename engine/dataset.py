"""nnU-Net's raw datasets: dataset.json, imagesTr, labelsTr (nnU-Net v2). Cases are listed, then read one
at a time.

    DatasetXXX_Name/
      dataset.json
      imagesTr/CASE_0000.nii.gz     one file per channel, four digits
      labelsTr/CASE.nii.gz

A key `dataset` in dataset.json ({case: {"images": [...], "label": "..."}}) replaces the two folders. The key `patients`
({case: patient}) is ours and ignored by nnU-Net: cases of one patient are kept together when a dataset is split. Cases
in exclusions.json (engine/exclusions.py) are not used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.errors import DatasetInvalid, ImportRefused, InputRejected
from engine.exclusions import Exclusion, read_exclusions
from engine.json_reader import Reader, read_json
from engine.labels import LabelManager
from engine.nifti import narrowed, read_nifti, read_spacing_mm, read_whole_numbers
from engine.volume import AS_STORED, Geometry, LabelMap, Volume, reorientation

DATASET_JSON = "dataset.json"
IMAGES = "imagesTr"
LABELS = "labelsTr"
MAX_CHANNELS = 256
_MOST_NAMED = 10

# The first of nnU-Net's readers that knows the ending; it goes into the plans.
_READER_OF_ENDING: Mapping[str, str] = MappingProxyType(
    {
        ".nii.gz": "SimpleITKIO",
        ".nrrd": "SimpleITKIO",
        ".mha": "SimpleITKIO",
        ".gipl": "SimpleITKIO",
        ".nii": "NibabelIO",
        ".png": "NaturalImage2DIO",
        ".bmp": "NaturalImage2DIO",
        ".tif": "NaturalImage2DIO",
        ".tiff": "Tiff3DIO",
    }
)
# nnU-Net's other readers take the spacing from elsewhere (TIFF) or have several values a pixel (PNG).
_READ_HERE = frozenset({"SimpleITKIO", "NibabelIO", "SimpleITKIOWithReorient", "NibabelIOWithReorient"})
_REORIENTED = "RAS"
_LABELS_OF = "_seg"
_CASE_FILE = r"(?P<case>.+)_(?P<channel>\d{4})"


@dataclass(frozen=True, kw_only=True)
class DatasetJson:
    """What dataset.json says. `document` is the file's content; `patients` is empty when it names none. An opened
    dataset's `num_training` is without the cases that are excluded."""

    document: Mapping[str, Any]
    channel_names: tuple[str, ...]
    labels: LabelManager
    num_training: int
    file_ending: str
    image_reader_writer: str
    patients: Mapping[str, str]

    @property
    def orientation(self) -> str:
        """The voxel order in which cases are read: as stored, or RAS where nnU-Net's reader reorients."""
        return _REORIENTED if self.image_reader_writer.endswith("WithReorient") else AS_STORED

    @property
    def num_label_entries(self) -> int:
        """Entries of `labels`, background and ignore included: the output channels of nnU-Net's memory estimate."""
        return len(self.document["labels"])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training case: `channels` are the image files found by channel index, ascending; none need exist."""

    name: str
    channels: Mapping[int, Path]
    label: Path


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """A dataset's folder with its cases, sorted by name as nnU-Net does (explicit lists: in the file's order).

    `excluded` are cases that are there and not used; `exclusions` says why, and may name cases that are gone."""

    folder: Path
    json: DatasetJson
    cases: tuple[Case, ...]
    excluded: tuple[Case, ...] = ()
    exclusions: Mapping[str, Exclusion] = field(default_factory=dict)

    @property
    def excluded_names(self) -> frozenset[str]:
        """Cases that splits and fingerprints made earlier may still name."""
        return frozenset(self.exclusions)

    @property
    def name(self) -> str:
        """As nnU-Net calls it: the folder's name."""
        return self.folder.resolve().name


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedCase:
    """A case in memory. `spacing_mm` is (z, y, x) as nnU-Net's reader gives it, without the noise of an affine."""

    name: str
    volume: Volume
    labels: LabelMap
    spacing_mm: tuple[float, float, float]


def read_dataset_json(path: Path) -> DatasetJson:
    """Raises DatasetInvalid with the key for whatever is missing, of the wrong type or contradictory."""
    document = read_json(path, error=DatasetInvalid)
    dataset = Reader(document, where=path.name, error=DatasetInvalid)
    key = "channel_names" if "channel_names" in dataset else "modality"
    if key not in dataset:
        raise dataset.fail("channel_names", 'is missing; it names the channels, for example {"0": "CT"}')
    channels = dataset.child(key)
    names = {index: channels.text(index) for index in channels.keys()}  # noqa: SIM118 - keys() checks each key
    if list(names) != [str(index) for index in range(len(names))] or not 1 <= len(names) <= MAX_CHANNELS:
        raise dataset.fail(key, f"keys must be 0, 1, 2, ... in this order, at most {MAX_CHANNELS}")
    ending = dataset.text("file_ending")
    patients = dataset.child("patients", {})
    try:
        labels = LabelManager.from_dataset_json(document)
    except ImportRefused as error:
        raise DatasetInvalid(str(error)) from error
    return DatasetJson(
        document=document,
        channel_names=tuple(names.values()),
        labels=labels,
        num_training=dataset.integer("numTraining", 1, 10**7),
        file_ending=ending,
        image_reader_writer=_reader_name(dataset, ending),
        patients={case: patients.text(case) for case in patients.keys()},  # noqa: SIM118
    )


def is_read_here(image_reader_writer: str) -> bool:
    """Whether files that this reader of nnU-Net reads are read here, alike."""
    return image_reader_writer in _READ_HERE


def open_dataset(folder: Path) -> RawDataset:
    """The dataset with the files that its cases need; no image is opened, and a file that is absent is no error yet.

    Cases in exclusions.json are set apart. Raises DatasetInvalid when dataset.json or exclusions.json is at fault, the
    file ending cannot be read here, there is no case, or files made from two cases would have one name.
    """
    dataset_json = read_dataset_json(folder / DATASET_JSON)
    if not is_read_here(dataset_json.image_reader_writer):
        raise DatasetInvalid(
            f"{DATASET_JSON}: file_ending: {dataset_json.file_ending} is not read here; convert the images to .nii.gz"
        )
    if "dataset" in dataset_json.document:
        cases = _explicit_cases(folder, dataset_json)
    else:
        cases = _cases_of_folders(folder, dataset_json)
    if not cases:
        raise DatasetInvalid(
            f"{IMAGES} holds no file CASE_0000{dataset_json.file_ending}; there is nothing to train on"
        )
    exclusions = read_exclusions(folder)
    used = tuple(case for case in cases if case.name not in exclusions)
    _check_file_names(used)
    excluded = tuple(case for case in cases if case.name in exclusions)
    if not used:
        raise DatasetInvalid(f"all {len(cases)} cases are excluded; there is nothing to train on")
    return RawDataset(
        folder=folder,
        json=replace(dataset_json, num_training=dataset_json.num_training - len(excluded)),
        cases=used,
        excluded=excluded,
        exclusions=exclusions,
    )


def unused_files(dataset: RawDataset) -> tuple[list[Path], list[Path]]:
    """Files with the dataset's ending that belong to no case: in imagesTr, and in labelsTr."""
    if "dataset" in dataset.json.document:
        return [], []
    cases = (*dataset.cases, *dataset.excluded)
    used = {path for case in cases for path in (*case.channels.values(), case.label)}
    images, labels = (
        [path for path in _files(folder, dataset.json.file_ending) if path not in used] if folder.is_dir() else []
        for folder in (dataset.folder / IMAGES, dataset.folder / LABELS)
    )
    return images, labels


def read_case(case: Case, dataset_json: DatasetJson) -> LoadedCase:
    """Reads the files of one case.

    Raises InputRejected with the names of case and file: a channel or the label is missing, a file cannot be read or
    holds NaN or infinity, or files do not lie on one grid (`grid_difference`). DatasetInvalid, with the values, for
    labels that dataset.json does not declare.
    """
    wanted = len(dataset_json.channel_names)
    if list(case.channels) != list(range(wanted)):
        found = ", ".join(f"{index:04}" for index in case.channels)
        raise InputRejected(f"{case.name}: channels {found}; the dataset has {wanted}, from 0000 on")
    try:
        volume = _read_channels(list(case.channels.values()))
        labels = read_whole_numbers(case.label)
        _check_grid(volume.geometry, labels.geometry, case.label)
        spacing = read_spacing_mm(case.channels[0])
    except InputRejected as error:
        raise type(error)(f"{case.name}: {error}") from error
    if unexpected := undeclared_labels(labels, dataset_json.labels):
        raise DatasetInvalid(
            f"{case.name}: {case.label.name}: {unexpected}; correct the label map, or declare the value under `labels` "
            f"in {DATASET_JSON}"
        )
    labels = narrowed(labels)
    # Where positions differ a little the label takes the image's: nnU-Net matches voxels by index.
    change = reorientation(volume.geometry, dataset_json.orientation)
    return LoadedCase(
        name=case.name,
        volume=Volume(array=change.apply(volume.array), geometry=change.target),
        labels=LabelMap(array=change.apply(labels.array), geometry=change.target),
        spacing_mm=(spacing[change.axes[0]], spacing[change.axes[1]], spacing[change.axes[2]]),
    )


def _read_channels(paths: Sequence[Path]) -> Volume:
    """All channels in one array; they may lie apart by what `grid_difference` lets pass."""
    first = read_nifti(paths[:1])
    if len(paths) == 1:
        return first
    array = np.empty((len(paths), *first.geometry.shape), dtype=np.float32)
    array[0] = first.array[0]
    for index, path in enumerate(paths[1:], start=1):
        channel = read_nifti([path])
        _check_grid(first.geometry, channel.geometry, path)
        array[index] = channel.array[0]
    return Volume(array=array, geometry=first.geometry)


def _check_grid(image: Geometry, other: Geometry, path: Path) -> None:
    difference = grid_difference(image, other)
    if difference is not None and difference.is_error:
        raise InputRejected(f"{path.name}: {difference.text}")


def count_labels(labels: LabelMap) -> dict[int, int]:
    """Voxels of each value that occurs, by ascending value."""
    voxels = np.zeros(int(labels.array.max()) + 1, dtype=np.int64)
    # Slice by slice: bincount makes 8 bytes of every voxel that it is given.
    for plane in labels.array:
        voxels += np.bincount(plane.ravel(), minlength=voxels.size)
    return {int(value): int(voxels[value]) for value in np.flatnonzero(voxels)}


def undeclared_labels(labels: LabelMap, declared: LabelManager) -> str:
    """The values that are neither declared nor the ignore label, with how many voxels each has; empty where there are
    none."""
    array, highest = labels.array, declared.highest_value  # declared values are 0, 1, 2, ... without gaps
    if int(array.min()) >= 0 and int(array.max()) <= highest:
        return ""
    values, counts = np.unique(array[(array < 0) | (array > highest)], return_counts=True)
    named = ", ".join(
        f"{value} in {n} voxel{'s' if n > 1 else ''}"
        for value, n in zip(values[:_MOST_NAMED].tolist(), counts.tolist(), strict=False)
    )
    more = f" and {len(values) - _MOST_NAMED} more" if len(values) > _MOST_NAMED else ""
    return f"label {named}{more}; declared are 0 to {highest}"


@dataclass(frozen=True, kw_only=True)
class GridDifference:
    """How one file of a case lies otherwise than its first image. An error: the voxels do not correspond."""

    is_error: bool
    text: str


def grid_difference(image: Geometry, other: Geometry) -> GridDifference | None:
    """None where both are one grid.

    Errors, as in nnU-Net: shape, and spacing beyond numpy's `allclose`. An error here and a warning there: axes that
    run in other patient directions, since a mirrored label is learnt without a word. A warning: the rest (origin,
    small rotation), because voxels are matched by index.
    """
    if image.shape != other.shape:
        return GridDifference(is_error=True, text=f"shape {other.shape} (z, y, x), the image has {image.shape}")
    if not np.allclose(other.spacing_mm, image.spacing_mm):
        return GridDifference(
            is_error=True, text=f"spacing {_mm(other.spacing_mm)} (z, y, x), the image has {_mm(image.spacing_mm)}"
        )
    if image.orientation != other.orientation:
        return GridDifference(
            is_error=True, text=f"axes run {other.orientation}, those of the image {image.orientation}"
        )
    if not image.same_grid(other):
        moved = np.linalg.norm(np.subtract(image.origin_mm, other.origin_mm))
        turned = np.degrees(np.arccos(np.clip((image.direction * other.direction).sum(axis=0), -1, 1))).max()
        return GridDifference(
            is_error=False, text=f"origin {moved:.3g} mm and axes {turned:.2g} degrees from the image's"
        )
    return None


def _mm(spacing: tuple[float, float, float]) -> str:
    return "x".join(f"{value:.6g}" for value in spacing) + " mm"


def _reader_name(dataset: Reader, ending: str) -> str:
    wanted = dataset.text_or_none("overwrite_image_reader_writer")
    if wanted not in (None, "None"):
        if wanted not in {*_READER_OF_ENDING.values(), *_READ_HERE}:
            raise dataset.fail("overwrite_image_reader_writer", f"{wanted[:80]!r} is not one of nnU-Net's readers")
        return wanted
    if ending.lower() not in _READER_OF_ENDING:
        raise dataset.fail("file_ending", f"{ending[:40]!r} is not one of {', '.join(_READER_OF_ENDING)}")
    return _READER_OF_ENDING[ending.lower()]


def _files(folder: Path, ending: str) -> list[Path]:
    """Plain files with this ending, sorted; files that a copying program hides (leading dot) are left out."""
    try:
        return sorted(p for p in folder.iterdir() if p.name.endswith(ending) and not p.name.startswith("."))
    except OSError as error:
        raise DatasetInvalid(f"{folder.name}: cannot be read: {error.strerror}") from error


def _cases_of_folders(folder: Path, dataset_json: DatasetJson) -> list[Case]:
    ending = dataset_json.file_ending
    pattern = re.compile(_CASE_FILE + re.escape(ending))
    found: dict[str, dict[int, Path]] = {}
    for path in _files(folder / IMAGES, ending):
        match = pattern.fullmatch(path.name)
        if match is not None:
            found.setdefault(match["case"], {})[int(match["channel"])] = path
    return [
        Case(name=name, channels=dict(sorted(found[name].items())), label=folder / LABELS / f"{name}{ending}")
        for name in sorted(found)
    ]


def _check_file_names(cases: Sequence[Case]) -> None:
    """A preprocessed case is CASE and CASE_seg, here and in nnU-Net."""
    names = {case.name for case in cases}
    for name in sorted(names):
        if f"{name}{_LABELS_OF}" in names:
            raise DatasetInvalid(
                f"the cases {name} and {name}{_LABELS_OF}: preprocessed, the labels of the one have the file name of "
                "the other's image; rename one of them"
            )


def _explicit_cases(folder: Path, dataset_json: DatasetJson) -> list[Case]:
    """Paths may hold environment variables and are relative to the dataset's folder."""
    listed = Reader(dataset_json.document, where=DATASET_JSON, error=DatasetInvalid).child("dataset")
    cases = []
    for name in listed.keys():  # noqa: SIM118
        # The name becomes a file name of everything that is made from the case.
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise listed.fail(name[:80], "a case's name must be fit for a file name")
        entry = listed.child(name)
        images = entry.texts("images", lengths=(1, MAX_CHANNELS))
        cases.append(
            Case(
                name=name,
                channels={i: folder / os.path.expandvars(path) for i, path in enumerate(images)},
                label=folder / os.path.expandvars(entry.text("label")),
            )
        )
    return cases
