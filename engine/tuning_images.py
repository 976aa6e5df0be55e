"""What a plan is measured on: the bundle's sanity cases or invented images, and one window of each configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.bundle_networks import network_of
from engine.phantom_planning import plan_phantoms
from engine.preprocessing import crop_to_nonzero, preprocess, stack_labels
from engine.sanity_cases import load_case
from engine.sanity_phantom import make_phantom
from engine.volume import Volume

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class TuningCase:
    """An image, and the labels (Z, Y, X) that torch gave it at the export; None where ONNX Runtime has to say."""

    name: str
    volume: Volume
    expected: NDArray[Any] | None


def tuning_cases(bundle: Bundle, added: Sequence[tuple[str, Volume]] = ()) -> tuple[TuningCase, ...]:
    """The bundle's sanity cases, or the invented ones where it has none, and those that were `added`; small ones first.

    Raises BundleInvalid for a sanity case that cannot be read.
    """
    cases = []
    for name, volume in added:
        cases.append(TuningCase(name=name, volume=volume, expected=None))
    suite = bundle.evidence.sanity
    if suite is not None:
        highest = bundle.label_manager.highest_value
        for case in suite.cases:
            loaded = load_case(bundle.root, case, channels=len(bundle.channels), highest=highest)
            cases.append(TuningCase(name=case.name, volume=loaded.volume, expected=loaded.labels.array))
    else:
        for name, phantom in plan_phantoms(bundle):
            cases.append(TuningCase(name=name, volume=make_phantom(phantom), expected=None))
    return tuple(sorted(cases, key=lambda case: case.volume.array.size))


def tuning_windows(bundle: Bundle) -> Mapping[str, FloatArray]:
    """One window (1, C, *patch) of each configuration, by its name: the middle of an invented image on the plans' grid.

    A cascade's later stage is shown the background as what the stage before found.
    """
    phantom = dict(plan_phantoms(bundle))["plans-grid"]
    turned, _ = make_phantom(phantom).reoriented(bundle.contract.orientation)
    cropped = crop_to_nonzero(turned, bundle.plans)
    windows = {}
    for configuration in bundle.configurations:
        planned = bundle.plans.configurations[configuration.name]
        image = preprocess(cropped, bundle.plans, planned)
        if configuration.previous_stage:
            nothing = np.zeros(image.shape[1:], dtype=np.uint8)
            image = stack_labels(image, nothing, bundle.label_manager.foreground_labels)
        network = network_of(bundle, configuration, configuration.folds[0])
        windows[configuration.name] = _middle(image, network.patch_size)[None]
    return windows


def _middle(image: FloatArray, patch_size: tuple[int, ...]) -> FloatArray:
    """The middle of an image (C, Z, Y, X), padded with zeros where it is smaller than the patch: (C, *patch)."""
    if len(patch_size) == 2:
        image = image[:, image.shape[1] // 2]
    for axis, edge in enumerate(patch_size, start=1):
        missing = max(0, edge - image.shape[axis])
        padding = [(0, 0)] * image.ndim
        padding[axis] = (missing // 2, missing - missing // 2)
        image = np.pad(image, padding)
        start = (image.shape[axis] - edge) // 2
        image = image.take(range(start, start + edge), axis=axis)
    return np.ascontiguousarray(image)
