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


def write_faulty_dataset(folder: Path) -> Path:
    """14 cases with a fault each (but case_12, of which case_11 is a copy), and faults of the whole dataset."""
    write_dataset(folder, cases=14)
    images, labels = folder / "imagesTr", folder / "labelsTr"
    shape = (6, 10, 12)
    ones = np.ones(shape, np.uint8)
    (labels / "case_00.nii.gz").unlink()
    write_array(labels / "case_01.nii.gz", ones * 7)
    with_nan = np.ones(shape, np.float32)
    with_nan[2, 3, 4] = np.nan
    write_array(images / "case_02_0000.nii.gz", with_nan)
    write_array(labels / "case_03.nii.gz", np.ones((6, 10, 11), np.uint8))
    write_array(labels / "case_04.nii.gz", ones, (2.0, 0.75, 0.75))
    write_array(labels / "case_05.nii.gz", ones, origin=(1.0, 0.0, 0.0))
    write_array(images / "case_06_0001.nii.gz", np.ones(shape, np.float32))
    (images / "case_07_0000.nii.gz").write_bytes(b"no image at all")
    write_array(images / "case_08_0000.nii.gz", np.full((1, 10, 12), 5, np.float32))
    write_array(labels / "case_08.nii.gz", np.ones((1, 10, 12), np.uint8))
    write_array(labels / "case_09.nii.gz", ones * 0)
    write_array(images / "case_10_0000.nii.gz", np.zeros(shape, np.float32))
    (images / "case_11_0000.nii.gz").write_bytes((images / "case_12_0000.nii.gz").read_bytes())
    mirrored = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    write_array(labels / "case_13.nii.gz", ones, SPACING_ZYX, (5.5, 0.0, 0.0), mirrored)
    write_array(labels / "orphan.nii.gz", ones)
    write_array(images / "scan.nii.gz", ones)
    document = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(document | {"numTraining": 20, "patients": {"case_99": "p"}}))
    (folder / "splits_final.json").write_text('[{"train": ["case_00"], "val": ["case_77"]}]')
    return folder
