"""nnU-Net's intensity normalisation, one channel at a time, before resampling (nnU-Net v2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputRejected
from engine.plans import IntensityProperties, NormalizationScheme

_SMALLEST_DIVISOR = 1e-8


def normalize(
    channel: NDArray[np.float32],
    scheme: NormalizationScheme,
    *,
    inside: NDArray[np.bool_] | None = None,
    properties: IntensityProperties | None = None,
) -> None:
    """Normalises a float32 (Z, Y, X) channel in place.

    `inside` (same shape) restricts the z-score to the nonzero region: statistics from there, values outside
    unchanged; the other schemes ignore it. `ct` needs `properties`. Standard deviations are those of the population.
    Raises InputRejected when `rgb_to_0_1` meets values outside 0..255.
    """
    match scheme:
        case "zscore":
            if inside is None:
                channel -= channel.mean()
                # As the mean is now 0 within rounding, the deviation is not changed by its removal.
                channel /= max(float(channel.std()), _SMALLEST_DIVISOR)
            else:
                values = channel[inside]
                channel[inside] = (values - values.mean()) / max(float(values.std()), _SMALLEST_DIVISOR)
        case "ct":
            if properties is None:
                raise ValueError("CT normalisation needs the foreground intensity properties of the channel")
            np.clip(channel, properties.percentile_00_5, properties.percentile_99_5, out=channel)
            channel -= np.float32(properties.mean)
            channel /= np.float32(max(properties.std, _SMALLEST_DIVISOR))
        case "rescale_to_0_1":
            channel -= channel.min()
            channel /= max(float(channel.max()), _SMALLEST_DIVISOR)
        case "rgb_to_0_1":
            low, high = float(channel.min()), float(channel.max())
            if low < 0 or high > 255:
                raise InputRejected(f"values from {low:g} to {high:g}; the model expects RGB values from 0 to 255")
            channel /= np.float32(255.0)
        case "nonorm":
            return
