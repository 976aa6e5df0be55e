"""What a result is worth without a reference: an expected Dice and HD95 of each segment, and a 90 % bound on each.

A calibration (engine/calibration.py makes it) turns what is seen on a result, the evidence, into the two figures. Terms
are oriented so that larger is worse, and no weight is negative: worse evidence never gives a better estimate.

    log(1 - Dice + 0.02)  or  log(HD95 / mm + 0.5)  =  intercept + sum of weight x term
    bound                                           =  the same + margin (conformal, one-sided)

It was learnt from cases that one network had not seen; the result is judged by the same evidence, averaged over its
networks. How far networks of several folds agree is no term: in a cross-validation every case was learnt by all of
them but one, so what their agreement means on a case that none has seen cannot be learnt there. It can only take away
(`_capped`). Evidence far outside of what the calibration saw gets no estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

FEATURES_VERSION = 1
"""Of the definition of `Evidence` and of the terms made from it; another version is not comparable."""
CONFIDENCE = 0.9
MIN_DICE, MAX_HD95_MM = 0.70, 15.0
"""ART-16: below the one or above the other a person looks at the result."""

MIRROR, ENTROPY, VOLUME, COMPONENTS = "mirror-disagreement", "border-entropy", "volume", "components"
FEATURES = (MIRROR, ENTROPY, VOLUME, COMPONENTS)
SMALL, LARGE = "small-volume", "large-volume"
TERMS = (MIRROR, ENTROPY, SMALL, LARGE, COMPONENTS)

# A value may be this far beyond what was seen: half of the seen range, and at least this much (in a feature's own unit;
# for components, a factor of 2).
_BEYOND = 0.5
_LEAST_BEYOND = MappingProxyType({MIRROR: 0.25, ENTROPY: 0.05, VOLUME: 1.0, COMPONENTS: math.log(2)})
# Share of the cases that must have touched the edge of the image for such a result to be comparable.
_MIN_TOUCHING = 0.05
# Of the empty predictions that the calibration saw, the share that may have missed something.
_MOST_MISSED = 0.1
_MIRROR_OFFSET, _DICE_OFFSET, _HD95_OFFSET_MM = 0.01, 0.02, 0.5
_MAX_LOG = 50.0


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is seen on one segment of a result; names and meaning as in engine.segment_statistics.SegmentStatistics."""

    volume_ml: float
    components: int
    touches_border: bool
    mirror_dice: float | None
    border_entropy: float | None
    fold_dice: float | None

    @classmethod
    def of(cls, segment: Mapping[str, Any]) -> Evidence:
        """From the statistics of a segment under their own names. What is no number, or was not measured by an older
        release, is None."""

        def number(name: str) -> float | None:
            value = segment.get(name)
            return None if value is None or not math.isfinite(value) else float(value)

        return cls(
            volume_ml=float(segment["volume_ml"]),
            components=int(segment["components"]),
            touches_border=bool(segment["touches_border"]),
            mirror_dice=number("mirror_dice"),
            border_entropy=number("border_entropy"),
            fold_dice=number("fold_dice"),
        )

    @property
    def is_empty(self) -> bool:
        return self.components == 0

    def features(self) -> dict[str, float]:
        """By name, those that there are: logarithms of 1 - Dice, of ml and of the number of parts; bits."""
        found: dict[str, float] = {}
        if self.mirror_dice is not None:
            found[MIRROR] = math.log(max(0.0, 1.0 - self.mirror_dice) + _MIRROR_OFFSET)
        if self.border_entropy is not None:
            found[ENTROPY] = self.border_entropy
        if not self.is_empty and self.volume_ml > 0:
            found[VOLUME] = math.log(self.volume_ml)
            found[COMPONENTS] = math.log(self.components)
        return found


@dataclass(frozen=True, kw_only=True)
class Line:
    """A figure on its logarithmic scale: `intercept` + `weights` (by term, none negative). `margin` is what the bound
    has more; None where there were too few cases for a bound."""

    intercept: float
    weights: Mapping[str, float]
    margin: float | None

    def at(self, terms: Mapping[str, float]) -> float:
        return self.intercept + sum(weight * terms[term] for term, weight in self.weights.items())


@dataclass(frozen=True, kw_only=True)
class Found:
    """How the calibration did on cases that it was not made from, by cross-fitting; None where nothing can be said.

    `cases` had an estimate, `outside` had none. Coverages are shares of the cases on the right side of the bound,
    correlations Spearman's between estimate and truth. `bad` cases have a Dice or HD95 beyond the limits;
    `sensitivity` is the share of them that was flagged, `specificity` that of the others that was not. `dice_lower`
    and `hd95_upper_mm` are medians of the bounds.
    """

    cases: int
    outside: int
    dice_coverage: float | None
    hd95_coverage: float | None
    dice_correlation: float | None
    hd95_correlation: float | None
    bad: int
    sensitivity: float | None
    specificity: float | None
    dice_lower: float | None
    hd95_upper_mm: float | None


@dataclass(frozen=True, kw_only=True)
class LabelCalibration:
    """Of one label. `cases` of so many `patients` had a segment to learn from; `missed` predictions were empty and
    `rightly_empty` too, the reference having none either. `touching_border`: share of the cases.

    `volume_centre` and `volume_scale` are of log ml; `ranges` what was seen of each feature, the volume as z-score.
    """

    cases: int
    patients: int
    missed: int
    rightly_empty: int
    touching_border: float
    volume_centre: float
    volume_scale: float
    ranges: Mapping[str, tuple[float, float]]
    dice: Line
    hd95: Line
    found: Found

    def standardized(self, features: Mapping[str, float]) -> dict[str, float]:
        """The features with the volume as z-score."""
        result = dict(features)
        if VOLUME in result:
            result[VOLUME] = (result[VOLUME] - self.volume_centre) / self.volume_scale
        return result


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of a model: by label name, for those labels that had enough cases. `notes` say why others have none."""

    min_dice: float
    max_hd95_mm: float
    labels: Mapping[str, LabelCalibration]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`dice` and `hd95_mm` are medians of what such evidence meant; of 10 such cases 9 are expected to have a Dice of
    at least `dice_lower`, and as many an HD95 of at most `hd95_upper_mm` (None: too few cases to say)."""

    dice: float
    dice_lower: float
    hd95_mm: float
    hd95_upper_mm: float | None

    def is_doubtful(self, min_dice: float, max_hd95_mm: float) -> bool:
        """Whether a bound is beyond its limit."""
        return self.dice_lower < min_dice or self.hd95_upper_mm is None or self.hd95_upper_mm > max_hd95_mm


@dataclass(frozen=True, kw_only=True)
class Outside:
    """No estimate, since the evidence is unlike what the calibration saw; `reasons` are names, at least one."""

    reasons: tuple[str, ...]


def estimate(calibration: LabelCalibration, evidence: Evidence) -> Estimate | Outside | None:
    """None for an empty segment where nearly all that the calibration saw were rightly so: of them it can say no more.
    Where some were misses a person looks."""
    if evidence.is_empty:
        empty = calibration.rightly_empty + calibration.missed
        is_usual = calibration.rightly_empty and calibration.missed <= _MOST_MISSED * empty
        return None if is_usual else Outside(reasons=("empty",))
    features = calibration.standardized(evidence.features())
    reasons = _outside(calibration, features)
    if evidence.touches_border and calibration.touching_border < _MIN_TOUCHING:
        reasons.append("border")
    if reasons:
        return Outside(reasons=tuple(reasons))
    terms = terms_of(calibration.ranges, features)
    expected, hd95_mm = dice_of(calibration.dice.at(terms)), hd95_of(calibration.hd95.at(terms))
    lower, upper = 0.0, None
    if calibration.dice.margin is not None:
        lower = dice_of(calibration.dice.at(terms) + calibration.dice.margin)
    if calibration.hd95.margin is not None:
        upper = hd95_of(calibration.hd95.at(terms) + calibration.hd95.margin)
    expected, lower = _capped(expected, lower, evidence.fold_dice)
    return Estimate(dice=expected, dice_lower=lower, hd95_mm=hd95_mm, hd95_upper_mm=upper)


def terms_of(ranges: Mapping[str, tuple[float, float]], features: Mapping[str, float]) -> dict[str, float]:
    """Terms of the features that `ranges` names, the volume as z-score. Evidence better than the best seen counts as
    the best seen."""
    terms = {name: max(features[name], low) for name, (low, _) in ranges.items() if name != VOLUME}
    return terms | {SMALL: max(0.0, -features[VOLUME]), LARGE: max(0.0, features[VOLUME])}


def log_of_dice(dice: float) -> float:
    return math.log(1.0 - dice + _DICE_OFFSET)


def log_of_hd95(hd95_mm: float) -> float:
    return math.log(hd95_mm + _HD95_OFFSET_MM)


def dice_of(log: float) -> float:
    return min(1.0, max(0.0, 1.0 + _DICE_OFFSET - math.exp(min(log, _MAX_LOG))))


def hd95_of(log: float) -> float:
    return max(0.0, math.exp(min(log, _MAX_LOG)) - _HD95_OFFSET_MM)


def _outside(calibration: LabelCalibration, features: Mapping[str, float]) -> list[str]:
    reasons = []
    for name, (low, high) in calibration.ranges.items():
        beyond = max(_BEYOND * (high - low), _LEAST_BEYOND[name])
        value = features.get(name, math.nan)
        # Only a volume can be wrong on both sides; NaN is neither.
        if not value <= high + beyond or (name == VOLUME and value < low - beyond):
            reasons.append(name)
    return reasons


def _capped(expected: float, lower: float, fold_dice: float | None) -> tuple[float, float]:
    """What the lowest Dice d between two folds takes away.

    1 - Jaccard is a metric: by its triangle inequality the two folds' Jaccard with the truth is (1 + J) / 2 at most in
    the mean, as a Dice 2 / (3 - d); no more can be expected of a network of this model. The bound is d at most: where
    either of the two may be right, the other one's Dice is d.
    """
    if fold_dice is None:
        return expected, lower
    return min(expected, 2.0 / (3.0 - fold_dice)), min(lower, fold_dice)
