"""What -i names → cases: a folder in nnU-Net's layout, a folder of DICOM series, or files of either kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.dataset import is_read_here
from gateway.prediction.cases import Case
from gateway.prediction.file_cases import FileCase, cases_in_folder, cases_of_files, ending_of
from gateway.prediction.model import ChosenModel
from gateway.prediction.request import PredictRequest, UsageRefused


@dataclass(frozen=True, kw_only=True)
class FoundCases:
    """`faults`: what could not even become a case, as (what, why). `notes`: what was left out, in words."""

    cases: Sequence[Case] = ()
    faults: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


def find_cases(request: PredictRequest, model: ChosenModel) -> FoundCases:
    """All cases of the input that are this call's part, sorted by name.

    Raises UsageRefused where there is none, or it cannot be told what is one; InputRejected, OSError.
    """
    found = _all_cases(request, model)
    if not found.cases and not found.faults:
        raise UsageRefused("-i: there is nothing to predict")
    mine = sorted(found.cases, key=lambda case: case.name)[request.part_id :: request.num_parts]
    return replace(found, cases=mine, faults=found.faults if request.part_id == 0 else ())


def _all_cases(request: PredictRequest, model: ChosenModel) -> FoundCases:
    for path in request.inputs:
        if not path.exists():
            raise UsageRefused(f"-i {path}: there is no such file or folder")
    folders = [path for path in request.inputs if path.is_dir()]
    if folders and len(request.inputs) > 1:
        raise UsageRefused("-i: one folder, or one or more files")
    channels = len(model.bundle.channels)
    if folders:
        cases, notes = cases_in_folder(folders[0], ending=model.file_ending, channels=channels)
        if cases:
            return FoundCases(cases=_files(_named(cases, request), request, model), notes=notes)
        return _series(request, model)
    if all(ending_of(path) is None and _is_dicom(path) for path in request.inputs):
        return _series(request, model)
    return FoundCases(
        cases=_files(cases_of_files(request.inputs, channels=channels, name=request.name), request, model)
    )


def _files(cases: Sequence[FileCase], request: PredictRequest, model: ChosenModel) -> Sequence[FileCase]:
    if request.wants_seg:
        raise UsageRefused(
            f"--format {request.format}: a DICOM Segmentation refers to DICOM images, and these are other files"
        )
    reader = str(model.plans_json.get("image_reader_writer", ""))
    if reader and not is_read_here(reader):
        raise UsageRefused(
            f"the model was trained on {model.file_ending} by nnU-Net's {reader}, whose files are not read here"
        )
    return cases


def _named(cases: Sequence[FileCase], request: PredictRequest) -> Sequence[FileCase]:
    if request.name is None:
        return cases
    if len(cases) != 1:
        raise UsageRefused(f"--name is for one case, and there are {len(cases)}")
    return [replace(cases[0], name=request.name)]


def _is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's preamble (PS3.10 7.1)."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _series(request: PredictRequest, model: ChosenModel) -> FoundCases:
    # pydicom and what reads series are of no use to those who bring NIfTI.
    from gateway.prediction.series_cases import series_in_folder, series_of_files

    channels, first = len(model.bundle.channels), request.inputs[0]
    if first.is_dir():
        found = series_in_folder(first, channels=channels, name=request.name)
    else:
        found = series_of_files(request.inputs, channels=channels, name=request.name)
    if not found.cases and not found.faults:
        raise UsageRefused(
            f"-i {first}: no image is here: neither CASE_0000{model.file_ending} as nnU-Net names its files, nor DICOM"
        )
    if not model.knows_orientation:
        raise UsageRefused(
            "nnU-Net does not record in which voxel order a model was trained, and a DICOM series may be stored in "
            "another: left would become right. Look at the affine of the training images and give --orientation, such "
            "as RAS or LPS (or as-stored, where it was trained on voxels in the order of such series)"
        )
    return FoundCases(cases=found.cases, faults=found.faults, notes=found.notes)
