"""nnU-Net's way from an image to what the network sees (nnU-Net v2).

Order: transpose, crop to the nonzero region, normalise, resample; for a cascade the previous stage's label map follows
the same way and is stacked as one-hot channels. "Network axes" are the image's axes after `transpose_forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engine.errors import InputRejected
from engine.normalization import normalize
from engine.plans import Configuration, Plans
from engine.resampling import Shape, resample_image, resample_labels, resampled_shape
from engine.row_threads import RowThreads
from engine.volume import Volume, nonzero_box

FloatArray = NDArray[np.float32]

OUTSIDE = -1
"""Label of background outside the nonzero region."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CroppedImage:
    """The nonzero part of an image in network axes, values as in the source.

    `image` is float32 (C, Z, Y, X); `box` is where it lies in the whole array of `full_shape`; `spacing_mm` is in
    network axes.
    """

    image: FloatArray
    box: tuple[slice, slice, slice]
    full_shape: Shape
    spacing_mm: tuple[float, float, float]

    @property
    def shape(self) -> Shape:
        z, y, x = self.image.shape[1:]
        return z, y, x

    def without_image(self) -> CroppedImage:
        """Its grid alone, with no values that take memory."""
        return replace(self, image=np.broadcast_to(np.float32(0), self.image.shape))


def crop_to_nonzero(volume: Volume, plans: Plans) -> CroppedImage:
    """Transposes into network axes and crops to the smallest box around what is not 0 in any channel.

    The image is a view of the volume's array: it must be copied before it is changed. Raises InputRejected when every
    voxel is 0.
    """
    forward = plans.transpose_forward
    image = volume.array.transpose(0, *(1 + axis for axis in forward))
    spacing = volume.geometry.spacing_mm
    box = nonzero_box(image)
    if box is None:
        raise InputRejected("every voxel of the image is 0; there is nothing to segment")
    z, y, x = image.shape[1:]
    return CroppedImage(
        image=image[:, *box],
        box=box,
        full_shape=(z, y, x),
        spacing_mm=(spacing[forward[0]], spacing[forward[1]], spacing[forward[2]]),
    )


def network_spacing_mm(spacing_mm: Sequence[float], configuration: Configuration) -> tuple[float, float, float]:
    """Spacing of the network's grid in network axes; a 2D network keeps the image's own along the first axis."""
    spacing = configuration.spacing_mm
    if len(spacing) == 2:
        return spacing_mm[0], spacing[0], spacing[1]
    return spacing[0], spacing[1], spacing[2]


def network_shape(shape: Sequence[int], spacing_mm: Sequence[float], configuration: Configuration) -> Shape:
    """Shape of the network's grid for a cropped image of `shape` and `spacing_mm` (network axes)."""
    z, y, x = shape
    if configuration.resampling_data.function == "none":
        return z, y, x
    return resampled_shape(shape, spacing_mm, network_spacing_mm(spacing_mm, configuration))


def preprocess(
    cropped: CroppedImage,
    plans: Plans,
    configuration: Configuration,
    *,
    previous_labels: NDArray[np.integer[Any]] | None = None,
    previous_foreground: Sequence[int] = (),
    threads: RowThreads | None = None,
) -> FloatArray:
    """The network's input: float32 (C, Z, Y, X), contiguous, on the network's grid.

    `previous_labels` (cascade) is the label map of the previous stage over `cropped.full_shape`; one channel for each
    label of `previous_foreground` is appended. Raises InputRejected when the number of channels is not the plans'.
    """
    normalized, labels = _normalized(cropped, plans, configuration, previous_labels)
    image = _image_on_grid(normalized, configuration, threads)
    if labels is None:
        return image
    labels = _labels_on_grid(labels, normalized, configuration)
    return stack_labels(image, labels, previous_foreground)


def stack_labels(image: FloatArray, labels: NDArray[np.integer[Any]], foreground: Sequence[int]) -> FloatArray:
    """A cascade's input: the image (C, Z, Y, X) and after it a channel for each label of `foreground`, 1 where the
    previous stage's label map (Z, Y, X) has it."""
    one_hot = np.stack([labels == label for label in foreground]).astype(np.float32)
    return np.concatenate([image, one_hot])


def preprocess_labelled(
    cropped: CroppedImage,
    plans: Plans,
    configurations: Sequence[Configuration],
    labels: NDArray[np.integer[Any]],
) -> Iterator[tuple[Configuration, FloatArray, NDArray[np.int16]]]:
    """A training case for each configuration: the image as `preprocess` makes it, and its label map int16 (Z, Y, X) on
    the same grid. The image of `cropped` may be used up (normalised in place), to need no second one.

    `labels` is over `cropped.full_shape`, in network axes. Background outside the nonzero region becomes -1, as in
    nnU-Net; foreground keeps its label wherever it lies. Raises InputRejected as `preprocess` does.
    """
    by_normalization: dict[Any, list[Configuration]] = {}
    for configuration in configurations:
        key = (configuration.normalization_schemes, configuration.use_mask_for_norm)
        by_normalization.setdefault(key, []).append(configuration)
    while by_normalization:
        alike = by_normalization.pop(next(iter(by_normalization)))
        is_last = not by_normalization
        normalized, mapped = _normalized(cropped, plans, alike[0], labels, in_place=is_last)
        if mapped is None:
            raise ValueError("a label map went in and none came out")
        if is_last:  # from here on the sources' memory is free, where the caller does not hold them
            cropped, labels = normalized, mapped
        for configuration in alike:
            image = _image_on_grid(normalized, configuration)
            yield configuration, image, _labels_on_grid(mapped, normalized, configuration).astype(np.int16, copy=False)
            del image


def _normalized(
    cropped: CroppedImage,
    plans: Plans,
    configuration: Configuration,
    whole_labels: NDArray[np.integer[Any]] | None,
    *,
    in_place: bool = False,
) -> tuple[CroppedImage, NDArray[np.integer[Any]] | None]:
    """The crop with a contiguous, normalised image (the same array where `in_place` and possible), and of the labels
    what lies in it, in the smallest signed type, with OUTSIDE."""
    channels = len(configuration.normalization_schemes)
    if cropped.image.shape[0] != channels:
        raise InputRejected(f"the image has {cropped.image.shape[0]} channel(s), the model takes {channels}")
    image = np.ascontiguousarray(cropped.image) if in_place else np.array(cropped.image, order="C")
    labels: NDArray[np.integer[Any]] | None = None
    inside: NDArray[np.bool_] | None = None
    if any(configuration.use_mask_for_norm) or whole_labels is not None:
        inside = _filled_nonzero(image)
    if whole_labels is not None and inside is not None:
        labels = whole_labels[cropped.box]
        labels = labels.astype(np.promote_types(np.min_scalar_type(int(labels.max())), np.int8))
        labels[(labels == 0) & ~inside] = OUTSIDE
        # As in nnU-Net, foreground outside the nonzero region counts as inside.
        inside = labels >= 0 if any(configuration.use_mask_for_norm) else None
    for index, (scheme, masked) in enumerate(
        zip(configuration.normalization_schemes, configuration.use_mask_for_norm, strict=True)
    ):
        normalize(
            image[index],
            scheme,
            inside=inside if masked else None,
            properties=plans.foreground_intensity_properties.get(index),
        )
    return replace(cropped, image=image), labels


def _image_on_grid(
    normalized: CroppedImage, configuration: Configuration, threads: RowThreads | None = None
) -> FloatArray:
    shape = network_shape(normalized.shape, normalized.spacing_mm, configuration)
    spacing = network_spacing_mm(normalized.spacing_mm, configuration)
    return resample_image(
        normalized.image, shape, normalized.spacing_mm, spacing, configuration.resampling_data, threads
    )


def _labels_on_grid(
    labels: NDArray[np.integer[Any]], normalized: CroppedImage, configuration: Configuration
) -> NDArray[np.integer[Any]]:
    shape = network_shape(normalized.shape, normalized.spacing_mm, configuration)
    spacing = network_spacing_mm(normalized.spacing_mm, configuration)
    return resample_labels(labels, shape, normalized.spacing_mm, spacing, configuration.resampling_seg)


def _filled_nonzero(image: FloatArray) -> NDArray[np.bool_]:
    """What is not 0 in any channel, holes filled. Filling inside the crop equals filling before it: all that lies
    outside the box is connected to the border of the whole array."""
    nonzero = np.zeros(image.shape[1:], dtype=np.bool_)
    for channel in image:
        nonzero |= channel != 0
    return nonzero if nonzero.all() else ndimage.binary_fill_holes(nonzero)
