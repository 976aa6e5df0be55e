"""Folders of DICOM studies with labels, as a group would have them: phantoms whose right answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from engine.nifti import read_label_map, read_nifti
from engine.volume import Geometry, LabelMap, Volume, reorientation
from gateway.cli import app
from gateway.results.segmentation import encode_segmentation
from tests.support.phantoms import Orientation, PhantomPatient, PhantomSeries, write_series
from tests.support.result_contents import content_of, part_of

NAME = "Dataset123_Phantom"
NAMES = {1: "left structure", 2: "right structure"}
_ORIENTATIONS: tuple[Orientation, ...] = ("axial", "sagittal", "axial-mirrored", "coronal", "axial-prone")


def write_study(folder: Path, index: int, *, patient: int | None = None, **series: Any) -> PhantomSeries:
    """A series whose orientation, order and content depend on `index`; `patient` by default the same number."""
    owner = index if patient is None else patient
    series = {
        "orientation": _ORIENTATIONS[index % len(_ORIENTATIONS)],
        "order": ("ascending", "reversed", "shuffled")[index % 3],
        "instance_numbers": "against",
        "seed": index,
        "patient": PhantomPatient(patient_id=f"SECRET-{owner:03}", name=f"Confidential^{owner}"),
    } | series
    return write_series(folder, **series)


def write_segmentation(path: Path, series: PhantomSeries, labels: NDArray[Any] | None = None, **content: Any) -> Path:
    """A SEG of ours with the segments of `NAMES`."""
    part = part_of(series.files)
    encoded = encode_segmentation(content_of(part, series.labels if labels is None else labels, **content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded.data)
    return path


def write_label_map(path: Path, series: PhantomSeries, code: str, labels: NDArray[Any] | None = None) -> Path:
    """The labels as NIfTI in another voxel order."""
    array = series.labels if labels is None else labels
    change = reorientation(Geometry(shape=array.shape, affine_lps=series.affine_lps), code)
    image = sitk.GetImageFromArray(change.apply(array))
    image.SetSpacing(change.target.spacing_mm[::-1])
    image.SetOrigin(change.target.origin_mm)
    image.SetDirection(change.target.direction.ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def convert(source: Path, out: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["dataset", "convert", str(source), str(out), "--processes", "1", *words])


def shown(result: Result, code: int = 0) -> Any:
    """The JSON document of a command that ended with this code."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return json.loads(result.stdout)


def case_of(out: Path, series: PhantomSeries) -> str:
    """The pseudonym of a series, by the private file."""
    document = json.loads((out.parent / f"{out.name}.identities.json").read_text())
    (name,) = (name for name, c in document["cases"].items() if c["series"][0] == series.series_instance_uid)
    return str(name)


def read_converted(out: Path, series: PhantomSeries, channel: int = 0) -> tuple[Volume, LabelMap]:
    """Image and labels of a case, from the dataset."""
    case = case_of(out, series)
    image = read_nifti([out / "imagesTr" / f"{case}_{channel:04}.nii.gz"])
    return image, read_label_map(out / "labelsTr" / f"{case}.nii.gz")


def expected(
    series: PhantomSeries, code: str = "LPS", labels: NDArray[Any] | None = None
) -> tuple[Geometry, NDArray[Any], NDArray[Any]]:
    """Grid, image and labels of a phantom in another voxel order."""
    geometry = Geometry(shape=series.array.shape, affine_lps=series.affine_lps)
    change = reorientation(geometry, code)
    wanted = series.labels if labels is None else labels
    return change.target, change.apply(series.array), change.apply(np.asarray(wanted))


def assert_converted(out: Path, series: PhantomSeries, code: str = "LPS", labels: NDArray[Any] | None = None) -> None:
    """Image and labels in the dataset are those of the phantom, voxel by voxel and in the same place."""
    grid, array, wanted = expected(series, code, labels)
    image, found = read_converted(out, series)
    assert image.geometry.same_grid(grid, tolerance_mm=0.01)
    assert image.geometry.orientation == code
    assert np.array_equal(image.array[0], array)
    assert found.geometry.same_grid(image.geometry, tolerance_mm=1e-4)
    assert np.array_equal(found.array, wanted)
