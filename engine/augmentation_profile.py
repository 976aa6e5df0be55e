"""What augmentation does, as data: two profiles, the geometry of a configuration, and the draws for one sample.

Order and ranges of `NNUNET` are nnU-Net 2.8's (nnU-Net v2); `ARTICLE` has the ranges of ART-09.
Axes are in network order; C image channels. Nothing here touches an image or needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Range = tuple[float, float]
MorphologyOperator = Literal["dilate", "erode", "close", "open"]

_OPERATORS: tuple[MorphologyOperator, ...] = ("dilate", "erode", "close", "open")
_ANISOTROPIC = 3.0
_SCALE_MARGIN = 0.85  # nnU-Net's, although its own scaling goes down to 0.7


@dataclass(frozen=True, kw_only=True)
class AugmentationProfile:
    """Probabilities per sample (`_channel_`: then per channel) and ranges, drawn uniformly; `brightness`, `contrast`
    and `gamma` draw from the part below 1 and the part above 1 alike often.

    `rotation_degrees`: None is nnU-Net's rule by the patch (`rotation_limit_degrees`). `scaling`: more than 1 shows
    more and makes things smaller; one factor for all axes unless `scaling_per_axis`. `elastic_grid_mm`: distance of
    the control points of a cubic B-spline; `elastic_sigma_mm`: standard deviation of their displacement. Noise and
    blur are in units of the normalised image and voxels, or with `noise_of_range` in parts of the channel's range,
    with `blur_in_mm` in millimetres.
    """

    rotation_probability: float
    rotation_degrees: float | None
    scaling_probability: float
    scaling: Range
    scaling_per_axis: bool
    elastic_probability: float
    elastic_grid_mm: float
    elastic_sigma_mm: Range
    noise_probability: float
    noise_sigma: Range
    noise_of_range: bool
    blur_probability: float
    blur_channel_probability: float
    blur_sigma: Range
    blur_in_mm: bool
    brightness_probability: float
    brightness: Range
    contrast_probability: float
    contrast: Range
    low_resolution_probability: float
    low_resolution_channel_probability: float
    low_resolution_zoom: Range
    inverted_gamma_probability: float
    gamma_probability: float
    gamma: Range
    mirror_probability: float


NNUNET = AugmentationProfile(
    rotation_probability=0.2,
    rotation_degrees=None,
    scaling_probability=0.2,
    scaling=(0.7, 1.4),
    scaling_per_axis=False,
    elastic_probability=0.0,
    elastic_grid_mm=30.0,
    elastic_sigma_mm=(0.0, 0.0),
    noise_probability=0.1,
    noise_sigma=(0.0, 0.1),
    noise_of_range=False,
    blur_probability=0.2,
    blur_channel_probability=0.5,
    blur_sigma=(0.5, 1.0),
    blur_in_mm=False,
    brightness_probability=0.15,
    brightness=(0.75, 1.25),
    contrast_probability=0.15,
    contrast=(0.75, 1.25),
    low_resolution_probability=0.25,
    low_resolution_channel_probability=0.5,
    low_resolution_zoom=(0.5, 1.0),
    inverted_gamma_probability=0.1,
    gamma_probability=0.3,
    gamma=(0.7, 1.5),
    mirror_probability=0.5,
)
"""nnU-Net's own."""

ARTICLE = AugmentationProfile(
    # The article gives ranges; probabilities that it does not give are nnU-Net's for the like transform, and control
    # points move by up to 3 mm (one standard deviation), a tenth of their distance, which cannot fold the image.
    rotation_probability=0.2,
    rotation_degrees=15.0,
    scaling_probability=0.2,
    scaling=(0.9, 1.1),
    scaling_per_axis=True,
    elastic_probability=0.2,
    elastic_grid_mm=30.0,
    elastic_sigma_mm=(0.0, 3.0),
    noise_probability=0.1,
    noise_sigma=(0.01, 0.01),
    noise_of_range=True,
    # Low resolution is a blur of 1 mm here, not a change of grid.
    blur_probability=0.25,
    blur_channel_probability=0.5,
    blur_sigma=(1.0, 1.0),
    blur_in_mm=True,
    brightness_probability=0.15,
    brightness=(0.95, 1.05),
    contrast_probability=0.15,
    contrast=(0.9, 1.1),
    low_resolution_probability=0.0,
    low_resolution_channel_probability=0.0,
    low_resolution_zoom=(1.0, 1.0),
    inverted_gamma_probability=0.0,
    gamma_probability=0.3,
    gamma=(0.8, 1.2),
    mirror_probability=0.5,
)
"""The article's (ART-09)."""


@dataclass(frozen=True, kw_only=True)
class AugmentationPlan:
    """A profile on the data of one configuration.

    `patch_size`, `spacing_mm`: as in the plans, 2 or 3 entries. `mirror_axes`: axes that may be mirrored. Mirroring
    along `lateral_axis` swaps the labels of `paired_labels` (left and right); None where sides do not matter or the
    axis is not mirrored. `masked_channels`: image channels that are 0 outside the nonzero mask. `previous_labels`:
    foreground labels of the previous stage in a cascade, each of which becomes a channel.
    """

    profile: AugmentationProfile
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    mirror_axes: tuple[int, ...]
    lateral_axis: int | None = None
    paired_labels: tuple[tuple[int, int], ...] = ()
    masked_channels: tuple[int, ...] = ()
    previous_labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        dimensions = len(self.patch_size)
        if dimensions not in (2, 3) or len(self.spacing_mm) != dimensions:
            raise ValueError(f"patch {self.patch_size}, spacing {self.spacing_mm}: both need 2 or 3 entries")
        if not set(self.mirror_axes) <= set(range(dimensions)):
            raise ValueError(f"mirror axes {self.mirror_axes}: the patch has axes 0 to {dimensions - 1}")
        if self.paired_labels and self.lateral_axis not in range(dimensions):
            raise ValueError(f"paired labels need the lateral axis, not {self.lateral_axis}")

    @property
    def inference_mirror_axes(self) -> tuple[int, ...]:
        """Axes along which predictions may be mirrored: not one with which labels change places."""
        return tuple(axis for axis in self.mirror_axes if not (self.paired_labels and axis == self.lateral_axis))

    @property
    def is_dummy_2d(self) -> bool:
        """True where the patch is so flat that rotation and scaling act in the plane, on all slices alike."""
        return len(self.patch_size) == 3 and max(self.patch_size) / self.patch_size[0] > _ANISOTROPIC

    @property
    def spatial_dimensions(self) -> int:
        """How many axes, the last ones, rotation and scaling act on."""
        return 2 if self.is_dummy_2d else len(self.patch_size)

    @property
    def rotation_degrees(self) -> float:
        if self.profile.rotation_degrees is not None:
            return self.profile.rotation_degrees
        return rotation_limit_degrees(self.patch_size)

    @property
    def initial_patch_size(self) -> tuple[int, ...]:
        """What has to be read around the patch, for rotation and scaling."""
        size = initial_patch_size(self.patch_size, self.rotation_degrees)
        return (self.patch_size[0], *size[1:]) if self.is_dummy_2d else size


def rotation_limit_degrees(patch_size: Sequence[int]) -> float:
    """nnU-Net's greatest angle: 180 in the plane, 15 in an elongated one, 30 in space."""
    if len(patch_size) == 2:
        return 15.0 if max(patch_size) / min(patch_size) > 1.5 else 180.0
    return 180.0 if max(patch_size) / patch_size[0] > _ANISOTROPIC else 30.0


def initial_patch_size(patch_size: Sequence[int], rotation_degrees: float) -> tuple[int, ...]:
    """nnU-Net's: the patch's vector turned about one axis after the other (by at most 90°), the greatest of each
    component, divided by 0.85."""
    angle = math.radians(min(rotation_degrees, 90.0))
    sine, cosine = math.sin(angle), math.cos(angle)
    vector = np.asarray(patch_size, dtype=np.float64)
    turned = [vector]
    # (i, j): the plane of rotation, with nnU-Net's sense of it for each axis.
    for i, j in ((1, 2), (2, 0), (0, 1)) if len(vector) == 3 else ((0, 1),):
        other = vector.copy()
        other[i] = vector[i] * cosine + vector[j] * sine
        other[j] = vector[j] * cosine - vector[i] * sine
        turned.append(abs(other))
    largest = np.max(turned, axis=0) / _SCALE_MARGIN
    return tuple(int(size) for size in largest)


@dataclass(frozen=True, kw_only=True)
class PreviousStageDraw:
    """What happens to the previous stage's labels, by index into `previous_labels`, in this order: morphology (label,
    operator, radius of the ball in voxels), then removal of one component (label, number from 0 to 1 that picks it).
    """

    morphology: tuple[tuple[int, MorphologyOperator, float], ...] = ()
    removals: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleDraw:
    """All that is random about one sample; None (or empty) is what was not drawn. The default changes nothing.

    `angles_rad`: one per rotation (three in space, about axes 0, 1 and 2; one in the plane). `scales`: one per spatial
    axis. `control_points`: displacement in voxels, (axes, points...). Per channel: `blur_sigmas` (voxels, per axis),
    `brightness`, `contrast`, `zooms`, `inverted_gamma`, `gamma`. `noise_seed` seeds the field of noise.
    """

    angles_rad: tuple[float, ...] | None = None
    scales: tuple[float, ...] | None = None
    control_points: NDArray[np.float32] | None = None
    noise_sigma: float | None = None
    noise_seed: int = 0
    blur_sigmas: tuple[tuple[float, ...] | None, ...] = ()
    brightness: tuple[float, ...] = ()
    contrast: tuple[float, ...] = ()
    zooms: tuple[float | None, ...] = ()
    inverted_gamma: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()
    mirrored_axes: tuple[int, ...] = ()
    previous_stage: PreviousStageDraw = PreviousStageDraw()

    @property
    def is_spatial(self) -> bool:
        """False where the middle of the patch is all that is needed."""
        return self.angles_rad is not None or self.scales is not None or self.control_points is not None


def draw_sample(plan: AugmentationPlan, channels: int, rng: np.random.Generator) -> SampleDraw:
    """The draws for one sample of `channels` image channels; the generator should belong to this sample alone
    (engine/random_state.py)."""
    profile, axes = plan.profile, plan.spatial_dimensions

    def happens(probability: float) -> bool:
        return bool(rng.random() < probability)

    def uniform(limits: Range) -> float:
        return float(rng.uniform(*limits))

    def around_one(limits: Range) -> float:
        low, high = limits
        return uniform((low, 1.0)) if low < 1.0 and happens(0.5) else uniform((max(low, 1.0), high))

    def per_channel(probability: float, limits: Range) -> tuple[float, ...]:
        return tuple(around_one(limits) for _ in range(channels)) if happens(probability) else ()

    angles_rad: tuple[float, ...] | None = None
    scales: tuple[float, ...] | None = None
    control_points: NDArray[np.float32] | None = None
    blur_sigmas: tuple[tuple[float, ...] | None, ...] = ()
    zooms: tuple[float | None, ...] = ()
    if happens(profile.rotation_probability):
        limit = math.radians(plan.rotation_degrees)
        angles_rad = tuple(uniform((-limit, limit)) for _ in range(3 if axes == 3 else 1))
    if happens(profile.scaling_probability):
        if profile.scaling_per_axis:
            scales = tuple(uniform(profile.scaling) for _ in range(axes))
        else:
            scales = (uniform(profile.scaling),) * axes
    if happens(profile.elastic_probability):
        control_points = _control_points(plan, uniform(profile.elastic_sigma_mm), rng)
    noise_sigma = uniform(profile.noise_sigma) if happens(profile.noise_probability) else None
    noise_seed = int(rng.integers(2**63))
    if happens(profile.blur_probability):
        mm = plan.spacing_mm if profile.blur_in_mm else (1.0,) * len(plan.patch_size)
        blur_sigmas = tuple(
            tuple(uniform(profile.blur_sigma) / step for step in mm)
            if happens(profile.blur_channel_probability)
            else None
            for _ in range(channels)
        )
    brightness = per_channel(profile.brightness_probability, profile.brightness)
    contrast = per_channel(profile.contrast_probability, profile.contrast)
    if happens(profile.low_resolution_probability):
        zooms = tuple(
            uniform(profile.low_resolution_zoom) if happens(profile.low_resolution_channel_probability) else None
            for _ in range(channels)
        )
    return SampleDraw(
        angles_rad=angles_rad,
        scales=scales,
        control_points=control_points,
        noise_sigma=noise_sigma,
        noise_seed=noise_seed,
        blur_sigmas=blur_sigmas,
        brightness=brightness,
        contrast=contrast,
        zooms=zooms,
        inverted_gamma=per_channel(profile.inverted_gamma_probability, profile.gamma),
        gamma=per_channel(profile.gamma_probability, profile.gamma),
        mirrored_axes=tuple(axis for axis in plan.mirror_axes if happens(profile.mirror_probability)),
        previous_stage=_draw_previous_stage(len(plan.previous_labels), rng),
    )


def _control_points(plan: AugmentationPlan, sigma_mm: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Independent normal displacements; a cubic B-spline needs one point before and two after the patch's span."""
    axes = plan.spatial_dimensions
    spacing_mm = plan.spacing_mm[-axes:]
    points = [
        int((size - 1) * mm / plan.profile.elastic_grid_mm) + 4
        for size, mm in zip(plan.patch_size[-axes:], spacing_mm, strict=True)
    ]
    displacement_mm = rng.normal(0.0, sigma_mm, (axes, *points))
    in_voxels: NDArray[np.float64] = displacement_mm / np.reshape(spacing_mm, (axes, *(1,) * axes))
    return in_voxels.astype(np.float32)


def _draw_previous_stage(labels: int, rng: np.random.Generator) -> PreviousStageDraw:
    """nnU-Net's, for a cascade in every profile: 0.4 morphology, 0.2 a component less, each label with 0.5."""
    if not labels:
        return PreviousStageDraw()
    morphology: tuple[tuple[int, MorphologyOperator, float], ...] = ()
    removals: tuple[tuple[int, float], ...] = ()
    if rng.random() < 0.4:
        morphology = tuple(
            (int(label), _OPERATORS[rng.integers(len(_OPERATORS))], float(rng.uniform(1.0, 8.0)))
            for label in rng.permutation(labels)
            if rng.random() < 0.5
        )
    if rng.random() < 0.2:
        removals = tuple((int(label), float(rng.random())) for label in rng.permutation(labels) if rng.random() < 0.5)
    return PreviousStageDraw(morphology=morphology, removals=removals)
