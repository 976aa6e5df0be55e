"""The shape of a U-Net as nnU-Net derives it from spacing and patch, and what it costs in memory (nnU-Net v2).
Tuples run over the axes in network order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.architecture import NetworkKind

MIN_BOTTLENECK_EDGE = 4
# Axes are pooled, and get a kernel of 3, while they are less than this much coarser than the finest.
_SIMILAR = 2


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Per stage, the full resolution first: `strides` (all 1 in the first stage) and `kernel_sizes`. `patch_size` is
    the patch that was asked for, padded up to multiples of `divisors`."""

    patch_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]

    @property
    def n_stages(self) -> int:
        return len(self.strides)

    @property
    def divisors(self) -> tuple[int, ...]:
        """Product of the strides per axis."""
        return tuple(math.prod(stride[axis] for stride in self.strides) for axis in range(len(self.patch_size)))


def topology(spacing: Sequence[float], patch_size: Sequence[float]) -> Topology:
    """Halves the axes that are long enough and not much coarser than the finest, until none is left.

    `patch_size` may hold halves (the median of an even number of sizes), as in nnU-Net.
    """
    axes = range(len(spacing))
    coarseness, size = list(spacing), list(patch_size)
    kernel = [1 for _ in axes]
    strides, kernels = [tuple(1 for _ in axes)], []
    while pooled := _axes_to_pool(coarseness, size):
        finest = min(coarseness)
        kernel = [3 if k == 3 or coarseness[a] / finest < _SIMILAR else 1 for a, k in enumerate(kernel)]
        strides.append(tuple(2 if axis in pooled else 1 for axis in axes))
        kernels.append(tuple(kernel))
        for axis in pooled:
            coarseness[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
    kernels.append(tuple(3 for _ in axes))
    made = Topology(patch_size=tuple(0 for _ in axes), strides=tuple(strides), kernel_sizes=tuple(kernels))
    padded = tuple(math.ceil(edge / d) * d for edge, d in zip(patch_size, made.divisors, strict=True))
    return Topology(patch_size=padded, strides=made.strides, kernel_sizes=made.kernel_sizes)


def _axes_to_pool(spacing: Sequence[float], size: Sequence[float]) -> list[int]:
    long_enough = [axis for axis, edge in enumerate(size) if edge >= 2 * MIN_BOTTLENECK_EDGE]
    if not long_enough:
        return []
    finest = min(spacing[axis] for axis in long_enough)
    similar = [axis for axis in long_enough if spacing[axis] / finest < _SIMILAR]
    # One axis alone is pooled only where more than the bottleneck's edge is left.
    if len(similar) == 1 and size[similar[0]] < 3 * MIN_BOTTLENECK_EDGE:
        return []
    return similar


def feature_map_voxels(
    network: NetworkKind,
    shape: Topology,
    *,
    features_per_stage: Sequence[int],
    blocks_per_stage: Sequence[int],
    convs_per_decoder_stage: Sequence[int],
    num_outputs: int,
) -> int:
    """Values in all feature maps of one sample: nnU-Net's proxy for GPU memory.

    `blocks_per_stage` counts convolutions (`plain`) or residual blocks (`residual`) of the encoder.
    """
    sizes, edges = [], list(shape.patch_size)
    for stride in shape.strides:
        edges = [edge // s for edge, s in zip(edges, stride, strict=True)]
        sizes.append(math.prod(edges))
    total = num_outputs * sizes[0]
    if network == "residual":
        total += features_per_stage[0] * math.prod(shape.patch_size)  # the stem
    before = features_per_stage[0]
    for voxels, features, blocks, stride in zip(
        sizes, features_per_stage, blocks_per_stage, shape.strides, strict=True
    ):
        if network == "plain":
            total += blocks * features * voxels
        else:
            # Two convolutions a block, and a projection in the first where its input has another shape.
            projects = features != before or max(stride) > 1
            total += (2 * blocks + projects) * features * voxels
        before = features
    for voxels, features, convs in zip(sizes[:-1], features_per_stage[:-1], convs_per_decoder_stage, strict=True):
        total += (convs + 1) * features * voxels  # one transposed convolution
    return total
