"""Which images are invented for a model: on its plans' grid, with thicker slices, turned and tilted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.bundle import Bundle
from engine.plans import Configuration
from engine.preprocessing import network_spacing_mm
from engine.sanity_phantom import MAX_EDGE, Phantom
from engine.volume import AS_STORED

_MAX_PHANTOM_VOXELS = 2**24
_SLICES_OF_2D = 6
_OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))


def plan_phantoms(bundle: Bundle) -> tuple[tuple[str, Phantom], ...]:
    """Three images about as large as a patch of the finest network: on the plans' grid in the model's voxel order; with
    slices three times as thick; in another voxel order, tilted, with more than one window."""
    planned = _finest(bundle)
    orientation = "LPS" if bundle.contract.orientation == AS_STORED else bundle.contract.orientation
    forward = bundle.plans.transpose_forward
    patch = planned.patch_size if not planned.is_2d else (_SLICES_OF_2D, *planned.patch_size)
    # The axis that a 2D network does not resample has no spacing of its own: twice that of the plane.
    spacing = network_spacing_mm((2.0 * planned.spacing_mm[0],) * 3, planned)

    def phantom(size: Sequence[float], thickness: Sequence[float], *, stored: str, oblique: bool) -> Phantom:
        edges, mm = [0, 0, 0], [0.0, 0.0, 0.0]
        for network_axis, axis in enumerate(forward):
            edges[axis] = min(MAX_EDGE, max(2, round(patch[network_axis] * size[network_axis])))
            mm[axis] = float(f"{spacing[network_axis] * thickness[network_axis]:.6g}")
        while int(np.prod(edges)) > _MAX_PHANTOM_VOXELS:
            largest = edges.index(max(edges))
            edges[largest] //= 2
        return Phantom(
            seed=0,
            shape=(edges[0], edges[1], edges[2]),
            spacing_mm=(mm[0], mm[1], mm[2]),
            orientation=orientation,
            stored_orientation=stored,
            oblique=oblique,
            ranges=_ranges(bundle, planned),
        )

    # Axes change places and run the other way.
    other = _OPPOSITE[orientation[2]] + orientation[0] + _OPPOSITE[orientation[1]]
    return (
        ("plans-grid", phantom((0.9, 0.9, 0.9), (1, 1, 1), stored=orientation, oblique=False)),
        ("thick-slices", phantom((0.3, 0.9, 0.9), (3, 1, 1), stored=orientation, oblique=False)),
        ("turned", phantom((0.9, 1.2, 0.9), (0.95, 0.95, 0.95), stored=other, oblique=True)),
    )


def _finest(bundle: Bundle) -> Configuration:
    """Of the networks whose outputs are joined, the 3D one with the smallest voxels, or a 2D one."""
    planned = [bundle.plans.configurations[c.name] for c in bundle.final_configurations]
    return min(planned, key=lambda c: (c.is_2d, float(np.prod(c.spacing_mm))))


def _ranges(bundle: Bundle, planned: Configuration) -> tuple[tuple[float, float], ...]:
    """Values of the darkest and the brightest voxel: what the foreground had in training where values have a unit."""
    found = []
    for index, scheme in enumerate(planned.normalization_schemes):
        known = bundle.plans.foreground_intensity_properties.get(index)
        if scheme == "rgb_to_0_1":
            found.append((0.0, 255.0))
        elif scheme in ("ct", "nonorm") and known is not None and known.percentile_99_5 > known.percentile_00_5:
            found.append((known.percentile_00_5, known.percentile_99_5))
        else:
            found.append((0.0, 1000.0))
    return tuple(found)
