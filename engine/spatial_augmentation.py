"""Rotation, scaling, elastic deformation and mirroring of one sample (torch, on the device of the sample).

Everything spatial is one map from the voxels of the patch to places in the initial patch, centre to centre: deform,
then scale, then rotate. Images are interpolated linearly with 0 beyond the border; labels take the label with the
greatest share of the 4 or 8 surrounding voxels, with -1 beyond the border. Where nothing was drawn the middle of the
initial patch is cut out.

Shape legend: C channels, D = 2 or 3 spatial axes of the map, L slices that share the map (dummy 2D), else 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engine.augmentation_profile import AugmentationPlan, SampleDraw

OUTSIDE = -1
"""Label of what lies outside the image or its nonzero mask."""

_MIXED = -2  # stands for a cell whose corners have different labels
_AT_ONCE = 2**14  # voxels whose corners are compared together


def transform_sample(image: Tensor, labels: Tensor, draw: SampleDraw, plan: AugmentationPlan) -> tuple[Tensor, Tensor]:
    """Image (C, *initial) float32 and label maps (M, *initial) int16 → (C, *patch) and (M, *patch), new tensors.

    A sample that is not `draw.is_spatial` may have any size from the patch's on.
    """
    size = plan.patch_size
    if not draw.is_spatial:
        image, labels = centre_crop(image, size).clone(), centre_crop(labels, size).clone()
    else:
        axes = plan.spatial_dimensions
        places = source_places(draw, plan, image.shape[-axes:], image.device)
        image = sample_image(image, places).reshape(image.shape[0], *size)
        labels = sample_labels(labels.reshape(-1, *labels.shape[-axes:]), places).reshape(labels.shape[0], *size)
    return mirror(image, labels, draw, plan)


def centre_crop(array: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of the last axes, as a view; nnU-Net's choice of the middle where it falls between two voxels."""
    for axis, edge in enumerate(size, start=array.ndim - len(size)):
        array = array.narrow(axis, array.shape[axis] // 2 - edge // 2, edge)
    return array


def affine_matrix(angles_rad: Sequence[float] | None, scales: Sequence[float] | None, axes: int) -> NDArray[np.float64]:
    """(D, D): takes a voxel's offset from the patch's centre to its offset in the initial patch. Scales first, then
    turns about axis 0, 1 and 2 (in the plane: once), as nnU-Net does."""
    matrix = np.diag(np.asarray(scales if scales is not None else (1.0,) * axes, dtype=np.float64))
    planes = ((1, 2), (2, 0), (0, 1)) if axes == 3 else ((0, 1),)
    for angle, (i, j) in zip(angles_rad if angles_rad is not None else (), planes, strict=False):
        turn = np.eye(axes)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[j, i] = math.sin(angle)
        turn[i, j] = -math.sin(angle)
        matrix = turn @ matrix
    return matrix


def source_places(draw: SampleDraw, plan: AugmentationPlan, initial: Sequence[int], device: torch.device) -> Tensor:
    """(D, *patch): for each voxel of the patch the place in the initial patch, in voxels of it."""
    axes = plan.spatial_dimensions
    size = plan.patch_size[-axes:]
    matrix = affine_matrix(draw.angles_rad, draw.scales, axes)
    lines = [
        torch.arange(edge, device=device, dtype=torch.float32)
        .sub_((edge - 1) / 2)
        .reshape(-1, *(1,) * (axes - 1 - axis))
        for axis, edge in enumerate(size)
    ]
    offsets: list[Tensor] = lines
    if draw.control_points is not None:
        moved = _displacement(draw.control_points, plan, device)
        offsets = [line + shift for line, shift in zip(lines, moved, strict=True)]
    places = torch.empty((axes, *size), device=device)
    for row, edge, place in zip(matrix, initial, places, strict=True):
        # The centre of the initial patch, then one product per axis; without deformation only the last is a full one.
        total = offsets[0] * float(row[0]) + (edge - 1) / 2
        for factor, offset in zip(row[1:-1], offsets[1:-1], strict=True):
            total = total + offset * float(factor)
        torch.add(total, offsets[-1] * float(row[-1]), out=place)
    return places


def _displacement(control_points: NDArray[np.float32], plan: AugmentationPlan, device: torch.device) -> Tensor:
    """(D, *patch) in voxels: the cubic B-spline through its control points, one axis after the other."""
    axes = plan.spatial_dimensions
    field = torch.from_numpy(control_points).to(device)
    for size, mm in zip(plan.patch_size[-axes:], plan.spacing_mm[-axes:], strict=True):
        basis = _spline_basis(size, mm / plan.profile.elastic_grid_mm, field.shape[1]).to(device)
        field = torch.tensordot(field, basis, dims=([1], [0]))  # the axis goes to the end: after D turns all are back
    return field


def _spline_basis(size: int, step: float, points: int) -> Tensor:
    """(points, size): weight of each control point for each voxel; `step` is a voxel in units of their distance."""
    place = torch.arange(size, dtype=torch.float32) * step
    first = place.floor().clamp_max(points - 4)
    t = place - first
    weights = torch.stack(
        ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6)
    )
    return torch.zeros(points, size).scatter_(0, first.long() + torch.arange(4)[:, None], weights)


def sample_image(image: Tensor, places: Tensor) -> Tensor:
    """(..., *initial) float32 at places (D, *patch) → (leading axes as one, *patch): linear, 0 beyond the border."""
    axes = len(places)
    sizes = image.shape[-axes:]
    grid = torch.empty((1, *places.shape[1:], axes), device=places.device)
    for axis, size in enumerate(sizes):
        # grid_sample wants x first, and -1 and 1 at the outer edges of the outer voxels.
        torch.add((1.0 - size) / size, places[axis], alpha=2.0 / size, out=grid[0, ..., axes - 1 - axis])
    stacked = image.reshape(1, -1, *sizes)
    return functional.grid_sample(stacked, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def sample_labels(labels: Tensor, places: Tensor) -> Tensor:
    """(L, *initial) int16 at places (D, *patch) → (L, *patch): linear interpolation of each label's mask, and the label
    with the greatest value; a tie goes to the nearest voxel. -1 beyond the border. No mask is ever made: cells whose
    corners agree need no interpolation, and the others look at their corners only."""
    axes = len(places)
    padded = functional.pad(labels, (1, 2) * axes, value=OUTSIDE)
    low, high = padded, padded
    for axis in range(1, axes + 1):
        edge = padded.shape[axis] - 1
        low = torch.minimum(low.narrow(axis, 0, edge), low.narrow(axis, 1, edge))
        high = torch.maximum(high.narrow(axis, 0, edge), high.narrow(axis, 1, edge))
    cells = low.masked_fill(low != high, _MIXED)
    # Beyond one voxel from the border everything is outside.
    inner = [place.clamp(-1.0, float(size)) for place, size in zip(places, labels.shape[1:], strict=True)]
    corner = [place.floor() for place in inner]
    result = cells.flatten(1).index_select(1, _flat_index(corner, cells.shape[1:]).flatten())

    slices, voxels = (result == _MIXED).nonzero(as_tuple=True)
    if voxels.numel():
        lower = torch.stack(corner).flatten(1).index_select(1, voxels)
        upper_share = torch.stack(inner).flatten(1).index_select(1, voxels) - lower
        first = _flat_index(lower.unbind(), padded.shape[1:]) + slices * padded[0].numel()
        is_upper, steps = _corners(tuple(padded.stride()[1:]), padded.device)
        values, found = padded.flatten(), []
        for start in range(0, len(voxels), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            upper = upper_share[:, part]
            weights = torch.where(is_upper, upper, 1 - upper).prod(1)
            found.append(_heaviest(values[first[part] + steps], weights))
        result[slices, voxels] = torch.cat(found)
    return result.reshape(-1, *places.shape[1:])


@lru_cache
def _corners(strides: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The 2^D corners of a cell: whether each is the upper one on an axis (2^D, D, 1), and its distance from the first
    in a flat array (2^D, 1)."""
    offsets = torch.tensor(list(product((0, 1), repeat=len(strides))))
    steps = (offsets * torch.tensor(strides)).sum(1)
    return (offsets == 1)[:, :, None].to(device), steps[:, None].to(device)


def _flat_index(corner: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Index into an array that begins one voxel before voxel 0 on each axis."""
    total = torch.zeros_like(corner[0], dtype=torch.int32)
    for place, size in zip(corner, shape, strict=True):
        total.mul_(size).add_((place + 1).to(torch.int32))
    return total


def _heaviest(labels: Tensor, weights: Tensor) -> Tensor:
    """Labels and weights of the corners (2^D, V) → (V,): the label whose corners have the greatest weight together."""
    # nnU-Net compares in float16, where scores within half a thousandth are a tie, and then takes the nearest voxel's.
    together = (labels[:, None] == labels).mul(weights).sum(1)
    winner = together.add_(weights, alpha=5e-4).argmax(0, keepdim=True)
    return labels.gather(0, winner)[0]


def mirror(image: Tensor, labels: Tensor, draw: SampleDraw, plan: AugmentationPlan) -> tuple[Tensor, Tensor]:
    """Flips the drawn axes; along the lateral axis the labels of a pair change places."""
    if not draw.mirrored_axes:
        return image, labels
    axes = [axis + 1 for axis in draw.mirrored_axes]
    image, labels = image.flip(axes), labels.flip(axes)
    if plan.lateral_axis in draw.mirrored_axes and plan.paired_labels:
        labels = swap_labels(labels, plan.paired_labels)
    return image, labels


def swap_labels(labels: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """A new label map in which the two labels of each pair have changed places."""
    swapped = labels.clone()
    for left, right in pairs:
        swapped[labels == left] = right
        swapped[labels == right] = left
    return swapped
