"""An image with labels that nobody took, for what is counted on whole studies."""

from __future__ import annotations

import numpy as np

from engine.volume import Geometry, LabelMap, Volume

SHAPE = (7, 9, 11)


def invented_study(seed: int = 0, *, scale: float = 1.0, offset: float = 0.0) -> tuple[Volume, LabelMap]:
    """Noise with a rim of zeros, on a tilted grid of three spacings, and two labels."""
    random = np.random.default_rng(seed)
    array = np.zeros((1, *SHAPE), dtype=np.float32)
    array[:, 1:-1, 2:-1, 1:-3] = random.integers(50, 1000, (1, 5, 6, 7)) * scale + offset
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[2:4, 3:6, 2:6], labels[4:5, 3:5, 2:4] = 1, 2
    turn = np.array([[1.0, 0, 0], [0, 0.96, -0.28], [0, 0.28, 0.96]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * (0.5, 0.75, 2.0), (12.0, -7.0, 3.0)
    geometry = Geometry(shape=SHAPE, affine_lps=affine)
    return Volume(array=array, geometry=geometry), LabelMap(array=labels, geometry=geometry)
