"""What `seggate predict` writes: per case label map, SEG and probabilities, and nnU-Net's files beside them.

Every file appears whole or not at all, and a case is done when all of its files are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import BundleInvalid
from engine.execution_plan import ExecutionPlan
from engine.json_reader import read_json
from engine.json_writer import write_json
from engine.whole_file import whole_file
from gateway.prediction.cases import Case
from gateway.prediction.model import ChosenModel
from gateway.prediction.request import PredictRequest, UsageRefused
from gateway.prediction.runner import Predicted

ARGUMENTS = "predict_from_raw_data_args.json"
_OWN = "seggate"
"""Key of ARGUMENTS that nnU-Net does not have."""


class Outputs:
    """The output folder of one call."""

    def __init__(self, request: PredictRequest, model: ChosenModel, plan: ExecutionPlan | None) -> None:
        self._request = request
        self._model = model
        self._inexact = None if plan is None or plan.is_exact else plan.summary
        self._folder = request.output

    def files(self, case: Case) -> tuple[Path, ...]:
        """All that is written for a case, in this order."""
        request, stem = self._request, case.name
        names = []
        if request.save_probabilities:
            names += [f"{stem}.npz", f"{stem}.properties.json"]
        if request.wants_seg:
            names.append(f"{stem}.seg.dcm")
        if request.wants_nifti:
            names.append(f"{stem}{case.ending}")
        return tuple(self._folder / name for name in names)

    def is_done(self, case: Case) -> bool:
        return all(path.is_file() for path in self.files(case))

    def begin(self, cases: Sequence[Case]) -> None:
        """Makes the folder and writes dataset.json, plans.json and the arguments into it, for nnU-Net's tools.

        Raises UsageRefused where a result would take the place of an image, or where predictions are to be continued
        that another model or other options made; OSError.
        """
        inputs = {path.resolve() for case in cases for path in case.files}
        for case in cases:
            for path in self.files(case):
                if path.resolve() in inputs:
                    raise UsageRefused(f"{path.name}: would be written over an image; choose another folder for -o")
        if self._folder.exists() and not self._folder.is_dir():
            raise UsageRefused(f"-o {self._folder}: is a file; results go into a folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        own = {
            **self._model.identity(),
            "mirroring": self._request.mirroring,
            "format": self._request.format,
            "execution": self._inexact,
        }
        if self._request.continue_prediction:
            self._check_continued(own)
        ending = cases[0].ending if cases else self._model.file_ending
        write_json({**self._model.bundle.dataset_json, "file_ending": ending}, self._folder / "dataset.json")
        write_json(dict(self._model.plans_json), self._folder / "plans.json")
        write_json({**self._arguments(cases), _OWN: {**own, "release": version("seggate")}}, self._folder / ARGUMENTS)

    def write(self, case: Case, predicted: Predicted) -> tuple[Path, ...]:
        """The files of one case. Raises Rejected, OSError."""
        paths = self.files(case)
        for path in paths:
            # Of an older result nothing is left beside a new one, should this be killed.
            path.unlink(missing_ok=True)
        for path in paths:
            if path.name.endswith(".npz"):
                with whole_file(path, keeps_ending=True) as partial:
                    np.savez_compressed(partial, probabilities=_probabilities(predicted))
            elif path.name.endswith(".properties.json"):
                write_json({**(predicted.properties or {}), **case.grid_properties()}, path)
            elif path.name.endswith(".seg.dcm"):
                self._write_seg(case, predicted, path)
            else:
                case.write_labels(predicted.labels, path)
        return paths

    def _write_seg(self, case: Case, predicted: Predicted, path: Path) -> None:
        from gateway.prediction.series_cases import SeriesCase

        if not isinstance(case, SeriesCase):
            raise UsageRefused("--format seg: a DICOM Segmentation refers to DICOM images, and the input is none")
        case.write_seg(
            predicted.labels,
            predicted.segments,
            self._model.bundle,
            path,
            encoding=self._request.seg_encoding,
            software_version=version("seggate"),
            created_at=datetime.now(UTC),
        )

    def _arguments(self, cases: Sequence[Case]) -> Mapping[str, Any]:
        """By nnU-Net's names. Where DICOM lies is not kept: names of its folders often are those of patients."""
        request = self._request
        from_files = bool(cases) and "images" in cases[0].source
        inputs = [str(path) for path in request.inputs] if from_files else None
        return {
            "list_of_lists_or_source_folder": inputs[0] if inputs is not None and len(inputs) == 1 else inputs,
            "output_folder_or_list_of_truncated_output_files": str(request.output),
            "save_probabilities": request.save_probabilities,
            "overwrite": not request.continue_prediction,
            "num_processes_preprocessing": request.ahead,
            "num_processes_segmentation_export": request.writers,
            "folder_with_segs_from_prev_stage": None,
            "num_parts": request.num_parts,
            "part_id": request.part_id,
        }

    def _check_continued(self, own: Mapping[str, Any]) -> None:
        """What nnU-Net itself wrote says nothing of its model, and is continued as nnU-Net would."""
        path = self._folder / ARGUMENTS
        if not path.is_file():
            return
        before = read_json(path, error=BundleInvalid).get(_OWN)
        if not isinstance(before, dict):
            return
        other = sorted(key for key, value in own.items() if before.get(key) != value)
        if other:
            raise UsageRefused(
                f"--continue_prediction: {self._folder} was begun with another {', '.join(other)}; choose another "
                "folder, or leave the option out to predict all again"
            )


def _probabilities(predicted: Predicted) -> Any:
    if predicted.probabilities is None:
        raise RuntimeError("probabilities were asked for and not kept")
    return predicted.probabilities
