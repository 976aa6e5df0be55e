"""Cases whose evidence and worth are drawn from a known law, and calibrations made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from engine.calibration import KnownCase, fit_label
from engine.quality_estimate import Calibration, Evidence, LabelCalibration

GOOD = Evidence(
    volume_ml=10.0,
    components=1,
    touches_border=False,
    mirror_dice=0.95,
    border_entropy=0.4,
    fold_dice=None,
)


def evidence(**changes: Any) -> Evidence:
    """Of a case in the middle of those below."""
    return replace(GOOD, **changes)


def drawn(seed: int, count: int, *, cases_of_patient: int = 1, strength: float = 1.0) -> list[KnownCase]:
    """`count` cases: one hidden difficulty moves Dice, HD95, mirrored passes and border entropy. Cases of one patient
    have nearly the same. `strength` 0: the evidence says nothing."""
    random = np.random.default_rng(seed)
    cases = []
    difficulty = 0.0
    for index in range(count):
        if index % cases_of_patient == 0:
            difficulty = float(random.exponential(0.4))
        seen = strength * difficulty
        dice = 1 - 0.1 * np.exp(1.2 * difficulty + 0.3 * random.normal())
        cases.append(
            KnownCase(
                patient=f"patient {seed} {index // cases_of_patient}",
                evidence=evidence(
                    volume_ml=float(10 * np.exp(0.2 * random.normal())),
                    components=1 + int(random.random() < 0.1),
                    mirror_dice=float(np.clip(1 - 0.05 * np.exp(seen + 0.3 * random.normal()), 0, 1)),
                    border_entropy=float(np.clip(0.4 + 0.1 * seen + 0.05 * random.normal(), 0, 1)),
                ),
                dice=float(np.clip(dice, 0, 1)),
                hd95_mm=float(2 * np.exp(difficulty + 0.4 * random.normal())),
            )
        )
    return cases


def calibrated(**changes: Any) -> LabelCalibration:
    """Of 60 such cases. `changes`: of the finished calibration."""
    return replace(fit_label(drawn(1, 60)), **changes)


def of_labels(**labels: LabelCalibration) -> Calibration:
    return Calibration(min_dice=0.7, max_hd95_mm=15.0, labels=labels, notes=())
