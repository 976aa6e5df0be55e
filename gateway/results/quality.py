"""The QA module: judges a result from its statistics and says pass, review or hold (CARD-02).

Every check has a name, a value, a limit and a verdict. The verdict of a result is the worst of its checks.

| check | pass | review | hold |
| --- | --- | --- | --- |
| empty | every expected segment has voxels | an expected segment is empty | all segments are empty |
| volume | inside the population range | outside it | beyond twice the upper or half the lower end |
| border | no segment touches the edge of the volume | one does | |
| components | at most the model's limit | more | |
| laterality | left lies to the patient's left of right | | left and right are swapped |
| pair | both sides present, or neither | only one side present | |
| confidence | at least the model's minimum | below | below half of it |
| fold-agreement | Dice at least the model's minimum | below | below half of it |
| mirror-agreement | Dice at least the model's minimum | below | below half of it |
| estimated-dice | its lower 90 % bound at least the model's limit | below | |
| estimated-hd95 | its upper 90 % bound at most the model's limit | above | |
| calibrated-range | the segment is like those that the estimate was calibrated on | unlike them: no estimate | |
| source | nothing spoke against the study being whole | something did | |

`empty` expects a segment whose population range starts above zero, or that has no range. A check that cannot be made
(one fold, no mirroring, no range, no calibration) is absent: it is never reported as passed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from engine.bundle import Bundle
from engine.manifest import LabelSpec
from engine.quality_estimate import Calibration, Evidence, Outside, estimate
from gateway.settings import QualityCheck


class Verdict(enum.StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict, not a password
    REVIEW = "review"
    HOLD = "hold"


_ORDER = (Verdict.PASS, Verdict.REVIEW, Verdict.HOLD)
CHECKS: tuple[str, ...] = get_args(QualityCheck)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check on one segment (or on the whole result: segment None).

    `bound`: where `value` is an estimate, its 90 % bound, and it is the bound that is held against the limit.
    """

    name: str
    segment: str | None
    value: float | str
    limit: str
    verdict: Verdict
    bound: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Without `bound` where there is none."""
        document = asdict(self) | {"verdict": str(self.verdict)}
        if self.bound is None:
            del document["bound"]
        return document


def worst(checks: Sequence[Check]) -> Verdict:
    """The verdict of a result; pass when there are no checks."""
    return max((c.verdict for c in checks), key=_ORDER.index, default=Verdict.PASS)


def judge(
    measurements: Sequence[Mapping[str, Any]],
    *,
    mean_confidence: float | None,
    bundle: Bundle,
    doubts: Sequence[str],
    disabled: Collection[str] = (),
) -> tuple[Verdict, tuple[Check, ...]]:
    """Judge the statistics of one result (the rows that `infer` wrote, one per segment of the bundle) and its source
    (`doubts`: see `source_doubts`)."""
    by_name = {str(m["name"]): m for m in measurements}
    specs = [s for s in bundle.labels if s.name in by_name]
    checks: list[Check] = []
    checks += _empty(specs, by_name)
    for spec in specs:
        measured = by_name[spec.name]
        checks += _volume(spec, measured)
        if bundle.calibration is not None:
            checks += _estimated(spec, measured, bundle.calibration)
        if not measured["voxels"]:
            continue
        checks += _border(spec, measured)
        limit = bundle.quality.max_components.get(spec.name)
        if limit is not None:
            over = measured["components"] > limit
            checks.append(_check("components", spec, float(measured["components"]), f"at most {limit}", over))
        checks += _at_least("confidence", spec, measured["confidence"], bundle.quality.min_confidence)
        checks += _at_least("fold-agreement", spec, measured["fold_dice"], bundle.quality.min_fold_dice)
        checks += _at_least("mirror-agreement", spec, measured["mirror_dice"], bundle.quality.min_mirror_dice)
    checks += _pairs(specs, by_name)
    if mean_confidence is not None:
        checks += _at_least("confidence", None, mean_confidence, bundle.quality.min_confidence)
    checks.append(_check("source", None, "; ".join(doubts) or "none", "nothing against the study", bool(doubts)))
    kept = tuple(c for c in checks if c.name not in disabled)
    return worst(kept), kept


def source_doubts(
    rule: str, evidence: Mapping[str, Any], *, series_instance_uid: str, missing_slices: int
) -> tuple[str, ...]:
    """What spoke against a study being whole when it was declared so, in words without patient data.

    rule and evidence: of the study version (gateway.intake.evidence). Slice gaps count in the series of the result
    only; missing_slices: those that were found as the series was read, and that the model's contract allowed.
    """
    doubts = []
    expected = (evidence.get("expected") or {}).get("count")
    counted = evidence["objects"] + evidence.get("own_results", 0)
    if expected is not None and counted < expected:
        waited = "the wait for more was given up" if rule == "give-up" else f"declared whole by rule {rule}"
        doubts.append(f"{counted} of {expected} expected objects, {waited}")
    if evidence["interrupted"]:
        doubts.append("an association broke off")
    elif rule == "operator" and not evidence["released"]:
        doubts.append("an operator did not wait for the end of the association")
    if evidence.get("quarantined"):
        doubts.append(f"{evidence['quarantined']} objects quarantined")
    if evidence.get("conflicting"):
        doubts.append(f"{evidence['conflicting']} objects left out: another series or study holds their UIDs")
    gaps = evidence.get("gaps", [])
    seen = sum(gap["missing"] for gap in gaps if gap["series_instance_uid"] == series_instance_uid)
    if missing_slices or seen:
        doubts.append(f"{missing_slices or seen} slices missing")
    return tuple(doubts)


def _check(name: str, spec: LabelSpec | None, value: float | str, limit: str, review: bool) -> Check:
    return Check(
        name=name,
        segment=spec.name if spec else None,
        value=round(value, 4) if isinstance(value, float) else value,
        limit=limit,
        verdict=Verdict.REVIEW if review else Verdict.PASS,
    )


def _empty(specs: Sequence[LabelSpec], measured: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    # Nothing measured counts as nothing found: a result without statistics never leaves.
    if all(not measured[s.name]["voxels"] for s in specs):
        return [Check(name="empty", segment=None, value="all", limit="some segment", verdict=Verdict.HOLD)]
    checks = []
    for spec in specs:
        expected = spec.volume_range_ml is None or spec.volume_range_ml[0] > 0
        if expected:
            voxels = float(measured[spec.name]["voxels"])
            checks.append(_check("empty", spec, voxels, "more than 0 voxels", voxels == 0))
    return checks


def _volume(spec: LabelSpec, measured: Mapping[str, Any]) -> list[Check]:
    if spec.volume_range_ml is None or not measured["voxels"]:
        return []
    low, high = spec.volume_range_ml
    volume_ml = float(measured["volume_ml"])
    verdict = Verdict.PASS
    if not low <= volume_ml <= high:
        verdict = Verdict.HOLD if volume_ml > 2 * high or volume_ml < low / 2 else Verdict.REVIEW
    limit = f"{low:g} to {high:g} ml"
    return [Check(name="volume", segment=spec.name, value=round(volume_ml, 4), limit=limit, verdict=verdict)]


def _border(spec: LabelSpec, measured: Mapping[str, Any]) -> list[Check]:
    sides = ", ".join(measured["touches_border"])
    return [_check("border", spec, sides or "none", "touches no edge of the volume", bool(sides))]


def _at_least(name: str, spec: LabelSpec | None, value: float | None, minimum: float) -> list[Check]:
    if value is None:
        return []
    verdict = Verdict.PASS
    if math.isnan(value) or value < minimum / 2:
        verdict = Verdict.HOLD
    elif value < minimum:
        verdict = Verdict.REVIEW
    segment = spec.name if spec else None
    return [Check(name=name, segment=segment, value=round(value, 4), limit=f"at least {minimum:g}", verdict=verdict)]


def _estimated(spec: LabelSpec, measured: Mapping[str, Any], calibration: Calibration) -> list[Check]:
    """What the evidence on a segment is worth by the model's calibration, or that it is unlike what that saw."""
    label = calibration.labels.get(spec.name)
    found = None if label is None else estimate(label, Evidence.of(measured))
    if found is None:
        return []
    seen = "like the cases of the cross-validation"
    if isinstance(found, Outside):
        return [_check("calibrated-range", spec, f"outside: {', '.join(found.reasons)}", seen, True)]
    return [
        _check("calibrated-range", spec, "inside", seen, False),
        *_judged(spec, (found.dice, found.dice_lower), (found.hd95_mm, found.hd95_upper_mm), calibration),
    ]


def _judged(
    spec: LabelSpec, dice: tuple[float, float], hd95_mm: tuple[float, float | None], calibration: Calibration
) -> list[Check]:
    """ART-16: each figure's second number is held against the limit: its bound, None where there is none."""
    (value, lower), (distance_mm, upper_mm) = dice, hd95_mm
    low, high = calibration.min_dice, calibration.max_hd95_mm
    return [
        replace(
            _check("estimated-dice", spec, value, f"lower 90 % bound at least {low:g}", lower < low),
            bound=round(lower, 4),
        ),
        replace(
            _check(
                "estimated-hd95",
                spec,
                distance_mm,
                f"upper 90 % bound at most {high:g} mm" + (", unknown from so few cases" if upper_mm is None else ""),
                upper_mm is None or upper_mm > high,
            ),
            bound=None if upper_mm is None else round(upper_mm, 4),
        ),
    ]


def _pairs(specs: Sequence[LabelSpec], measured: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """Left and right of a pair: both there, and the left one at greater L (patient coordinates LPS)."""
    checks = []
    by_name = {spec.name: spec for spec in specs}
    found = [(spec, by_name[spec.pair]) for spec in specs if spec.pair in by_name and spec.laterality is not None]
    # Once per pair, from whichever side it is stated.
    sided = {(a.name, b.name) if a.laterality == "left" else (b.name, a.name): None for a, b in found}
    for left, right in ((by_name[left], by_name[right]) for left, right in sided):
        here, there = (measured[side.name]["centroid_lps_mm"] for side in (left, right))
        one_sided = (here is None) != (there is None)
        present = left.name if there is None else right.name
        checks.append(
            _check("pair", left, f"only {present}" if one_sided else "complete", f"with {right.name}", one_sided)
        )
        if here is not None and there is not None:
            apart_mm = round(float(here[0]) - float(there[0]), 2)
            checks.append(
                Check(
                    name="laterality",
                    segment=left.name,
                    value=apart_mm,
                    limit=f"left of {right.name} (more than 0 mm)",
                    verdict=Verdict.HOLD if apart_mm <= 0 else Verdict.PASS,
                )
            )
    return checks
