"""The memory that a prediction needs, from shapes alone, and what is free."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
import psutil

from engine.bundle import Bundle
from engine.errors import MemoryExceeded
from engine.manifest import BundleConfiguration
from engine.plans import Configuration
from engine.preprocessing import network_shape
from engine.resampling import Shape
from engine.sliding_window import WindowGrid
from engine.volume import Geometry, reorientation

_FLOAT32 = 4
_FLOAT64 = 8
_FLOAT16 = 2
_BOOL = 1
_INT32 = 4
# The runtime keeps a network's weights as read and once more packed for its kernels.
_WEIGHT_COPIES = 2
# The runtime's arena grows in powers of two.
_ARENA_GROWTH = 2.0
# Of what is not 0, to fill the holes in it, and of the labels of a previous stage.
_MASKS = 10
# Rows that the loops have in hand, and what they are compiled to.
_LOOPS = 12 * 2**20
_NETWORKS = "networks"
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """`bytes` is the peak beyond what is in memory of the image; `parts` are what adds up to it, by name."""

    bytes: int
    parts: Mapping[str, int]

    @property
    def working_bytes(self) -> int:
        """Without the loaded networks: what a predictor with its networks in memory still needs."""
        return self.bytes - self.parts.get(_NETWORKS, 0)


def run_order(bundle: Bundle, configurations: Sequence[str] | None = None) -> tuple[BundleConfiguration, ...]:
    """All configurations that must run for the named ones (default: the final ones), earlier stages first.

    Raises BundleInvalid for a name that the bundle does not have.
    """
    members = (
        bundle.final_configurations
        if configurations is None
        else tuple(bundle.configuration(name) for name in dict.fromkeys(configurations))
    )
    order: dict[str, BundleConfiguration] = {}

    def visit(configuration: BundleConfiguration) -> None:
        if configuration.previous_stage is not None:
            visit(bundle.configuration(configuration.previous_stage))
        order.setdefault(configuration.name, configuration)

    for member in members:
        visit(member)
    return tuple(order.values())


def estimate_peak(
    bundle: Bundle,
    geometry: Geometry,
    *,
    configurations: Sequence[str] | None = None,
    folds: Collection[str] | None = None,
    decoded: bool = True,
    sums_in_file: bool = False,
    batch: int = 1,
) -> MemoryEstimate:
    """The peak of `Predictor.predict` for an image on `geometry`, taken as if nothing could be cropped away.

    `decoded`: whether the image is in memory already; else its float32 voxels count as well. `sums_in_file`: the sums
    of windows are kept in a file (engine/logit_rows.py). `batch`: passes that the runtime takes at a time.
    """
    grid = reorientation(geometry, bundle.contract.orientation).target
    forward = bundle.plans.transpose_forward
    shape = grid.shape[forward[0]], grid.shape[forward[1]], grid.shape[forward[2]]
    spacing = tuple(grid.spacing_mm[axis] for axis in forward)
    voxels = math.prod(shape)
    channels = len(bundle.channels)
    labels = bundle.label_manager
    label_bytes = np.dtype(labels.dtype).itemsize
    # Of each voxel of the image: its label and probabilities; of each of a network's grid: labels and entropies.
    result = label_bytes + (labels.num_heads if labels.has_regions else 1) * _FLOAT16
    runs = run_order(bundle, configurations)
    members = {c.name for c in (bundle.final_configurations if configurations is None else runs)}
    chosen = {run.name: [fold for fold in run.folds if folds is None or fold.fold in folds] for run in runs}
    apart = bundle.ensemble == "probabilities-of-folds"
    sources = sum(len(chosen[name]) if apart else 1 for name in members)
    by_bands = sources == 1 and not labels.has_regions

    image = channels * voxels * _FLOAT32
    turned = image if bundle.contract.orientation != "as-stored" else 0
    kept = 0  # by earlier configurations
    networks = 0
    stages: list[dict[str, int]] = []
    for run in runs:
        planned = bundle.plans.configurations[run.name]
        count = len(chosen[run.name])
        window_grid = WindowGrid(
            shape=network_shape(shape, spacing, planned), patch_size=planned.patch_size, step_size=bundle.step_size
        )
        size, padded = math.prod(window_grid.shape), math.prod(window_grid.padded_shape)
        inputs = channels + (len(labels.foreground_labels) if run.previous_stage else 0)
        networks += sum(
            _network_bytes(planned, fold.file, inputs, labels.num_heads, batch) for fold in chosen[run.name]
        )
        is_needed = any(other.previous_stage == run.name for other in runs)
        preparing = _preprocessing_bytes(shape, window_grid.shape, planned, channels, inputs)
        stages.append({"preprocessing": preparing, "turned image": turned, "kept": kept})
        maps = count * size * result
        running = {
            "network input": inputs * padded * _FLOAT32,
            "window sums": 0
            if sums_in_file
            else count * _ring_bytes(window_grid, labels.num_heads, by_bands=by_bands and not is_needed),
            "certainty": maps,
            "windows": _window_bytes(planned, inputs, labels.num_heads, passes=2 ** len(run.mirror_axes), batch=batch),
        }
        beside = {"turned image": 0 if run is runs[-1] else turned, "kept": kept}
        stages.append({**running, **beside, "labels and probabilities": voxels * result})
        if is_needed:
            kept += voxels * label_bytes
        if run.name in members:
            stored = labels.num_heads * size * _FLOAT16 if is_needed else 0
            kept += stored + sum(running.values()) if sources > 1 or is_needed else maps
    # The labels in the image's own order are a copy where that is another order.
    is_turned = bundle.contract.orientation != "as-stored" or bundle.plans.transpose_forward != (0, 1, 2)
    stages.append({"labels and probabilities": voxels * (result + 2 * is_turned * label_bytes), "kept": kept})

    largest = max(stages, key=lambda stage: sum(stage.values()))
    parts = {_NETWORKS: networks, "image": 0 if decoded else image, "loops": _LOOPS, **largest}
    return MemoryEstimate(bytes=sum(parts.values()), parts=MappingProxyType(parts))


def _preprocessing_bytes(shape: Shape, inner: Shape, planned: Configuration, channels: int, inputs: int) -> int:
    """Of the normalised copy of the image, the mask of what is not 0, the planes between the two resamplings of one
    channel, and the result."""
    voxels, size = math.prod(shape), math.prod(inner)
    is_stacked = inputs > channels
    normalized = channels * voxels * _FLOAT32
    normalizing = voxels * _FLOAT32 if "zscore" in planned.normalization_schemes else 0
    if any(planned.use_mask_for_norm) or is_stacked:
        normalizing += _MASKS * voxels * _BOOL
    # A cascade's image is stacked with what the previous stage found, in one more copy.
    result = (channels + 2 * is_stacked * inputs) * size * _FLOAT32
    if inner == shape:
        return normalized + max(normalizing, result if is_stacked else 0)
    between = shape[0] * inner[1] * inner[2] * _FLOAT64 if inner[0] != shape[0] else 0
    return normalized + max(normalizing, between + result)


def _ring_bytes(grid: WindowGrid, heads: int, *, by_bands: bool) -> int:
    """The most rows of sums that are in use at a time (engine/logit_rows.py)."""
    depth, height, width = grid.padded_shape
    starts = grid.positions()
    patch = (1, *grid.patch_size) if grid.is_2d else grid.patch_size
    rows = (min(patch[0] + 1, depth)) * height
    if by_bands and not grid.is_2d and len(starts[0]) > 1:
        step = max(after - before for before, after in pairwise(starts[0]))
        # Planes that wait for the next windows, whole; those that these begin, as far as they have come; one more.
        rows = min(rows, (patch[0] - step) * height + step * min(height, patch[1] + 1) + height)
    return rows * (heads + 1) * width * _FLOAT32


def _window_bytes(planned: Configuration, inputs: int, heads: int, *, passes: int, batch: int) -> int:
    """What goes to the network and what comes back: answers of the unmirrored pass's batch and of the one at hand, and
    the sum of the mirrored passes; the check of one answer."""
    at_once = min(batch, passes)
    answers = at_once * (2 if at_once < passes else 1) + (passes > 1)
    floats = (1 + at_once) * inputs + answers * heads
    return math.prod(planned.patch_size) * (floats * _FLOAT32 + heads * _BOOL)


def check_budget(estimate: MemoryEstimate, budget_bytes: int | None) -> None:
    """Raises MemoryExceeded with the numbers where the estimate is above the budget (None: above what is free, the
    networks being loaded already)."""
    needed, budget = estimate.bytes, budget_bytes
    if budget is None:
        needed, budget = estimate.working_bytes, available_bytes()
    if needed > budget:
        parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in estimate.parts.items() if size)
        raise MemoryExceeded(
            f"the prediction needs about {needed / 2**20:.0f} MiB and {budget / 2**20:.0f} MiB may be used ({parts}); "
            "free memory, use a machine with more, or a model with fewer folds or configurations"
        )


def available_bytes() -> int:
    """Free memory: of the machine, or of the control group (container, service unit) where that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return min(free, max(0, int(limit) - used)) if limit.isdecimal() else free


def _network_bytes(planned: Configuration, file: Path, inputs: int, heads: int, batch: int) -> int:
    """Weights and activations of one loaded network for `batch` patches, and for one where that is another shape."""
    weights = sum(part.stat().st_size for part in (file, file.with_name(file.name + ".data")) if part.exists())
    features, voxels = planned.architecture.features_per_stage, math.prod(planned.patch_size)
    # At the full resolution: two feature maps to be joined, their concatenation, and a convolution's output.
    live = voxels * (5 * features[0] + inputs + heads)
    for stage, stride in enumerate(planned.architecture.strides[1:], start=1):
        voxels //= math.prod(stride)
        live += voxels * features[stage]
    shapes = 1 if batch == 1 else 2
    return shapes * _WEIGHT_COPIES * weights + int((batch + shapes - 1) * _ARENA_GROWTH * live * _FLOAT32)
