"""The previous stage's labels as channels of a cascade's input, and their faults (torch).

A first stage errs in other ways than its training labels show; nnU-Net grows, shrinks and drops parts of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from engine.augmentation_profile import MorphologyOperator, PreviousStageDraw

_MAX_SHARE = 0.15
"""A component that covers this part of the patch is never dropped."""


def label_channels(labels: Tensor, values: Sequence[int]) -> Tensor:
    """(*patch) → (len(values), *patch) float32: 1 where the label is the value."""
    return torch.stack([labels == value for value in values]).to(torch.float32)


def spoil_labels(channels: Tensor, draw: PreviousStageDraw) -> None:
    """Applies the draws to `label_channels` in place. What a label gains by morphology the others lose."""
    for index, operator, radius in draw.morphology:
        before = channels[index] > 0
        after = _morphology(before, operator, radius)
        gained = after & ~before
        channels.masked_fill_(gained, 0.0)
        channels[index] = after
    for index, pick in draw.removals:
        _remove_component(channels[index], pick)


def _morphology(mask: Tensor, operator: MorphologyOperator, radius: float) -> Tensor:
    if operator == "dilate":
        return dilate(mask, radius)
    if operator == "erode":
        return ~dilate(~mask, radius)
    if operator == "close":
        return ~dilate(~dilate(mask, radius), radius)
    return dilate(~dilate(~mask, radius), radius)


def dilate(mask: Tensor, radius: float) -> Tensor:
    """Voxels that are no further than `radius` voxels from the mask; nothing lies beyond the border."""
    reach = math.floor(radius)
    size = [edge + 2 * reach for edge in mask.shape]
    lines = torch.meshgrid(*(torch.arange(-reach, reach + 1, device=mask.device) for _ in size), indexing="ij")
    ball = torch.stack(lines).square().sum(0) <= radius**2
    axes = tuple(range(mask.ndim))
    spectrum = torch.fft.rfftn(mask.to(torch.float32), size, axes) * torch.fft.rfftn(ball.to(torch.float32), size, axes)
    # Counts of mask voxels within the ball: whole numbers up to rounding.
    counts = torch.fft.irfftn(spectrum, size, axes)
    for axis, edge in enumerate(mask.shape):
        counts = counts.narrow(axis, reach, edge)
    dilated: Tensor = counts > 0.5
    return dilated


def _remove_component(channel: Tensor, pick: float) -> None:
    """Drops one of the components (full connectivity) that are not too large."""
    mask = channel.cpu().numpy() > 0
    components, _ = ndimage.label(mask, structure=np.ones((3,) * mask.ndim, dtype=np.bool_))
    sizes = np.bincount(components.ravel())[1:]
    candidates = np.flatnonzero(sizes < _MAX_SHARE * mask.size) + 1
    if candidates.size:
        gone = components == candidates[int(pick * candidates.size)]
        channel.masked_fill_(torch.from_numpy(gone).to(channel.device), 0.0)
