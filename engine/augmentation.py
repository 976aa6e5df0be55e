"""A batch for training from what was read: spatial and intensity transforms, mask, and the cascade's channels (torch).

What is done to a sample was drawn before (engine/augmentation_profile.py) and depends on its place in the training
alone, so a batch is the same on any number of workers. Samples are worked on one after the other on the device they
are on: their draws differ, and on a processor a sample stays in its cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.augmentation_profile import AugmentationPlan, SampleDraw, draw_sample
from engine.cascade_augmentation import label_channels, spoil_labels
from engine.intensity_augmentation import change_intensities
from engine.random_state import Purpose, random_generator
from engine.spatial_augmentation import OUTSIDE, transform_sample

UNCHANGED = SampleDraw()
"""For validation: the middle of what was read, with its mask and its cascade's channels."""


def draw_batch(
    plan: AugmentationPlan, channels: int, samples: Sequence[int], *, seed: int, epoch: int, iteration: int
) -> list[SampleDraw]:
    """The draws for these samples of the batch; `samples` are indices into the batch of all processes."""
    return [
        draw_sample(
            plan,
            channels,
            random_generator(seed, Purpose.AUGMENTATION, epoch=epoch, iteration=iteration, sample=sample),
        )
        for sample in samples
    ]


def augment_batch(
    images: Sequence[Tensor], labels: Sequence[Tensor], draws: Sequence[SampleDraw], plan: AugmentationPlan
) -> tuple[Tensor, Tensor]:
    """The batch that the network gets: (B, C, *patch) float32 and labels (B, *patch) int16 without negative values.

    `images`: per sample (C, *initial) float32. `labels`: per sample (M, *initial) int16, -1 outside the nonzero mask;
    M is 1, or 2 in a cascade, where the second map is the previous stage's and C grows by one channel for each of its
    labels. A sample whose draw is not `is_spatial` may be read at any size from the patch's on. What is given is not
    changed. ValueError where the numbers of samples or maps do not fit.
    """
    maps = 2 if plan.previous_labels else 1
    if not len(images) == len(labels) == len(draws) or any(len(sample) != maps for sample in labels):
        raise ValueError(f"{len(images)} images, {len(labels)} labels of {maps} maps and {len(draws)} draws must fit")
    channels = len(images[0])
    size = (len(images), channels + len(plan.previous_labels), *plan.patch_size)
    batch = torch.empty(size, device=images[0].device)
    targets = torch.empty((len(images), *plan.patch_size), device=images[0].device, dtype=torch.int16)
    for place, target, image, maps_read, draw in zip(batch, targets, images, labels, draws, strict=True):
        image, found = transform_sample(image, maps_read, draw, plan)
        change_intensities(image, draw, plan)
        outside = found[0] == OUTSIDE
        for channel in plan.masked_channels:
            image[channel].masked_fill_(outside, 0.0)
        place[:channels] = image
        target.copy_(found[0]).masked_fill_(outside, 0)
        if plan.previous_labels:
            place[channels:] = label_channels(found[1], plan.previous_labels)
            spoil_labels(place[channels:], draw.previous_stage)
    return batch, targets
