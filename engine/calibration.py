"""Learning what evidence on a segment is worth (engine/quality_estimate.py), from cases whose reference is known.

Per label: a ridge regression without negative weights on the logarithmic scale, small enough for 20 cases. Its bound is
split conformal by cross-fitting: the cases are dealt to parts in whole patients, the residual of each case is against a
line that was fitted without its part, and the 90 % bound adds the residual of rank ceil(0.9 (n + 1)) of n. Where
patients have several cases, each patient counts once and its cases share that (Lee, Barber, Willett 2023,
"Distribution-free inference with hierarchical data"). The line that is kept is fitted to all cases, so the guarantee is
not the exact one of a split; what the whole procedure reaches on cases that it has not seen is measured (`Found`) and
kept with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from engine.quality_estimate import (
    CONFIDENCE,
    FEATURES,
    MAX_HD95_MM,
    MIN_DICE,
    TERMS,
    VOLUME,
    Calibration,
    Estimate,
    Evidence,
    Found,
    LabelCalibration,
    Line,
    Outside,
    estimate,
    log_of_dice,
    log_of_hd95,
    terms_of,
)

FloatArray = NDArray[np.float64]

MIN_CASES = 20
_PARTS = 10
_FEW = 0.1
_SEED = 12345
# Of the regression, on terms of deviation 1: as much as one more case that says that no term matters.
_RIDGE = 1.0
_MIN_DEVIATION = 1e-6
# log ml; the population of a label is never taken to vary by less than 5 %.
_MIN_VOLUME_SCALE = 0.05
# The median absolute deviation of a normal distribution, as a standard deviation.
_MAD = 1.4826
_NOTHING_FOUND = Found(
    cases=0,
    outside=0,
    dice_coverage=None,
    hd95_coverage=None,
    dice_correlation=None,
    hd95_correlation=None,
    bad=0,
    sensitivity=None,
    specificity=None,
    dice_lower=None,
    hd95_upper_mm=None,
)


@dataclass(frozen=True, kw_only=True)
class KnownCase:
    """One label of one case, predicted by networks that had not seen it, and what it was worth.

    `patient` is any text that is the same for all cases of one person. `dice` and `hd95_mm` as in engine.metrics;
    None where prediction and reference are both empty, in the voxels that the reference does not ignore.
    """

    patient: str
    evidence: Evidence
    dice: float | None
    hd95_mm: float | None


def calibrate(cases: Mapping[str, Sequence[KnownCase]]) -> Calibration:
    """Of every label of `cases` that has MIN_CASES cases with a segment; a note says so for the others, and where a
    label has cases or evidence that cannot be used."""
    labels: dict[str, LabelCalibration] = {}
    notes = []
    for name, every in cases.items():
        known, said = _complete(every)
        notes += [f"{name}: {text}" for text in said]
        learnt = len(_present(known))
        if learnt >= MIN_CASES:
            labels[name] = replace(fit_label(known), found=_cross_fitted(known))
        else:
            notes.append(f"{name}: {learnt} cases have this segment; an estimate of its quality needs {MIN_CASES}")
    return Calibration(min_dice=MIN_DICE, max_hd95_mm=MAX_HD95_MM, labels=MappingProxyType(labels), notes=tuple(notes))


def fit_label(known: Sequence[KnownCase]) -> LabelCalibration:
    """A label's calibration, without what it was found to do. Needs a case with a segment."""
    present = _present(known)
    features = [case.evidence.features() for case in present]
    ranges: dict[str, tuple[float, float]] = {}
    centre, scale = 0.0, 1.0
    for name in FEATURES:
        values = [found[name] for found in features if name in found]
        if len(values) < len(features):
            continue
        if name == VOLUME:
            centre = median(values)
            scale = max(_MIN_VOLUME_SCALE, _MAD * median(abs(value - centre) for value in values))
            values = [(value - centre) / scale for value in values]
        ranges[name] = (min(values), max(values))
    for found in features:
        found[VOLUME] = (found[VOLUME] - centre) / scale
    table = [terms_of(ranges, found) for found in features]
    names = [term for term in TERMS if term in table[0]]
    terms = np.array([[row[name] for name in names] for row in table])
    patients = [case.patient for case in present]
    return LabelCalibration(
        cases=len(present),
        patients=len(set(patients)),
        missed=sum(case.evidence.is_empty and case.dice is not None for case in known),
        rightly_empty=sum(case.evidence.is_empty and case.dice is None for case in known),
        touching_border=fmean(case.evidence.touches_border for case in present),
        volume_centre=centre,
        volume_scale=scale,
        ranges=MappingProxyType(ranges),
        dice=_fit_line(names, terms, np.array([log_of_dice(case.dice or 0.0) for case in present]), patients),
        hd95=_fit_line(names, terms, np.array([log_of_hd95(case.hd95_mm or 0.0) for case in present]), patients),
        found=_NOTHING_FOUND,
    )


def _present(known: Sequence[KnownCase]) -> list[KnownCase]:
    """Those with a segment, an empty one shows nothing to learn from, and something that it can be measured against:
    a segment of nothing but ignored voxels is neither right nor wrong."""
    return [case for case in known if not case.evidence.is_empty and case.dice is not None]


def _complete(known: Sequence[KnownCase]) -> tuple[list[KnownCase], list[str]]:
    """Without the few cases (_FEW of them, while MIN_CASES stay) that lack what all others have as evidence, and what
    there is to say: of evidence that more cases lack, nothing is learnt."""
    present = _present(known)
    left_out: set[int] = set()
    notes = []
    for name in FEATURES:
        lacking = {id(case) for case in present if name not in case.evidence.features()}
        if not 0 < len(lacking) < len(present):
            continue
        if len(lacking) <= _FEW * len(present) and len(present) - len(left_out | lacking) >= MIN_CASES:
            left_out |= lacking
            notes.append(f"{len(lacking)} of {len(present)} cases have no {name}: its quality is learnt without them")
        else:
            notes.append(f"{len(lacking)} of {len(present)} cases have no {name}: its quality is learnt without that")
    return [case for case in known if id(case) not in left_out], notes


def conformal_residual(residuals: Sequence[float], patients: Sequence[str], confidence: float) -> float | None:
    """The residual that a case of a new patient stays below with this confidence; None where that takes more patients.

    Each patient has the weight 1 / (patients + 1), shared by the cases. One case each: the residual of rank
    ceil(confidence (n + 1)).
    """
    of_patient = Counter(patients)
    below = 0.0
    for index in np.argsort(residuals):
        below += 1.0 / (of_patient[patients[index]] * (len(of_patient) + 1))
        if below >= confidence - 1e-9:
            return float(residuals[index])
    return None


def _fit_line(names: Sequence[str], terms: FloatArray, values: FloatArray, patients: Sequence[str]) -> Line:
    residuals = np.zeros(len(values))
    for part in _parts(patients):
        others = ~part
        if part.all():  # a single patient: nothing is left to fit
            continue
        intercept, weights = _ridge(terms[others], values[others])
        residuals[part] = values[part] - (intercept + terms[part] @ weights)
    middle = conformal_residual(list(residuals), patients, 0.5) or 0.0
    bound = conformal_residual(list(residuals), patients, CONFIDENCE)
    intercept, weights = _ridge(terms, values)
    return Line(
        intercept=intercept + middle,
        weights=MappingProxyType(dict(zip(names, map(float, weights), strict=True))),
        margin=None if bound is None else max(0.0, bound - middle),
    )


def _ridge(terms: FloatArray, values: FloatArray) -> tuple[float, FloatArray]:
    """Intercept and weights, none negative, that minimise squared errors plus _RIDGE times squared weights of the
    standardised terms; a term that never changes weighs nothing."""
    mean, deviation = terms.mean(axis=0), terms.std(axis=0)
    varies = deviation > _MIN_DEVIATION
    scaled = (terms - mean)[:, varies] / deviation[varies]
    count = scaled.shape[1]
    weights = np.zeros(terms.shape[1])
    if count:
        rows = np.vstack([scaled, math.sqrt(_RIDGE) * np.eye(count)])
        found, _ = optimize.nnls(rows, np.concatenate([values - values.mean(), np.zeros(count)]))
        weights[varies] = found / deviation[varies]
    return float(values.mean() - mean @ weights), weights


def _parts(patients: Sequence[str]) -> list[NDArray[np.bool_]]:
    """Whole patients dealt to at most _PARTS parts, always in the same way: which cases are in each."""
    different = sorted(set(patients))
    order = np.random.RandomState(_SEED).permutation(len(different))
    count = min(_PARTS, len(different))
    part_of = {different[index]: place % count for place, index in enumerate(order)}
    of_case = np.array([part_of[patient] for patient in patients])
    return [of_case == part for part in range(count)]


def _cross_fitted(known: Sequence[KnownCase]) -> Found:
    """Everything anew without each part in turn, and that part judged by it."""
    judged: list[tuple[KnownCase, Estimate]] = []
    has_dice_bound: list[bool] = []
    flags: list[tuple[bool, bool]] = []  # is bad, was flagged
    present = _present(known)
    for part in _parts([case.patient for case in present]):
        others = [case for case, inside in zip(present, part, strict=True) if not inside]
        if not others:
            continue
        calibration = fit_label(others)
        for case in (case for case, inside in zip(present, part, strict=True) if inside):
            answer = estimate(calibration, case.evidence)
            if isinstance(answer, Estimate):
                judged.append((case, answer))
                has_dice_bound.append(calibration.dice.margin is not None)
            flagged = isinstance(answer, Outside) or (answer is not None and answer.is_doubtful(MIN_DICE, MAX_HD95_MM))
            flags.append(((case.dice or 0.0) < MIN_DICE or (case.hd95_mm or 0.0) > MAX_HD95_MM, flagged))
    dice = [case.dice or 0.0 for case, _ in judged]
    hd95 = [case.hd95_mm or 0.0 for case, _ in judged]
    # Of a bound that there is not, because of too few patients, nothing can be said.
    lowers = [e.dice_lower for (_, e), bound in zip(judged, has_dice_bound, strict=True) if bound]
    dice_of_bounded = [d for d, bound in zip(dice, has_dice_bound, strict=True) if bound]
    uppers = [(h, e.hd95_upper_mm) for h, (_, e) in zip(hd95, judged, strict=True) if e.hd95_upper_mm is not None]
    bad = [flagged for is_bad, flagged in flags if is_bad]
    good = [flagged for is_bad, flagged in flags if not is_bad]
    return Found(
        cases=len(judged),
        outside=len(flags) - len(judged),
        dice_coverage=_share([d >= lower for d, lower in zip(dice_of_bounded, lowers, strict=True)]),
        hd95_coverage=_share([h <= upper for h, upper in uppers]),
        dice_correlation=_correlation(dice, [e.dice for _, e in judged]),
        hd95_correlation=_correlation(hd95, [e.hd95_mm for _, e in judged]),
        bad=len(bad),
        sensitivity=_share(bad),
        specificity=_share([not flagged for flagged in good]),
        dice_lower=median(lowers) if lowers else None,
        hd95_upper_mm=median(upper for _, upper in uppers) if uppers else None,
    )


def _share(of: Sequence[bool]) -> float | None:
    return fmean(of) if of else None


def _correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's; None where one side never changes."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(stats.spearmanr(first, second).statistic)
