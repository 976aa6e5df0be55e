"""nnU-Net's resampling of images, label maps and logits (nnU-Net v2).

Arrays are (C, Z, Y, X) or (Z, Y, X), spacings and shapes in the same axis order. Half-pixel centres, edges repeated,
no anti-aliasing. An axis that is much coarser than the others is resampled apart from the plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engine.plans import ResamplingKwargs
from engine.row_threads import RowThreads

FloatArray = NDArray[np.float32]
Shape = tuple[int, int, int]

# nnU-Net's threshold: coarsest over finest spacing beyond which an axis is resampled apart.
_ANISOTROPY = 3.0
# Relative error of a spacing that was computed from an affine.
_NOISE = 1e-5
# Weight of a sample below which it changes no float32: a spline's reach has no end, but fades fast.
_NEGLIGIBLE = 1e-12


def resampled_shape(shape: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]) -> Shape:
    """Shape of the grid with the new spacing; halves are rounded to even, as in nnU-Net.

    The inner rounding keeps a half a half when the spacing carries the noise of an affine (1e-7 of its value).
    """
    z, y, x = (
        max(1, round(round(old / new * size, 5)))
        for old, new, size in zip(spacing_mm, new_spacing_mm, shape, strict=True)
    )
    return z, y, x


def separate_axis(
    spacing_mm: Sequence[float], new_spacing_mm: Sequence[float], force_separate_z: bool | None = None
) -> int | None:
    """The axis that is resampled apart from the plane, or None.

    The current spacing decides first, then the new one; when two or three axes tie for the coarsest, none is apart.
    """
    for spacing, forced in ((spacing_mm, force_separate_z is True), (new_spacing_mm, False)):
        if force_separate_z is False:
            return None
        coarsest = max(spacing)
        if forced or coarsest / min(spacing) > _ANISOTROPY * (1 + _NOISE):
            axes = [axis for axis, value in enumerate(spacing) if value >= coarsest * (1 - _NOISE)]
            return axes[0] if len(axes) == 1 else None
    return None


@dataclass(frozen=True, eq=False)
class LinearAxis:
    """Order-1 interpolation along one axis: r[i] = (1 - weight[i]) * source[low[i]] + weight[i] * source[high[i]]."""

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    weight: FloatArray

    def matrix(self, size: int) -> FloatArray:
        """The same as a dense (size, n) matrix to multiply from the right."""
        matrix = np.zeros((size, len(self.low)), dtype=np.float32)
        columns = np.arange(len(self.low))
        np.add.at(matrix, (self.low, columns), 1.0 - self.weight)
        np.add.at(matrix, (self.high, columns), self.weight)
        return matrix


def linear_axis(size: int, new_size: int, *, nearest: bool = False) -> LinearAxis:
    """Where each of `new_size` samples lies among `size`, by half-pixel centres; nearest picks floor(c + 0.5)."""
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    if nearest:
        index = np.clip(np.floor(centre + 0.5), 0, size - 1).astype(np.intp)
        return LinearAxis(index, index, np.zeros(new_size, dtype=np.float32))
    centre = np.clip(centre, 0, size - 1)
    low = np.floor(centre).astype(np.intp)
    return LinearAxis(low, np.minimum(low + 1, size - 1), (centre - low).astype(np.float32))


def resample_image(
    image: FloatArray,
    new_shape: Shape,
    spacing_mm: Sequence[float],
    new_spacing_mm: Sequence[float],
    rule: ResamplingKwargs,
    threads: RowThreads | None = None,
) -> FloatArray:
    """A float32 (C, Z, Y, X) image on the new grid; the array itself when nothing changes. `threads` share the work
    and change no value."""
    if rule.function == "none" or image.shape[1:] == new_shape:
        return image
    apart = separate_axis(spacing_mm, new_spacing_mm, rule.force_separate_z)
    result = np.empty((image.shape[0], *new_shape), dtype=np.float32)
    for channel, target in zip(image, result, strict=True):
        if rule.function == "torch" or (apart is None and rule.order == 1):
            target[...] = _linear(channel, new_shape, apart)
        elif apart is None:
            _spline_separable(channel, target, rule.order, threads or RowThreads(1))
        else:
            _spline_apart(channel, target, rule.order, rule.order_z, apart)
    return result


def resample_labels(
    labels: NDArray[np.integer[Any]],
    new_shape: Shape,
    spacing_mm: Sequence[float],
    new_spacing_mm: Sequence[float],
    rule: ResamplingKwargs,
) -> NDArray[np.integer[Any]]:
    """An integer (Z, Y, X) label map on the new grid, -1 (outside the nonzero region) allowed.

    The label with the largest interpolated mask. `default`: between labels that tie, the nearest voxel's if it is one
    of them, else the lowest; so in nnU-Net with batchgenerators 0.25.5 (earlier versions took every label that reached
    0.5, the last one winning, and left 0 where none did). `torch`: the lowest.
    """
    if rule.function == "none" or labels.shape == new_shape:
        return labels
    apart = separate_axis(spacing_mm, new_spacing_mm, rule.force_separate_z)
    if rule.function == "torch":
        return _labels_by_largest(labels, new_shape, apart)
    if apart is None:
        return _labels_by_share(labels, new_shape, rule.order)
    plane_shape = list(new_shape)
    plane_shape[apart] = labels.shape[apart]
    in_plane = np.empty(plane_shape, dtype=labels.dtype)
    flat = tuple(size for axis, size in enumerate(new_shape) if axis != apart)
    for index in range(labels.shape[apart]):
        where = _at(apart, index)
        in_plane[where] = _labels_by_share(labels[where], flat, rule.order)
    size, new_size = labels.shape[apart], new_shape[apart]
    if size == new_size:
        return in_plane
    if rule.order_z == 0:
        return in_plane.take(linear_axis(size, new_size, nearest=True).low, axis=apart)
    result = np.zeros(new_shape, dtype=labels.dtype)
    for label in np.unique(in_plane):
        mask = _spline_along((in_plane == label).astype(np.float64), new_size, rule.order_z, apart)
        result[np.round(mask) > 0.5] = label
    return result


def _at(axis: int, index: int) -> tuple[slice | int, ...]:
    return tuple(index if i == axis else slice(None) for i in range(3))


def _spline(array: NDArray[Any], new_shape: Sequence[int], order: int) -> NDArray[Any]:
    """Spline resize of a 2D or 3D array, clipped to its own range (a cubic overshoots)."""
    if array.shape == tuple(new_shape):
        return array
    factors = [new / old for new, old in zip(new_shape, array.shape, strict=True)]
    result: NDArray[Any] = ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)
    if order > 1:
        np.clip(result, array.min(), array.max(), out=result)
    return result


def _spline_separable(channel: FloatArray, target: FloatArray, order: int, threads: RowThreads) -> None:
    """`_spline` of a 3D array in float64, plane by plane and then along the first axis: a third of the time, and no
    padded and filtered copies of the whole array."""
    low, high = channel.min(), channel.max()
    size, new_size = len(channel), len(target)
    factors = [new / old for new, old in zip(target.shape[1:], channel.shape[1:], strict=True)]
    in_plane = np.empty((size, *target.shape[1:]), dtype=np.float64) if size != new_size else target

    def resample_plane(index: int) -> None:
        if channel[index].shape == in_plane[index].shape:
            in_plane[index] = channel[index]
        else:
            ndimage.zoom(channel[index], factors, in_plane[index], order=order, mode="nearest", grid_mode=True)

    threads.each(resample_plane, range(size))
    if size != new_size:
        matrix = _spline_matrix(size, new_size, order)

        def blend_planes(index: int) -> None:
            near = np.flatnonzero(np.abs(matrix[index]) > _NEGLIGIBLE)
            part = slice(near[0], near[-1] + 1)
            target[index] = np.einsum("z,zyx->yx", matrix[index, part], in_plane[part])

        threads.each(blend_planes, range(new_size))
    if order > 1:
        np.clip(target, low, high, out=target)


@lru_cache(maxsize=16)
def _spline_matrix(size: int, new_size: int, order: int) -> NDArray[np.float64]:
    """`_spline` along one axis, unclipped, as a (new_size, size) matrix: column i is what becomes of a 1 at i."""
    factor = new_size / size
    columns = [ndimage.zoom(one, factor, order=order, mode="nearest", grid_mode=True) for one in np.eye(size)]
    return np.stack(columns, axis=1)


def _spline_apart(channel: FloatArray, target: FloatArray, order: int, order_z: int, apart: int) -> None:
    """Slice by slice in the plane, then along the coarse axis with its own order."""
    plane_shape = list(target.shape)
    plane_shape[apart] = channel.shape[apart]
    in_plane = np.empty(plane_shape, dtype=np.float32)
    flat = [size for axis, size in enumerate(target.shape) if axis != apart]
    for index in range(channel.shape[apart]):
        where = _at(apart, index)
        in_plane[where] = _spline(channel[where], flat, order)
    size, new_size = channel.shape[apart], target.shape[apart]
    if size == new_size:
        target[...] = in_plane
    elif order_z == 0:
        np.take(in_plane, linear_axis(size, new_size, nearest=True).low, axis=apart, out=target)
    else:
        target[...] = _spline_along(in_plane, new_size, order_z, apart)


def _spline_along(array: NDArray[Any], new_size: int, order: int, axis: int) -> NDArray[Any]:
    factors = [1.0, 1.0, 1.0]
    factors[axis] = new_size / array.shape[axis]
    result: NDArray[Any] = ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)
    return result


def _linear(array: FloatArray, new_shape: Sequence[int], apart: int | None = None) -> FloatArray:
    """Separable order-1 interpolation of a 3D array; along `apart` the nearest sample."""
    result = array
    for axis, new_size in enumerate(new_shape):
        size = result.shape[axis]
        if size == new_size:
            continue
        along = linear_axis(size, new_size, nearest=axis == apart)
        low = result.take(along.low, axis=axis)
        if axis != apart:
            weight = along.weight.reshape([-1 if i == axis else 1 for i in range(3)])
            low += (result.take(along.high, axis=axis) - low) * weight
        result = low
    return result


def _labels_by_share(labels: NDArray[Any], new_shape: Sequence[int], order: int) -> NDArray[Any]:
    """2D or 3D. Shares are float64 as in nnU-Net: which of them tie is decided to the last bit."""
    if labels.shape == tuple(new_shape):
        return labels
    if order == 1:
        lead = (1,) * (3 - labels.ndim)
        result = _labels_by_linear_share(labels.reshape(*lead, *labels.shape), (*lead, *new_shape))
        return result.reshape(new_shape)
    factors = [new / old for new, old in zip(new_shape, labels.shape, strict=True)]
    nearest: NDArray[Any] = ndimage.zoom(labels, factors, order=0, mode="nearest", grid_mode=True)
    if order == 0:
        return nearest
    result = np.zeros(tuple(new_shape), dtype=labels.dtype)
    best = np.full(tuple(new_shape), -np.inf)
    of_nearest = np.zeros(tuple(new_shape))
    for label in np.unique(labels):
        share = _spline((labels == label).astype(np.float64), new_shape, order)
        np.copyto(of_nearest, share, where=nearest == label)
        np.copyto(result, label, where=share > best)
        np.maximum(best, share, out=best)
    np.copyto(result, nearest, where=of_nearest == best)
    return result


def _labels_by_linear_share(labels: NDArray[Any], new_shape: Sequence[int]) -> NDArray[Any]:
    """Order 1 in 3D, at the cost of one label: a sample lies between 8 voxels, and where these have one label it is
    that one. Elsewhere their weights are summed up per label, in scipy's order of operations."""
    along_z, along_y, along_x = (_Neighbours.of(size, new) for size, new in zip(labels.shape, new_shape, strict=True))
    result = np.empty(new_shape, dtype=labels.dtype)
    corners: dict[int, list[NDArray[Any]]] = {}  # by plane of voxels; neighbouring samples share planes

    def corners_of(z: int) -> list[NDArray[Any]]:
        if z in corners:
            return corners[z]
        rows = [labels[z].take(y, axis=0) for y in (along_y.low, along_y.high)]
        return [row.take(x, axis=1) for row in rows for x in (along_x.low, along_x.high)]

    for index, plane in enumerate(result):
        below, above = int(along_z.low[index]), int(along_z.high[index])
        corners = {z: corners_of(z) for z in (below, above)}
        around = [*corners[below], *corners[above]]
        mixed = np.zeros(plane.shape, dtype=np.bool_)
        for corner in around[1 : 4 if below == above else 8]:
            mixed |= corner != around[0]
        plane[...] = labels[along_z.nearest[index]].take(along_y.nearest, axis=0).take(along_x.nearest, axis=1)
        rows, columns = np.nonzero(mixed)
        if rows.size:
            values = np.stack([corner[rows, columns] for corner in around])
            weights = [
                z * y * x
                for z in along_z.weights(index)
                for y in along_y.weights(rows)
                for x in along_x.weights(columns)
            ]
            plane[rows, columns] = _with_most_weight(values, weights, nearest=plane[rows, columns])
    return result


def _with_most_weight(values: NDArray[Any], weights: Sequence[Any], *, nearest: NDArray[Any]) -> NDArray[Any]:
    """Of the (8, n) labels around n samples; `nearest` where it is one of those that tie, else the lowest of them."""
    shares = np.zeros(values.shape)
    for value, weight in zip(values, weights, strict=True):
        shares += np.where(values == value, weight, 0.0)
    tied = shares == shares.max(axis=0)
    lowest = np.where(tied, values, values.max()).min(axis=0)
    found: NDArray[Any] = np.where((tied & (values == nearest)).any(axis=0), nearest, lowest)
    return found


@dataclass(frozen=True, eq=False)
class _Neighbours:
    """Of each sample along one axis: the voxels on both sides (at an edge one voxel twice), the weight of the second in
    float64, and the nearest. As in scipy's zoom, bit by bit."""

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    weight: NDArray[np.float64]
    nearest: NDArray[np.intp]

    @classmethod
    def of(cls, size: int, new_size: int) -> _Neighbours:
        centre = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
        low = np.floor(centre)
        between = centre > low
        low, high, nearest = (
            np.clip(index, 0, size - 1).astype(np.intp) for index in (low, low + between, np.floor(centre + 0.5))
        )
        return cls(low, high, centre - np.floor(centre), nearest)

    def weights(self, samples: Any) -> tuple[Any, Any]:
        """Of the first and the second voxel."""
        second = self.weight[samples]
        return 1.0 - second, second


def _labels_by_largest(labels: NDArray[Any], new_shape: Shape, apart: int | None) -> NDArray[Any]:
    result = np.zeros(new_shape, dtype=labels.dtype)
    best = np.full(new_shape, -1.0, dtype=np.float32)
    for label in np.unique(labels):
        weight = _linear((labels == label).astype(np.float32), new_shape, apart)
        better = weight > best
        result[better] = label
        best[better] = weight[better]
    return result
