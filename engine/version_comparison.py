"""How a new version differs from the one that serves, from their figures on the same cases.

A label counts in a case where the reference or one of the two results has it. A version that rightly finds nothing
there counts as Dice 1 and HD95 0 mm: a label invented where there is none is a loss, and is not left out. Means are
over cases, then over labels, always over the same cases for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

from engine.case_figures import CaseFigures
from engine.labels import Label
from engine.locked_cases import LockedCase, is_new
from engine.metrics import RegionMetrics
from engine.regression_suite import SuiteFigures


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of both versions; `champion` is None where nothing serves yet. `cases` are those it is a mean over."""

    candidate: float
    champion: float | None
    cases: int

    @property
    def loss(self) -> float | None:
        """How much less the candidate has; negative is a gain."""
        return None if self.champion is None else self.champion - self.candidate

    @property
    def ratio(self) -> float | None:
        return None if not self.champion else self.candidate / self.champion


@dataclass(frozen=True, kw_only=True)
class NewlyEmpty:
    """A label that a case has and the champion found there, and of which the candidate finds no voxel."""

    case: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Dice and HD95 by label name, Dice by stratum; a label or stratum that no case has is absent. `dice` is over all
    labels, None when no case has any. `old_dice` is over the cases that are not new (engine/locked_cases.py): its gain
    is the backward transfer, Dice(new, old test) - Dice(old, old test).

    `seconds` is of a case, mean over the cases that were timed (over all, where nothing serves yet). `peak_bytes` is
    the greatest estimate of all cases.
    """

    dice: Figure | None
    old_dice: Figure | None
    label_dice: Mapping[str, Figure]
    label_hd95_mm: Mapping[str, Figure]
    stratum_dice: Mapping[str, Figure]
    untested: tuple[str, ...]
    newly_empty: tuple[NewlyEmpty, ...]
    seconds: Figure
    peak_bytes: Figure

    @property
    def backward_transfer(self) -> float | None:
        loss = self.old_dice.loss if self.old_dice is not None else None
        return None if loss is None else -loss


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One case."""

    case: LockedCase
    candidate: CaseFigures
    champion: CaseFigures | None


def compare_versions(figures: SuiteFigures, labels: Sequence[Label]) -> Comparison:
    """`labels` of both versions; there is at least one case."""
    champions: Sequence[CaseFigures | None] = figures.champion or [None] * len(figures.cases)
    rows = [
        _Row(case=case, candidate=own, champion=theirs)
        for case, own, theirs in zip(figures.cases, figures.candidate, champions, strict=True)
    ]
    strata = sorted({row.case.stratum for row in rows if row.case.stratum is not None})
    label_dice = _by_label(rows, labels, _dice)
    return Comparison(
        dice=_mean(label_dice.values()),
        old_dice=_mean(_by_label([row for row in rows if not is_new(row.case.stratum)], labels, _dice).values()),
        label_dice=label_dice,
        label_hd95_mm=_by_label(rows, labels, _hd95_mm),
        stratum_dice=MappingProxyType(
            {
                stratum: found
                for stratum in strata
                if (found := _mean(_by_label([r for r in rows if r.case.stratum == stratum], labels, _dice).values()))
            }
        ),
        untested=tuple(label.name for label in labels if label.name not in label_dice),
        newly_empty=tuple(
            NewlyEmpty(case=row.case.name, label=label.name)
            for row in rows
            for label in labels
            if _is_newly_empty(row, label)
        ),
        seconds=_seconds(figures),
        peak_bytes=Figure(
            candidate=max(row.candidate.peak_bytes for row in rows),
            champion=max((row.champion.peak_bytes for row in rows if row.champion is not None), default=None),
            cases=len(rows),
        ),
    )


def _dice(metrics: RegionMetrics) -> float:
    return 1.0 if metrics.dice is None else metrics.dice


def _hd95_mm(metrics: RegionMetrics) -> float:
    return 0.0 if metrics.hd95_mm is None else metrics.hd95_mm


def _by_label(
    rows: Sequence[_Row], labels: Sequence[Label], value: Callable[[RegionMetrics], float]
) -> Mapping[str, Figure]:
    found: dict[str, Figure] = {}
    for label in labels:
        pairs = [
            (value(own), None if theirs is None else value(theirs))
            for own, theirs in (_of_label(row, label) for row in rows)
            if own.dice is not None or (theirs is not None and theirs.dice is not None)
        ]
        if pairs:
            theirs = [champion for _, champion in pairs if champion is not None]
            found[label.name] = Figure(
                candidate=fmean(candidate for candidate, _ in pairs),
                champion=fmean(theirs) if theirs else None,
                cases=len(pairs),
            )
    return MappingProxyType(found)


def _of_label(row: _Row, label: Label) -> tuple[RegionMetrics, RegionMetrics | None]:
    theirs = None if row.champion is None else row.champion.metrics[label.region]
    return row.candidate.metrics[label.region], theirs


def _mean(labels: Iterable[Figure]) -> Figure | None:
    """Over labels; None without any."""
    figures = list(labels)
    if not figures:
        return None
    theirs = [figure.champion for figure in figures if figure.champion is not None]
    return Figure(
        candidate=fmean(figure.candidate for figure in figures),
        champion=fmean(theirs) if theirs else None,
        cases=max(figure.cases for figure in figures),
    )


def _is_newly_empty(row: _Row, label: Label) -> bool:
    own, theirs = _of_label(row, label)
    if theirs is None or not own.true_positives + own.false_negatives:
        return False
    return theirs.true_positives > 0 and not own.true_positives + own.false_positives


def _seconds(figures: SuiteFigures) -> Figure:
    if figures.timing is None:
        return Figure(
            candidate=fmean(own.seconds for own in figures.candidate), champion=None, cases=len(figures.cases)
        )
    return Figure(
        candidate=fmean(figures.timing.candidate_s),
        champion=fmean(figures.timing.champion_s),
        cases=len(figures.timing.cases),
    )
