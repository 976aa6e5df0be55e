"""Locked cases: labelled cases that no training sees, in nnU-Net's raw layout, by which versions are compared.

    LOCKED/
      dataset.json  imagesTr  labelsTr
      strata.json     optional: {case: stratum}, a stratum being a scanner, a site, ... of every case

Cases of the stratum `new`, or `new/NAME`, are of what a version is to learn; all others are the old test, on which a
version must not lose (backward transfer).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.bundle import Bundle
from engine.case_overlap import image_digest
from engine.dataset import Case, DatasetJson, LoadedCase, RawDataset, open_dataset, read_case
from engine.errors import DatasetInvalid
from engine.json_reader import Reader, read_json

STRATA_JSON = "strata.json"
NEW = "new"
_MAX_STRATUM = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class LockedDataset:
    """The folder as it is listed; no image was read. `strata` is empty where there is no strata.json."""

    dataset: RawDataset
    strata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class LockedCase:
    """`digest` changes with image, labels or grid; `image_digest` with the image's voxels alone, whatever their order
    (engine/case_overlap.py)."""

    case: Case
    stratum: str | None
    digest: str
    image_digest: str
    voxels: int

    @property
    def name(self) -> str:
        return self.case.name


@dataclass(frozen=True, kw_only=True)
class LockedCases:
    """All cases, each read once. `digest` changes with any of them, and not with their names."""

    json: DatasetJson
    cases: tuple[LockedCase, ...]
    digest: str

    def read(self, case: LockedCase) -> LoadedCase:
        """Raises InputRejected, and DatasetInvalid when it is not what it was when the cases were listed."""
        loaded = read_case(case.case, self.json)
        if _digest(loaded) != case.digest:
            raise DatasetInvalid(f"{case.name}: its files were changed meanwhile; examine again")
        return loaded


def is_new(stratum: str | None) -> bool:
    """Whether a stratum is of what a version is to learn."""
    return stratum is not None and (stratum == NEW or stratum.startswith(f"{NEW}/"))


def open_locked(folder: Path) -> LockedDataset:
    """Lists the cases. Raises DatasetInvalid when dataset.json or strata.json is at fault or there is no case."""
    dataset = open_dataset(folder)
    path = folder / STRATA_JSON
    if not path.exists():
        return LockedDataset(dataset=dataset, strata={})
    names = {case.name for case in dataset.cases}
    reader = Reader(read_json(path, error=DatasetInvalid), where=STRATA_JSON, error=DatasetInvalid)
    strata = {}
    for name in reader.keys():  # noqa: SIM118 - keys() checks each key
        stratum = reader.text(name)
        if len(stratum) > _MAX_STRATUM or not stratum.isprintable():
            raise reader.fail(name[:80], f"at most {_MAX_STRATUM} printable characters")
        if name not in names and name not in dataset.excluded_names:
            raise reader.fail(name[:80], "is no case of this dataset")
        strata[name] = stratum
    if missing := sorted(names - set(strata)):
        raise DatasetInvalid(f"{STRATA_JSON}: {missing[0]} has no stratum ({len(missing)} such); give every case one")
    return LockedDataset(dataset=dataset, strata=strata)


def read_locked(opened: LockedDataset, *, progress: Progress | None = None) -> LockedCases:
    """Reads every case once, for its digests. Raises InputRejected or DatasetInvalid with the case that is at fault."""
    found = []
    for number, case in enumerate(opened.dataset.cases, start=1):
        loaded = read_case(case, opened.dataset.json)
        found.append(
            LockedCase(
                case=case,
                stratum=opened.strata.get(case.name),
                digest=_digest(loaded),
                image_digest=image_digest([loaded.volume]),
                voxels=loaded.labels.array.size,
            )
        )
        if progress is not None:
            progress(number, len(opened.dataset.cases))
    lines = "".join(f"{digest}\n" for digest in sorted(case.digest for case in found))
    return LockedCases(json=opened.dataset.json, cases=tuple(found), digest=hashlib.sha256(lines.encode()).hexdigest())


def missing_files(cases: Collection[Case], channels: int) -> list[str]:
    """What the listed cases lack, a line each; nothing is opened."""
    found = []
    for case in cases:
        if list(case.channels) != list(range(channels)):
            there = ", ".join(f"{index:04}" for index in case.channels)
            found.append(f"{case.name}: channels {there}; the dataset has {channels}, from 0000 on")
        found += [
            f"{case.name}: {path.name} is missing"
            for path in (*case.channels.values(), case.label)
            if not path.is_file()
        ]
    return found


def misfit(dataset_json: DatasetJson, bundle: Bundle) -> str | None:
    """How labels or channels of a dataset differ from a model's; None where they are the same."""
    ours = {label.name: label.region for label in dataset_json.labels.foreground}
    theirs = {label.name: label.region for label in bundle.label_manager.foreground}
    if ours != theirs:
        return f"labels {_labels(ours)}; {bundle.name} {bundle.semver} has {_labels(theirs)}"
    channels = [channel.name for channel in bundle.channels]
    if list(dataset_json.channel_names) != channels:
        return (
            f"channels {', '.join(dataset_json.channel_names)}; {bundle.name} {bundle.semver} takes "
            f"{', '.join(channels)}"
        )
    return None


def _labels(labels: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} = {'+'.join(map(str, region))}" for name, region in labels.items())


def _digest(loaded: LoadedCase) -> str:
    geometry = loaded.volume.geometry
    found = hashlib.sha256()
    # + 0.0: no minus zero.
    affine = " ".join(f"{value:.3f}" for value in (np.round(geometry.affine_lps, 3) + 0.0).ravel())
    found.update(f"{loaded.volume.array.shape} {affine}\n".encode())
    for channel in loaded.volume.array:
        found.update(np.ascontiguousarray(channel, dtype="<f4").data)
    found.update(np.ascontiguousarray(loaded.labels.array, dtype="<u2").data)
    return found.hexdigest()
