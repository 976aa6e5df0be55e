"""Noise, blur, brightness, contrast, low resolution and gamma on one sample, as nnU-Net does them (torch).

Each function changes its tensor, one channel (z, y, x) or (y, x) of float32, in place; a sample's channels are small
enough to stay in the processor's cache from one transform to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from engine.augmentation_profile import AugmentationPlan, SampleDraw

_TINY = 1e-7
_UPSAMPLING = {2: "bilinear", 3: "trilinear"}


def change_intensities(image: Tensor, draw: SampleDraw, plan: AugmentationPlan) -> None:
    """All intensity transforms that were drawn, in nnU-Net's order, on (C, *patch)."""
    if draw.noise_sigma is not None:
        _add_noise(image, draw.noise_sigma, draw.noise_seed, of_range=plan.profile.noise_of_range)
    for channel, sigmas in zip(image, draw.blur_sigmas, strict=False):
        if sigmas is not None:
            blur(channel, sigmas)
    for channel, factor in zip(image, draw.brightness, strict=False):
        channel.mul_(factor)
    for channel, factor in zip(image, draw.contrast, strict=False):
        change_contrast(channel, factor)
    for channel, zoom in zip(image, draw.zooms, strict=False):
        if zoom is not None:
            lower_resolution(channel, zoom, keep_first_axis=plan.is_dummy_2d)
    for channel, gamma in zip(image, draw.inverted_gamma, strict=False):
        channel.neg_()
        change_gamma(channel, gamma)
        channel.neg_()
    for channel, gamma in zip(image, draw.gamma, strict=False):
        change_gamma(channel, gamma)


def _add_noise(image: Tensor, sigma: float, seed: int, *, of_range: bool) -> None:
    generator = torch.Generator(image.device).manual_seed(seed)
    noise = torch.empty_like(image).normal_(generator=generator)
    if of_range:
        low, high = image.flatten(1).aminmax(dim=1)
        noise.mul_((high - low).reshape(-1, *(1,) * (image.ndim - 1)))
    image.add_(noise, alpha=sigma)


def blur(channel: Tensor, sigmas: Sequence[float]) -> None:
    """Gaussian blur, one sigma in voxels per axis, reflected at the border."""
    for axis, sigma in enumerate(sigmas):
        weights = gaussian_kernel(sigma)
        reach, size = len(weights) // 2, channel.shape[axis]
        steps = torch.arange(-reach, size + reach, device=channel.device)
        # Reflected about the outer voxels, as often as a short axis needs it.
        period = max(2 * (size - 1), 1)
        steps = steps.remainder(period)
        source = channel.index_select(axis, torch.minimum(steps, (period - steps).clamp_max(size - 1)))
        channel.copy_(source.narrow(axis, 0, size)).mul_(weights[0])
        for offset, weight in enumerate(weights[1:], start=1):
            channel.add_(source.narrow(axis, offset, size), alpha=weight)


def gaussian_kernel(sigma: float) -> list[float]:
    """nnU-Net's: 6 sigma wide, an odd number of weights that sum to 1."""
    width = 6 * sigma + 0.5
    size = round(width)
    if size % 2 == 0:
        size += 1 if width >= size else -1
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    values: list[float] = (weights / weights.sum()).tolist()
    return values


def change_contrast(channel: Tensor, factor: float) -> None:
    """Stretches around the mean and clips to the old range."""
    mean = channel.mean()
    low, high = channel.aminmax()
    channel.sub_(mean).mul_(factor).add_(mean).clamp_(low, high)


def lower_resolution(channel: Tensor, zoom: float, *, keep_first_axis: bool) -> None:
    """Samples down by the nearest voxel and up again linearly."""
    size = channel.shape
    small = [round(edge * zoom) for edge in size]
    if keep_first_axis:
        small[0] = size[0]
    coarse = functional.interpolate(channel[None, None], [max(edge, 1) for edge in small], mode="nearest-exact")
    channel.copy_(functional.interpolate(coarse, list(size), mode=_UPSAMPLING[len(size)])[0, 0])


def change_gamma(channel: Tensor, gamma: float) -> None:
    """Raises the channel, scaled to its range, to the power `gamma`; mean and standard deviation stay."""
    mean, std = channel.mean(), channel.std()
    low, high = channel.aminmax()
    extent = high - low
    channel.sub_(low).div_(extent.clamp_min(_TINY)).pow_(gamma).mul_(extent).add_(low)
    channel.sub_(channel.mean()).mul_(std / channel.std().clamp_min(_TINY)).add_(mean)
