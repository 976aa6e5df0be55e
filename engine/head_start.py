"""Where a network's heads start: at the frequencies of their labels.

nnU-Net starts every bias at 0. The first steps then push all voxels towards the background, with a momentum of 0.99 far
beyond what is right, and a small network may see nothing else for many epochs. A bias of the logarithm of its label's
frequency says from the start what those steps would have learnt (Lin et al., Focal Loss for Dense Object Detection,
2017, section 4.1). Weights, and all that follows, are nnU-Net's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.batches import BatchSource
from engine.labels import LabelManager

LEAST = 1e-3
"""Frequencies below count as this: a label that starts at almost nothing would get almost no gradient either."""
_SAMPLES = 128


def label_frequencies(source: BatchSource, labels: LabelManager) -> NDArray[np.float64] | None:
    """The share of each head's voxels (K,) in the first patches of a training, of all processes; None where nobody
    labelled anything in them. Voxels of the ignore label count for nothing.

    Raises DatasetInvalid when a case is not readable.
    """
    batch_size = source.sampler.batch_size
    voxels = np.zeros(labels.highest_value + 1, dtype=np.int64)
    for index in range(_SAMPLES):
        patch = source.label_patch(epoch=0, iteration=index // batch_size, sample=index % batch_size)
        voxels += np.bincount(patch.ravel(), minlength=voxels.size)
    if labels.ignore_label is not None:
        voxels[labels.ignore_label] = 0
    if not voxels.any():
        return None
    regions = [label.region for label in labels.foreground] if labels.has_regions else [(v,) for v in labels.values]
    shares: NDArray[np.float64] = np.array([voxels[list(region)].sum() for region in regions]) / voxels.sum()
    return shares


def start_heads(heads: Iterable[nn.Module], source: BatchSource, labels: LabelManager) -> None:
    """Sets the biases of the heads, 1x1 convolutions of K outputs, in place: with labels the softmax of them is the
    frequencies, with regions the sigmoid. Raises DatasetInvalid when a case of `source` is not readable."""
    frequencies = label_frequencies(source, labels)
    if frequencies is None:
        return
    kept = np.clip(frequencies, LEAST, 1 - LEAST)
    bias = torch.tensor(np.log(kept / (1 - kept) if labels.has_regions else kept))
    with torch.no_grad():
        for head in heads:
            own = head.bias
            if not isinstance(own, torch.Tensor):
                raise TypeError("a head without a bias")
            own.copy_(bias)
