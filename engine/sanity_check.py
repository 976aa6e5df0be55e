"""Whether a bundle gives on this machine, with what is installed here, what torch gave at its export.

A case fails when more than 1 voxel in 10,000 changed, or the Dice of a label by more than 0.001; two voxels are always
allowed, since in a small case or label they are more than that. One statement of the rule for export,
`seggate models verify` and `seggate models tune`, where a person may ask for a wider one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import BundleInvalid
from engine.manifest import LabelSpec
from engine.metrics import CaseMetrics, measure_case
from engine.predictor import Predictor
from engine.sanity_cases import LoadedSanityCase, SanityCase, load_case

STRICT_TOLERANCE = 1e-4
_DICE_PER_SHARE = 10.0

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may change: a share of a case's voxels, a label's Dice; `voxels` always may, in a case and in a label."""

    changed_share: float = STRICT_TOLERANCE
    dice_change: float = STRICT_TOLERANCE * _DICE_PER_SHARE
    voxels: int = 2

    @classmethod
    def of(cls, tolerance: float) -> Limits:
        """Limits in the same proportion as the strict ones, for another share of the voxels."""
        return cls(changed_share=tolerance, dice_change=tolerance * _DICE_PER_SHARE)


STRICT = Limits()


@dataclass(frozen=True, kw_only=True)
class CaseAgreement:
    """One case, computed again. `dice` is against torch's labels, by label name, None where neither has it;
    `reference_dice` against the reference, None without one. `differing` and `expected_voxels`: how many voxels of each
    label differ, and how many torch gave it. `faults`: what is beyond the limits, with figures."""

    name: str
    voxels: int
    changed: int
    dice: Mapping[str, float | None]
    reference_dice: Mapping[str, float | None] | None
    faults: tuple[str, ...]
    differing: Mapping[str, int] = field(default_factory=dict)
    expected_voxels: Mapping[str, int] = field(default_factory=dict)

    @property
    def lowest_dice(self) -> float:
        return min((value for value in self.dice.values() if value is not None), default=1.0)


def check_sanity(
    predictor: Predictor, *, limits: Limits = STRICT, progress: Progress | None = None
) -> tuple[CaseAgreement, ...]:
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
        ignored = bundle.label_manager.ignore_label
        found.append(compare(case, loaded, labels, bundle.labels, ignore_label=ignored, limits=limits))
    return tuple(found)


def compare(
    case: SanityCase,
    loaded: LoadedSanityCase,
    labels: NDArray[Any],
    specs: Sequence[LabelSpec],
    *,
    ignore_label: int | None = None,
    limits: Limits = STRICT,
) -> CaseAgreement:
    """The labels (Z, Y, X) that were computed now, against those of the export. `ignore_label`: of the reference.

    Raises BundleInvalid when the stored labels are not those that the case's figures are of.
    """
    agreement = compare_labels(case.name, loaded.labels.array, labels, specs, limits=limits)
    for spec in specs:
        if agreement.expected_voxels[spec.name] != case.voxels[spec.name]:
            raise BundleInvalid(f"{case.file}: {spec.name}: not the voxels that {case.name} is said to have")
    if loaded.reference is None or case.dice is None:
        return agreement
    reference_dice = reference_figures(loaded.reference.array, labels, specs, ignore_label=ignore_label)
    faults = list(agreement.faults)
    for spec in specs:
        before, after = case.dice[spec.name] or 0.0, reference_dice[spec.name] or 0.0
        if abs(after - before) > limits.dice_change and agreement.differing[spec.name] > limits.voxels:
            faults.append(f"{spec.name}: Dice {after:.4f} to the reference, {before:.4f} at export")
    return replace(agreement, reference_dice=reference_dice, faults=tuple(faults))


def compare_labels(
    name: str,
    expected: NDArray[Any],
    labels: NDArray[Any],
    specs: Sequence[LabelSpec],
    *,
    limits: Limits = STRICT,
) -> CaseAgreement:
    """Two label maps of one shape, (Z, Y, X) or (Y, X), by the rule of this module."""
    if expected.ndim == 2:
        expected, labels = expected[None], labels[None]
    regions = [spec.region for spec in specs]
    agreement = measure_case(expected, labels, (1.0, 1.0, 1.0), regions, surfaces=False)
    faults = []
    changed = int(np.count_nonzero(labels != expected))
    if changed > max(limits.voxels, limits.changed_share * labels.size):
        faults.append(f"{changed} of {labels.size} voxels changed (at most 1 in {1 / limits.changed_share:,.0f})")
    differing: dict[str, int] = {}
    for spec in specs:
        measured = agreement[spec.region]
        differing[spec.name] = measured.false_positives + measured.false_negatives
        lost = measured.dice is not None and 1 - measured.dice > limits.dice_change
        if lost and differing[spec.name] > limits.voxels:
            faults.append(f"{spec.name}: Dice {measured.dice:.4f} to the export ({differing[spec.name]} voxels)")
    return CaseAgreement(
        name=name,
        voxels=labels.size,
        changed=changed,
        dice=_dice(agreement, specs),
        reference_dice=None,
        faults=tuple(faults),
        differing=differing,
        expected_voxels={
            spec.name: agreement[spec.region].true_positives + agreement[spec.region].false_negatives for spec in specs
        },
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
