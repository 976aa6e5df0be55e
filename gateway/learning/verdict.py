"""ACCEPTED, REJECTED or OUTSIDE_PLAN: what a model's change plan says of a new version's figures (ART-23)."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from engine.version_comparison import Comparison, Figure
from gateway.learning_settings import ChangePlan

NOTICEABLE_S = 0.25
"""A version that takes less than this longer a case is not too slow, whatever the ratio: nobody waits for it, and times
of tiny cases are mostly chance."""
_EXACT = 1e-9  # a loss that is the limit but for rounding keeps it


class Verdict(enum.StrEnum):
    ACCEPTED = "ACCEPTED"
    REJECTED = "REJECTED"
    OUTSIDE_PLAN = "OUTSIDE_PLAN"


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a version is not accepted. `check` is one word for programs; figure and limit are None where there is no
    number. `outside` tells what the plan does not cover from what it forbids."""

    check: str
    text: str
    figure: float | None = None
    limit: float | None = None
    outside: bool = False


def verdict_of(reasons: Sequence[Reason]) -> Verdict:
    """What is at fault goes before what the plan does not cover."""
    if any(not reason.outside for reason in reasons):
        return Verdict.REJECTED
    return Verdict.OUTSIDE_PLAN if reasons else Verdict.ACCEPTED


def broken_limits(found: Comparison, plan: ChangePlan) -> list[Reason]:
    """Every limit of the plan that the candidate breaks, with figure and limit; none where nothing serves yet."""
    reasons: list[Reason] = []
    if found.dice is not None:
        reasons += _lost("dice", "mean Dice", found.dice, plan.max_dice_loss)
        if found.old_dice is None:
            text = "every locked case is of the new test: nothing shows what was forgotten; add cases of the old one"
            reasons.append(Reason(check="old-test", text=text, outside=True))
    if found.old_dice is not None and found.old_dice != found.dice:
        reasons += _lost("backward-transfer", "mean Dice of the old test", found.old_dice, plan.max_dice_loss)
    for name, figure in found.label_dice.items():
        reasons += _lost("label-dice", f"Dice of {name}", figure, plan.max_dice_loss_per_label)
    for name, figure in found.stratum_dice.items():
        reasons += _lost("stratum-dice", f"mean Dice of stratum {name}", figure, plan.max_dice_loss_per_stratum)
    reasons += [
        Reason(
            check="newly-empty",
            text=f"{empty.case}: {empty.label} is empty; the version that serves finds it",
            figure=1,
            limit=0,
        )
        for empty in found.newly_empty
    ]
    slower_s = 0.0 if found.seconds.champion is None else found.seconds.candidate - found.seconds.champion
    if slower_s >= NOTICEABLE_S:
        reasons += _grown("runtime", "seconds a case", found.seconds, plan.max_runtime_ratio, unit=1.0)
    return reasons + _grown("memory", "MiB at the peak", found.peak_bytes, plan.max_memory_ratio, unit=2.0**20)


def _lost(check: str, what: str, figure: Figure, limit: float) -> list[Reason]:
    if figure.loss is None or figure.loss <= limit + _EXACT:
        return []
    text = f"{what}: {figure.candidate:.4f}, {figure.champion:.4f} before: a loss of {figure.loss:.4f}, limit {limit:g}"
    return [Reason(check=check, text=text, figure=figure.loss, limit=limit)]


def _grown(check: str, what: str, figure: Figure, limit: float, *, unit: float) -> list[Reason]:
    if figure.champion is None or figure.ratio is None or figure.ratio <= limit + _EXACT:
        return []
    text = (
        f"{what}: {figure.candidate / unit:.3g}, {figure.champion / unit:.3g} before: {figure.ratio:.2f} times, "
        f"limit {limit:g}"
    )
    return [Reason(check=check, text=text, figure=figure.ratio, limit=limit)]
