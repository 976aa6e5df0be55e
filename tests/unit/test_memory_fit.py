"""engine.memory_fit: the largest batch, then the largest patch, in few probes."""

from __future__ import annotations

import math

import pytest

from engine.errors import MemoryExceeded
from engine.memory_fit import SizeChoice, fit_to_memory
from engine.topology import Topology, topology

SPACING = (1.0, 1.0, 1.0)
PATCHES = tuple(topology(SPACING, (edge, edge, edge)) for edge in (128, 112, 96, 80, 64, 48, 32))
PLANNED = 2


class Device:
    """Memory that holds so many voxels of a batch."""

    def __init__(self, voxels: float) -> None:
        self._voxels = voxels
        self.probes: list[tuple[tuple[int, ...], int]] = []

    def fits(self, patch: Topology, batch_size: int) -> bool:
        self.probes.append((patch.patch_size, batch_size))
        return batch_size * math.prod(patch.patch_size) <= self._voxels


def choice(*, batch_size: int = 4, most_voxels: float = 1e9) -> SizeChoice:
    return SizeChoice(
        configuration="3d_fullres",
        patches=PATCHES,
        planned=PLANNED,
        batch_size=batch_size,
        smallest_batch=2,
        largest_batch=lambda patch: max(2, round(most_voxels / math.prod(patch.patch_size))),
    )


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
@pytest.mark.parametrize("batch_size", [2, 3, 7, 19, 20, 150])
def test_the_batch_grows_until_the_memory_is_full(batch_size: int) -> None:
    device = Device((batch_size + 0.5) * 96**3)
    assert fit_to_memory(choice(), device.fits) == (PATCHES[PLANNED], batch_size)
    assert len(device.probes) <= 4 + 2 * math.log2(batch_size)


def test_where_the_dataset_allows_no_larger_batch_the_patch_grows() -> None:
    device = Device(6.5 * 128**3)
    assert fit_to_memory(choice(most_voxels=6 * 96**3), device.fits) == (PATCHES[0], 3)
    device = Device(2.5 * 112**3)
    assert fit_to_memory(choice(most_voxels=2 * 96**3), device.fits) == (PATCHES[1], 2)
    device = Device(2.5 * 96**3)
    assert fit_to_memory(choice(most_voxels=2 * 96**3), device.fits) == (PATCHES[PLANNED], 2)


def test_where_the_smallest_batch_does_not_fit_the_patch_shrinks() -> None:
    device = Device(2.2 * 64**3)
    assert fit_to_memory(choice(), device.fits) == (PATCHES[4], 2)
    device = Device(5.5 * 32**3)
    assert fit_to_memory(choice(), device.fits) == (PATCHES[6], 5)


def test_a_device_on_which_nothing_fits_is_an_error() -> None:
    with pytest.raises(MemoryExceeded, match=r"3d_fullres: not even 2 patches of \(32, 32, 32\) fit"):
        fit_to_memory(choice(), Device(1.0).fits)
