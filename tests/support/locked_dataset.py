"""Locked cases for intensity bundles: brightness alone says the label, on grids of every kind.

Left structure: 350, or `left`. Right structure: 600, and `bright` of its voxels 720. A model whose bands end at 660
misses those, so that its Dice is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.nifti import write_image
from engine.volume import Geometry
from tests.support.intensity_model import PHANTOM_BANDS, Band

LABELS = {"background": 0, "left structure": 1, "right structure": 2}


def _with(left: tuple[float, float], right: tuple[float, float]) -> Mapping[str, Band]:
    bands = zip(PHANTOM_BANDS.items(), (left, right), strict=True)
    return {name: replace(band, low=low, high=high) for (name, band), (low, high) in bands}


DIM_BANDS = _with((200, 500), (500, 660))
"""Misses what is bright of the right structure."""
BLIND_BANDS = _with((200, 500), (2000, 3000))
"""Finds no right structure at all."""
WIDE_BANDS = _with((120, 500), (500, 800))
"""Finds a left structure of 150 as well."""
WIDE_AND_DIM_BANDS = _with((120, 500), (500, 660))
RIGHT_VOXELS = 6 * 6 * 6
_SHAPE = (18, 20, 22)
_TILT = np.radians(17.0)
_OBLIQUE = np.array(
    [
        [1.0, 0.0, 0.0],
        [0.0, np.cos(_TILT), -np.sin(_TILT)],
        [0.0, np.sin(_TILT), np.cos(_TILT)],
    ]
)
GRIDS: Mapping[str, Any] = {
    "axial": np.eye(3),
    "reversed": np.diag([-1.0, -1.0, 1.0]),
    "turned": np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
    "oblique": _OBLIQUE,
}
"""Direction matrices; columns are where x, y and z grow, in LPS."""


def write_locked(
    folder: Path,
    *,
    cases: int = 4,
    bright: Sequence[int] = (0,),
    strata: Mapping[str, str] | None = None,
    left: float = 350,
    first: int = 0,
    prefix: str = "case",
    **changes: Any,
) -> Path:
    """`cases` cases named PREFIX_00, ... on the grids of GRIDS in turn; `bright` is repeated over them. No two
    images are alike; `first` is the number of the first one. `changes` replace keys of dataset.json."""
    names = list(GRIDS)
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for index in range(cases):
        random = np.random.default_rng(first + index)
        image = random.integers(1, 100, _SHAPE).astype(np.float32)
        labels = np.zeros(_SHAPE, dtype=np.uint8)
        image[3:9, 4:10, 4:10], labels[3:9, 4:10, 4:10] = left, 1
        right = np.full(RIGHT_VOXELS, 600, dtype=np.float32)
        right[: bright[index % len(bright)]] = 720
        image[9:15, 11:17, 12:18], labels[9:15, 11:17, 12:18] = right.reshape(6, 6, 6), 2
        affine = np.eye(4)
        affine[:3, :3] = GRIDS[names[index % len(names)]] * 2.0
        affine[:3, 3] = (5.0, -7.0, 11.0 + index)
        geometry = Geometry(shape=_SHAPE, affine_lps=affine)
        write_image(image, geometry, folder / "imagesTr" / f"{prefix}_{index:02}_0000.nii.gz")
        write_image(labels, geometry, folder / "labelsTr" / f"{prefix}_{index:02}.nii.gz")
    document = {"channel_names": {"0": "image"}, "labels": LABELS, "numTraining": cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(document | changes))
    if strata is not None:
        (folder / "strata.json").write_text(json.dumps(dict(strata)))
    return folder
