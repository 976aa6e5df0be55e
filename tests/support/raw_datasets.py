"""Small datasets in nnU-Net's raw format, made from a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

SPACING_ZYX = (2.0, 0.75, 0.5)


def write_array(
    path: Path,
    array: NDArray[Any],
    spacing_zyx: tuple[float, ...] = SPACING_ZYX,
    origin: tuple[float, ...] = (0.0, 0.0, 0.0),
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
) -> Path:
    """A (Z, Y, X) array as a file that ITK can write."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing_zyx[::-1])
    image.SetOrigin(origin)
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return path


def write_dataset(
    folder: Path, *, cases: int = 6, channels: int = 1, shape: tuple[int, int, int] = (6, 10, 12), **changes: Any
) -> Path:
    """`cases` cases case_00, case_01, ... of noise with labels 1 and 2; `changes` replace keys of dataset.json, None
    removes one."""
    random = np.random.default_rng(0)
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for index in range(cases):
        labels = np.zeros(shape, dtype=np.uint8)
        labels[1:-1, 2:5, 2:5] = 1
        labels[1:-1, 5:7, 2 : 4 + index % 5] = 2
        for channel in range(channels):
            image = random.normal(100 + 50 * channel, 20, shape).astype(np.float32)
            write_array(folder / "imagesTr" / f"case_{index:02}_{channel:04}.nii.gz", image)
        write_array(folder / "labelsTr" / f"case_{index:02}.nii.gz", labels)
    document = {
        "channel_names": {str(channel): "MRI" for channel in range(channels)},
        "labels": {"background": 0, "first": 1, "second": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    } | changes
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    return folder
