"""Batches of any length through a network whose shape is fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import BackendFailed

FloatArray = NDArray[np.float32]


def check_batch(batch: FloatArray, window: Sequence[int], *, where: str) -> None:
    """Raises BackendFailed for anything but float32 (N, *window) with at least one window."""
    if batch.ndim != len(window) + 1 or batch.shape[1:] != tuple(window) or not len(batch) or batch.dtype != np.float32:
        raise BackendFailed(f"{where}: takes float32 (N, *{tuple(window)}), was given {batch.dtype} {batch.shape}")


def run_in_pieces(batch: FloatArray, size: int, run: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """`run` gets pieces of `size` windows, and the windows that are left over one at a time: two shapes in all, since a
    runtime's memory grows with every new shape and does not shrink."""
    if len(batch) == size:
        return run(batch)
    whole = len(batch) - len(batch) % size
    answers = [run(batch[start : start + size]) for start in range(0, whole, size)]
    answers += [run(batch[index : index + 1]) for index in range(whole, len(batch))]
    return np.concatenate(answers)
