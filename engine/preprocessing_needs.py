"""What preprocessing a dataset will need on the disk and in memory, from its fingerprint alone.

`shapes_after_crop` and `spacings` are a fingerprint's, axes as stored.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

from engine.errors import MemoryExceeded
from engine.plans import Configuration
from engine.preprocessed import PreprocessJob
from engine.preprocessing import network_shape

_FLOAT32, _FLOAT64, _INT16, _INT64 = 4, 8, 2, 8
# An interpreter with its libraries, beyond what workers share, and small arrays.
_WORKER = 96 * 2**20


def needed_bytes(job: PreprocessJob, shapes_after_crop: Sequence[Sequence[int]], spacings: Sequence[Any]) -> int:
    """An estimate of what `preprocess_dataset` will write: 4 bytes a voxel and channel, 2 for labels."""
    total = 0
    for configuration in job.configurations:
        per_voxel = _FLOAT32 * len(configuration.normalization_schemes) + _INT16
        for shape, spacing in zip(shapes_after_crop, spacings, strict=True):
            total += per_voxel * math.prod(_grid(job, configuration, shape, spacing))
    return total


def case_peak_bytes(job: PreprocessJob, shape_after_crop: Sequence[int], spacing: Sequence[float]) -> int:
    """The peak of a worker that makes a case, where cropping takes little away."""
    source = math.prod(shape_after_crop)
    peak = 0
    for configuration in job.configurations:
        image = _FLOAT32 * len(configuration.normalization_schemes)
        grid = _grid(job, configuration, shape_after_crop, spacing)
        first = shape_after_crop[job.plans.transpose_forward[0]]
        made, between = math.prod(grid), first * grid[1] * grid[2] * (first != grid[0])
        # The source as stored (two bytes a voxel) or the masks of its nonzero region.
        reading = source * (image + _INT16 + 8)
        # A channel that is resampled in its planes, in float64, and the finished ones.
        resampling = source * (image + _INT16) + between * _FLOAT64 + made * image
        # Which voxels are of a class, and a list of them, taken as half of all.
        locating = (source + made) * (image + _INT16) + made * (1 + _INT64 // 2)
        peak = max(peak, reading, resampling, locating)
    return peak + _WORKER


def fitting_processes(
    job: PreprocessJob,
    shapes_after_crop: Sequence[Sequence[int]],
    spacings: Sequence[Any],
    *,
    processes: int,
    free_bytes: int,
) -> int:
    """How many workers, at most `processes`, have room when they make the largest cases at the same time.

    Raises MemoryExceeded with the numbers where not even one has.
    """
    peaks = heapq.nlargest(
        processes,
        (case_peak_bytes(job, shape, spacing) for shape, spacing in zip(shapes_after_crop, spacings, strict=True)),
    )
    if peaks[0] > free_bytes:
        raise MemoryExceeded(
            f"preprocessing the largest case needs about {peaks[0] / 2**20:,.0f} MiB and {free_bytes / 2**20:,.0f} MiB "
            "are free; free memory, or use a machine with more"
        )
    while sum(peaks) > free_bytes:
        peaks.pop()
    return len(peaks)


def _grid(
    job: PreprocessJob, configuration: Configuration, shape: Sequence[int], spacing: Sequence[float]
) -> tuple[int, int, int]:
    forward = job.plans.transpose_forward
    return network_shape([shape[a] for a in forward], [spacing[a] for a in forward], configuration)
