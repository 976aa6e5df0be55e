"""The memory that a prediction needs, from shapes alone, and what is free."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import psutil

from engine.bundle import Bundle
from engine.errors import MemoryExceeded
from engine.manifest import BundleConfiguration
from engine.plans import Configuration
from engine.preprocessing import network_shape
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
# Interpolated rows while labels are made: see engine.logits_to_labels.
_EXPORT_SLABS = 40 * 2**20
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
) -> MemoryEstimate:
    """The peak of `Predictor.predict` for an image on `geometry`, taken as if nothing could be cropped away.

    `decoded`: whether the image is in memory already; else its float32 voxels count as well.
    """
    grid = reorientation(geometry, bundle.contract.orientation).target
    forward = bundle.plans.transpose_forward
    shape = tuple(grid.shape[axis] for axis in forward)
    spacing = tuple(grid.spacing_mm[axis] for axis in forward)
    voxels = math.prod(shape)
    channels = len(bundle.channels)
    heads = bundle.label_manager.num_heads
    label_bytes = np.dtype(bundle.label_manager.dtype).itemsize
    runs = run_order(bundle, configurations)
    members = {c.name for c in (bundle.final_configurations if configurations is None else runs)}

    kept = 0
    networks = 0
    stages: list[tuple[str, dict[str, int]]] = []
    for run in runs:
        planned = bundle.plans.configurations[run.name]
        chosen = [fold for fold in run.folds if folds is None or fold.fold in folds]
        inner = network_shape(shape, spacing, planned)
        size = math.prod(inner)
        padded = math.prod(WindowGrid(shape=inner, patch_size=planned.patch_size, step_size=1.0).padded_shape)
        inputs = channels + (len(bundle.label_manager.foreground_labels) if run.previous_stage else 0)
        networks += sum(_network_bytes(planned, fold.file, inputs, heads) for fold in chosen)
        preparing = channels * voxels * _FLOAT32 + voxels * (_BOOL + _INT32 + 2 * _FLOAT64) + inputs * size * _FLOAT32
        sums = (2 + (len(chosen) > 1)) * heads * padded * _FLOAT32 + padded * _FLOAT32
        windows = inputs * (size + padded) * _FLOAT32 + len(chosen) * size * label_bytes + heads * size * _FLOAT16
        stages.append(("preprocessing", {"preprocessing": preparing, "logits": kept}))
        stages.append(("network", {"window sums": sums, "network input": windows, "logits": kept}))
        if run.name in members:
            kept += heads * size * _FLOAT16 * (len(chosen) if bundle.ensemble == "probabilities-of-folds" else 1)
        else:
            kept += voxels * label_bytes
    maps = heads if bundle.label_manager.has_regions else 1
    labelling = voxels * (3 * label_bytes + maps * _FLOAT16) + _EXPORT_SLABS
    counting = voxels * (3 * label_bytes + maps * _FLOAT16 + _INT32 + 2 * _BOOL)
    stages.append(("export", {"labels and probabilities": max(labelling, counting), "logits": kept}))

    _, largest = max(stages, key=lambda stage: sum(stage[1].values()))
    image = channels * voxels * _FLOAT32
    copies = (bundle.contract.orientation != "as-stored") + (not decoded)
    parts = {_NETWORKS: networks, "image": copies * image, **largest}
    return MemoryEstimate(bytes=sum(parts.values()), parts=MappingProxyType(parts))


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
            "free memory, use a machine with more, or run fewer configurations"
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


def _network_bytes(planned: Configuration, file: Path, inputs: int, heads: int) -> int:
    """Weights and activations of one loaded network for one patch."""
    weights = sum(part.stat().st_size for part in (file, file.with_name(file.name + ".data")) if part.exists())
    features, voxels = planned.architecture.features_per_stage, math.prod(planned.patch_size)
    # At the full resolution: two feature maps to be joined, their concatenation, and a convolution's output.
    live = voxels * (5 * features[0] + inputs + heads)
    for stage, stride in enumerate(planned.architecture.strides[1:], start=1):
        voxels //= math.prod(stride)
        live += voxels * features[stage]
    return _WEIGHT_COPIES * weights + int(_ARENA_GROWTH * live * _FLOAT32)
