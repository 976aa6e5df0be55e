"""A CT dataset in nnU-Net's raw format from the torso of the shared data, on three grids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SPACINGS_MM = {"thin": (1.5, 1.5, 1.5), "own": (3.0, 3.0, 3.0), "thick": (1.5, 1.5, 5.0)}  # x, y, z


def write_ct_set(
    folder: Path,
    shared_data: Path,
    *,
    spacings_mm: Mapping[str, tuple[float, float, float]] = SPACINGS_MM,
    whole: bool = False,
) -> Path:
    """A case for each spacing, by default `own` (3 mm), `thin` (1.5 mm) and `thick` (1.5 mm in the plane, slices of
    5 mm). The 61 labels become 4 by their remainder. Unless `whole`, the middle half of the volume is kept along x and
    y: enough air and body, a quarter of the time."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(shared_data / "dicom" / "ct-torso" / "series")))
    image = sitk.Cast(reader.Execute(), sitk.sitkFloat32)
    labels = sitk.ReadImage(str(shared_data / "nifti" / "totalsegmentator" / "example_seg_fast_force_split.nii.gz"))
    # On the image's grid, however the file's axes run.
    labels = sitk.Resample(sitk.Cast(labels, sitk.sitkUInt8), image, sitk.Transform(), sitk.sitkNearestNeighbor)
    size = image.GetSize()
    start, kept = [size[0] // 4, size[1] // 4, 0], [size[0] // 2, size[1] // 2, size[2]]
    if whole:
        start, kept = [0, 0, 0], list(size)
    image = sitk.RegionOfInterest(image, kept, start)
    labels = sitk.RegionOfInterest(labels, kept, start)
    array = sitk.GetArrayFromImage(labels)
    grouped = sitk.GetImageFromArray(np.where(array > 0, 1 + array % 4, 0).astype(np.uint8))
    grouped.CopyInformation(labels)
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for name, spacing in spacings_mm.items():
        scaled = [round(edge * old / new) for edge, old, new in zip(kept, image.GetSpacing(), spacing, strict=True)]
        grid = sitk.Image(scaled, sitk.sitkUInt8)
        grid.SetSpacing(spacing)
        grid.SetOrigin(image.GetOrigin())
        grid.SetDirection(image.GetDirection())
        resampled = sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, -1024.0)
        found = sitk.Resample(grouped, grid, sitk.Transform(), sitk.sitkNearestNeighbor)
        sitk.WriteImage(sitk.Cast(resampled, sitk.sitkInt16), str(folder / "imagesTr" / f"{name}_0000.nii.gz"))
        sitk.WriteImage(found, str(folder / "labelsTr" / f"{name}.nii.gz"))
    document = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "one": 1, "two": 2, "three": 3, "four": 4},
        "numTraining": len(spacings_mm),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder
