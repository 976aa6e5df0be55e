"""Reads result objects with programs others wrote: dcmqi, DCMTK, dicom3tools."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from engine.volume import Geometry
from tests.support.peers import program


def run(*command: str) -> str:
    """Standard output of a program that must succeed."""
    done = subprocess.run(command, capture_output=True, timeout=120)
    out, err = (raw.decode("utf-8", "replace") for raw in (done.stdout, done.stderr))
    assert done.returncode == 0, f"{Path(command[0]).name}: {err[-2000:]}"
    return out


def iod_errors(path: Path) -> list[str]:
    """The lines dciodvfy calls errors; fails when it did not recognise the object at all."""
    done = subprocess.run([program("dciodvfy"), str(path)], capture_output=True, timeout=120)
    lines = (done.stdout + done.stderr).decode("utf-8", "replace").splitlines()
    assert lines, "dciodvfy said nothing"
    return [line for line in lines if line.startswith("Error")]


def patient_masks(path: Path, folder: Path) -> dict[int, tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """dcmqi segimage2itkimage: segment number → mask (Z, Y, X) and its own affine (LPS, takes x, y, z, 1)."""
    folder.mkdir(parents=True, exist_ok=True)
    run(
        program("segimage2itkimage"),
        *("--inputDICOM", str(path), "--outputDirectory", str(folder), "--outputType", "nrrd"),
    )
    masks: dict[int, tuple[NDArray[np.bool_], NDArray[np.float64]]] = {}
    for file in sorted(folder.glob("*.nrrd")):
        image = sitk.ReadImage(str(file))
        affine = np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
        affine[:3, 3] = image.GetOrigin()
        array = sitk.GetArrayFromImage(image)
        for value in np.unique(array[array > 0]):
            masks[int(value)] = (array == value, affine)
    return masks


def on_source_grid(mask: NDArray[np.bool_], affine: NDArray[np.float64], geometry: Geometry) -> NDArray[np.bool_]:
    """A mask that lies anywhere in the patient, voxel by voxel on the source grid; fails off the grid's centres."""
    z, y, x = np.nonzero(mask)
    points = affine @ np.stack([x, y, z, np.ones_like(x)]).astype(np.float64)
    indices = np.linalg.inv(geometry.affine_lps) @ points
    nearest = np.rint(indices[:3]).astype(int)
    assert np.abs(indices[:3] - nearest).max(initial=0.0) < 0.02, "voxels lie between the source's voxels"
    placed = np.zeros(geometry.shape, dtype=np.bool_)
    placed[nearest[2], nearest[1], nearest[0]] = True
    return placed


def measurement_report(path: Path, folder: Path) -> dict[str, Any]:
    """dcmqi tid1500reader: the report as JSON."""
    target = folder / f"{path.stem}.json"
    run(program("tid1500reader"), "--inputDICOM", str(path), "--outputMetadata", str(target))
    report: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return report


def shown_name(path: Path) -> str:
    """Patient's Name as DCMTK shows it in UTF-8."""
    line = run(program("dcmdump"), "+U8", "+P", "0010,0010", str(path)).strip()
    return line.partition("[")[2].rpartition("]")[0]
