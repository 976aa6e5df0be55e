"""Image files → cases, by nnU-Net's names: CASE_0000.nii.gz is the first channel of CASE (nnU-Net v2)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.errors import InputRejected
from engine.manifest import Contract
from engine.nifti import read_geometry, read_itk_grid, read_nifti, read_spacing_mm, write_labels_like
from engine.volume import Geometry, LabelMap, Volume, reorientation
from gateway.prediction.request import UsageRefused

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
"""What is read here; the longest that fits is a file's ending."""

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True, kw_only=True)
class FileCase:
    """One file per channel, in channel order; `fault` says what is wrong with their names, None where nothing is. See
    gateway.prediction.cases.Case."""

    name: str
    files: tuple[Path, ...]
    ending: str
    fault: str | None = None

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size if path.is_file() else 0 for path in self.files)

    @property
    def source(self) -> Mapping[str, Any]:
        return MappingProxyType({"images": [str(path) for path in self.files]})

    def geometry(self) -> Geometry:
        if self.fault is not None:
            raise InputRejected(self.fault)
        return read_geometry(self.files[0])

    def doubts(self, contract: Contract) -> list[str]:
        """Spacings are told and run, as in nnU-Net; a file does not say its modality."""
        spacing = reorientation(self.geometry(), contract.orientation).target.spacing_mm
        limits = zip(contract.spacing_min_mm, spacing, contract.spacing_max_mm, strict=True)
        if all(0.999 * low <= value <= 1.001 * high for low, value, high in limits):
            return []
        text = " x ".join(f"{value:.4g}" for value in spacing)
        return [f"its spacing ({text} mm: z, y, x) is outside what the model is meant for"]

    def read(self) -> Volume:
        return read_nifti(self.files)

    def write_labels(self, labels: LabelMap, path: Path) -> None:
        write_labels_like(labels, self.files[0], path)

    def grid_properties(self) -> Mapping[str, Any]:
        spacing, origin, direction = read_itk_grid(self.files[0])
        return {
            "spacing": list(read_spacing_mm(self.files[0])),
            "sitk_stuff": {"spacing": list(spacing), "origin": list(origin), "direction": list(direction)},
        }


def ending_of(path: Path) -> str | None:
    """None for a file that is not read here."""
    return next((ending for ending in ENDINGS if path.name.casefold().endswith(ending)), None)


def cases_in_folder(folder: Path, *, ending: str, channels: int) -> tuple[list[FileCase], list[str]]:
    """The cases of a folder, sorted by name, and what is left out, in words.

    `ending` is dataset.json's; where no file has it, the one other that files here have. No cases where there are no
    image files at all. Raises UsageRefused where none of them is named as nnU-Net names them, or where they have
    several endings and none is the dataset's.
    """
    images = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and ending_of(path) is not None
    )
    there = {ending_of(path) for path in images}
    if not images:
        return [], []
    chosen = ending if ending in there else None
    if chosen is None:
        if len(there) > 1:
            raise UsageRefused(
                f"{folder}: has files {', '.join(sorted(filter(None, there)))} and none {ending}, which the model was "
                "trained on; give the files themselves to -i"
            )
        chosen = str(next(iter(there)))
    own = [path for path in images if ending_of(path) == chosen]
    found: dict[str, dict[int, Path]] = {}
    unnamed = 0
    for path in own:
        match = _CHANNEL.fullmatch(_stem(path, chosen))
        if match is None:
            unnamed += 1
        else:
            found.setdefault(match["case"], {})[int(match["channel"])] = path
    if not found:
        raise UsageRefused(
            f"{folder}: no file is named CASE_0000{chosen} as nnU-Net names them; rename them, or give the files "
            "themselves to -i"
        )
    notes = [f"{unnamed} files are not named CASE_0000{chosen} and are left out"] if unnamed else []
    cases = [
        FileCase(
            name=name,
            files=tuple(path for _, path in sorted(found[name].items())),
            ending=chosen,
            fault=_missing(sorted(found[name]), channels),
        )
        for name in sorted(found)
    ]
    return cases, notes


def _missing(there: Sequence[int], channels: int) -> str | None:
    if list(there) == list(range(channels)):
        return None
    return f"channels {', '.join(f'{index:04}' for index in there)}; the model takes {channels}, from 0000 on"


def cases_of_files(files: Sequence[Path], *, channels: int, name: str | None) -> list[FileCase]:
    """The cases that given files make: by nnU-Net's names where all have them; else each file is one for a model with
    one channel, and all files are one, in channel order, for a model with as many.

    Raises UsageRefused for what cannot be told, InputRejected for a file of a kind that is not read.
    """
    for path in files:
        if ending_of(path) is None:
            raise InputRejected(f"{path.name}: is no image that is read here ({', '.join(ENDINGS)}, or a DICOM folder)")
    named = [_named(path) for path in files]
    if all(named) and (channels > 1 or all(match and match["channel"] == "0000" for match in named)):
        grouped: dict[tuple[Path, str], dict[int, Path]] = {}
        for path, match in zip(files, named, strict=True):
            if match is not None:
                grouped.setdefault((path.parent, match["case"]), {})[int(match["channel"])] = path
        cases = [
            _case(case, [path for _, path in sorted(paths.items())], _missing(sorted(paths), channels))
            for (_, case), paths in grouped.items()
        ]
    elif channels == 1:
        cases = [_case(_stem(path, str(ending_of(path))), [path]) for path in files]
    elif len(files) == channels:
        cases = [_case(_stem(files[0], str(ending_of(files[0]))), list(files))]
    else:
        raise UsageRefused(
            f"the model takes {channels} channels and {len(files)} files were given; name them CASE_0000, CASE_0001, "
            "... or give the files of one case in channel order"
        )
    if name is not None:
        if len(cases) != 1:
            raise UsageRefused(f"--name is for one case, and there are {len(cases)}")
        cases = [replace(cases[0], name=name)]
    twice = {case.name for case in cases if sum(other.name == case.name for other in cases) > 1}
    if twice:
        raise UsageRefused(f"two cases would be written as {sorted(twice)[0]}; give them in two calls")
    return sorted(cases, key=lambda case: case.name)


def _case(name: str, files: Sequence[Path], fault: str | None = None) -> FileCase:
    return FileCase(name=name, files=tuple(files), ending=str(ending_of(files[0])), fault=fault)


def _named(path: Path) -> re.Match[str] | None:
    ending = ending_of(path)
    return None if ending is None else _CHANNEL.fullmatch(_stem(path, ending))


def _stem(path: Path, ending: str) -> str:
    return path.name[: -len(ending)]
