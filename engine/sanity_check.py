"""Whether a bundle gives on this machine, with what is installed here, what torch gave at its export.

A case fails when more than 1 voxel in 10,000 changed, or the Dice of a label by more than 0.001; two voxels are always
allowed, since in a small case or label they are more than that. One statement of the rule for export and
`seggate models verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import BundleInvalid
from engine.manifest import LabelSpec
from engine.metrics import CaseMetrics, measure_case
from engine.predictor import Predictor
from engine.sanity_cases import LoadedSanityCase, SanityCase, load_case

MAX_CHANGED_SHARE = 1e-4
MAX_DICE_CHANGE = 1e-3
ALLOWED_VOXELS = 2

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class CaseAgreement:
    """One case, computed again. `dice` is against torch's labels, by label name, None where neither has it;
    `reference_dice` against the reference, None without one. `faults`: what is beyond the limits, with figures."""

    name: str
    voxels: int
    changed: int
    dice: Mapping[str, float | None]
    reference_dice: Mapping[str, float | None] | None
    faults: tuple[str, ...]

    @property
    def lowest_dice(self) -> float:
        return min((value for value in self.dice.values() if value is not None), default=1.0)


def check_sanity(predictor: Predictor, *, progress: Progress | None = None) -> tuple[CaseAgreement, ...]:
    """Every sanity case of the predictor's bundle through the whole predictor; empty where the bundle has none.

    Raises BundleInvalid (a case cannot be read), MemoryExceeded, BackendFailed.
    """
    bundle = predictor.bundle
    cases = bundle.evidence.sanity.cases if bundle.evidence.sanity is not None else ()
    found = []
    for index, case in enumerate(cases):

        def report(share: float, done: int = index) -> None:
            if progress is not None:
                progress((done + share) / len(cases))

        loaded = load_case(bundle.root, case, channels=len(bundle.channels), highest=bundle.label_manager.highest_value)
        labels = predictor.predict(loaded.volume, progress=report).labels.array
        found.append(compare(case, loaded, labels, bundle.labels, ignore_label=bundle.label_manager.ignore_label))
    return tuple(found)


def compare(
    case: SanityCase,
    loaded: LoadedSanityCase,
    labels: NDArray[Any],
    specs: Sequence[LabelSpec],
    *,
    ignore_label: int | None = None,
) -> CaseAgreement:
    """The labels (Z, Y, X) that were computed now, against those of the export. `ignore_label`: of the reference.

    Raises BundleInvalid when the stored labels are not those that the case's figures are of.
    """
    expected = loaded.labels
    regions = [spec.region for spec in specs]
    agreement = measure_case(expected.array, labels, expected.geometry.spacing_mm, regions, surfaces=False)
    faults = []
    changed = int(np.count_nonzero(labels != expected.array))
    if changed > max(ALLOWED_VOXELS, MAX_CHANGED_SHARE * labels.size):
        faults.append(f"{changed} of {labels.size} voxels changed (at most 1 in 10,000)")
    for spec in specs:
        measured = agreement[spec.region]
        if measured.true_positives + measured.false_negatives != case.voxels[spec.name]:
            raise BundleInvalid(f"{case.file}: {spec.name}: not the voxels that {case.name} is said to have")
        differing = measured.false_positives + measured.false_negatives
        if measured.dice is not None and 1 - measured.dice > MAX_DICE_CHANGE and differing > ALLOWED_VOXELS:
            faults.append(f"{spec.name}: Dice {measured.dice:.4f} to the export ({differing} voxels)")
    reference_dice = None
    if loaded.reference is not None and case.dice is not None:
        reference_dice = reference_figures(loaded.reference.array, labels, specs, ignore_label=ignore_label)
        for spec in specs:
            before, after = case.dice[spec.name] or 0.0, reference_dice[spec.name] or 0.0
            measured = agreement[spec.region]
            differing = measured.false_positives + measured.false_negatives
            if abs(after - before) > MAX_DICE_CHANGE and differing > ALLOWED_VOXELS:
                faults.append(f"{spec.name}: Dice {after:.4f} to the reference, {before:.4f} at export")
    return CaseAgreement(
        name=case.name,
        voxels=labels.size,
        changed=changed,
        dice=_dice(agreement, specs),
        reference_dice=reference_dice,
        faults=tuple(faults),
    )


def reference_figures(
    reference: NDArray[Any], labels: NDArray[Any], specs: Sequence[LabelSpec], *, ignore_label: int | None = None
) -> dict[str, float | None]:
    """Dice of each label against a reference map (Z, Y, X); None where neither side has it."""
    regions = [spec.region for spec in specs]
    return _dice(
        measure_case(reference, labels, (1.0, 1.0, 1.0), regions, ignore_label=ignore_label, surfaces=False), specs
    )


def _dice(metrics: CaseMetrics, specs: Sequence[LabelSpec]) -> dict[str, float | None]:
    return {spec.name: metrics[spec.region].dice for spec in specs}
