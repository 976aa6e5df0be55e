"""An invented image for sanity cases: bodies of several brightnesses in a wavy background with noise, from a seed.

Only whole numbers are used up to the last step, which is one multiplication and one addition in float64: the same seed
gives the same bytes on every machine and with every release of numpy, so that a bundle holds the seed and not the
image. Nothing in it comes from a patient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.volume import Geometry, Volume, check_orientation, reorientation

MAX_EDGE = 1024
MAX_VOXELS = 2**26

_ONE = 1000
_BODIES = 12
_NOISE = 60
# Sine and cosine of the tilt of an oblique grid; a Pythagorean triple, so that the axes are exactly of length 1.
_TILT = (0.28, 0.96)
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """What decides every voxel.

    `shape` (z, y, x) and `spacing_mm` are those of an image in the voxel order `orientation`; the content is the same
    in `stored_orientation`, in which the voxels are given. `oblique`: the grid is tilted by 16 degrees against the
    patient's axes. `ranges`: per channel, the values of the darkest and the brightest voxel.
    """

    seed: int
    shape: tuple[int, int, int]
    spacing_mm: Triple
    orientation: str
    stored_orientation: str
    oblique: bool
    ranges: tuple[tuple[float, float], ...]


def make_phantom(phantom: Phantom) -> Volume:
    """The image. ValueError for an orientation that is none, or a shape beyond MAX_EDGE and MAX_VOXELS."""
    if not all(1 <= edge <= MAX_EDGE for edge in phantom.shape) or int(np.prod(phantom.shape)) > MAX_VOXELS:
        raise ValueError(f"phantom of {phantom.shape} voxels: at most {MAX_EDGE} an edge and {MAX_VOXELS} in all")
    channels = []
    for index, (low, high) in enumerate(phantom.ranges):
        levels = _levels(phantom.shape, phantom.seed, index)
        channels.append((levels * np.float64((high - low) / _ONE) + np.float64(low)).astype(np.float32))
    upright = Volume(array=np.stack(channels), geometry=_geometry(phantom))
    return upright.reoriented(check_orientation(phantom.stored_orientation))[0]


def _geometry(phantom: Phantom) -> Geometry:
    """Centred on the origin of the patient's coordinates, with the axes of `orientation`."""
    z, y, x = phantom.shape
    spacing = np.array(phantom.spacing_mm[::-1])
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    # The grid is made in LPS and turned: reorientation permutes and reverses axes and moves the origin with them.
    order = reorientation(Geometry(shape=(1, 1, 1), affine_lps=affine), check_orientation(phantom.orientation))
    turned = order.target.affine_lps[:3, :3]
    if phantom.oblique:
        sine, cosine = _TILT
        turned = np.array([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]]) @ turned
    affine[:3, :3] = turned * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.array([x, y, z]) - 1) / 2)
    return Geometry(shape=phantom.shape, affine_lps=affine)


def _levels(shape: tuple[int, int, int], seed: int, channel: int) -> NDArray[np.int64]:
    """Brightness from 0 to _ONE: (Z, Y, X) whole numbers. Bodies lie where they lie in every channel."""
    # From -_ONE to _ONE along each axis.
    places = [(2 * np.arange(edge, dtype=np.int64) + 1 - edge) * _ONE // edge for edge in shape]
    grids = [p.reshape([-1 if axis == own else 1 for axis in range(3)]) for own, p in enumerate(places)]
    shades = _Draws(seed, 1 + channel)
    levels = np.full(shape, 300, dtype=np.int64)
    for grid in grids:
        levels += _wave(grid * shades.between(1, 3) + shades.between(0, 4 * _ONE)) * 120 // _ONE
    bodies = _Draws(seed, 0)
    for index in range(_BODIES):
        # The first is large and in the middle; those that follow get smaller and lie on top of it.
        reach = 0 if index == 0 else 550
        radius = (850, 900) if index == 0 else (520 - 30 * index, 640 - 30 * index)
        inside = np.zeros((1, 1, 1), dtype=np.int64)
        for grid in grids:
            centre, size = bodies.between(-reach, reach), bodies.between(*radius)
            inside = inside + ((grid - centre) * _ONE // size) ** 2
        levels[inside <= _ONE * _ONE] = shades.between(150, 950)
        for grid in grids:
            levels += (inside <= _ONE * _ONE) * (_wave(grid * 2 + shades.between(0, 4 * _ONE)) * 40 // _ONE)
    noise = _scrambled(np.arange(levels.size, dtype=np.uint64), _key(seed, 1000 + channel)).reshape(shape)
    levels += (noise >> np.uint64(40)).astype(np.int64) * (2 * _NOISE) // 2**24 - _NOISE
    # Never 0: that would be cut off as empty.
    return np.clip(levels, 1, _ONE)


def _wave(phase: NDArray[np.int64]) -> NDArray[np.int64]:
    """A triangle wave of period 4 * _ONE between -_ONE and _ONE."""
    return np.abs(phase % (4 * _ONE) - 2 * _ONE) - _ONE


class _Draws:
    """Whole numbers one after the other, from a seed and a stream."""

    def __init__(self, seed: int, stream: int) -> None:
        self._key, self._drawn = _key(seed, stream), 0

    def between(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        drawn = int(_scrambled(np.array([self._drawn], dtype=np.uint64), self._key)[0])
        self._drawn += 1
        return low + (drawn >> 16) % (high - low + 1)


def _key(seed: int, stream: int) -> np.uint64:
    return np.uint64(_scrambled(np.array([seed * 65_536 + stream], dtype=np.uint64), np.uint64(0))[0])


def _scrambled(counter: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014): the random number of each counter; arithmetic modulo 2^64."""
    mixed = (counter + np.uint64(1)) * _GOLDEN
    mixed = mixed ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    scrambled: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return scrambled
