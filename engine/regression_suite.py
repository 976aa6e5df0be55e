"""A new version and the one that serves on the same locked cases, one case after the other, in one process.

Every case goes the way of production: from its files through the whole predictor, on its own grid. Labels need one run
a case. What the champion made of a case is taken from its stored figures where they are known.

Run time is compared on fresh runs alone: on the TIMED largest cases both versions run twice, in the order champion,
candidate, candidate, champion, and the faster run of each counts, so that what else the machine does falls on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.case_figures import CaseFigures, FigureStore
from engine.case_results import measure_labels
from engine.dataset import LoadedCase
from engine.errors import InputRejected
from engine.locked_cases import LockedCase, LockedCases
from engine.predictor import Predictor

TIMED = 3

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Version:
    """A bundle that is measured: its networks, loaded, and where its figures are kept."""

    predictor: Predictor
    store: FigureStore


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each version over the `cases` that both ran anew, in the same order."""

    cases: tuple[str, ...]
    candidate_s: tuple[float, ...]
    champion_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SuiteFigures:
    """One entry for each locked case. `champion` and `timing` are None where nothing serves yet. `known` is how many of
    the champion's figures were not computed again."""

    cases: tuple[LockedCase, ...]
    candidate: tuple[CaseFigures, ...]
    champion: tuple[CaseFigures, ...] | None
    timing: Timing | None
    known: int


def run_suite(
    locked: LockedCases,
    candidate: Version,
    champion: Version | None = None,
    *,
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> SuiteFigures:
    """Figures of both on every case. `progress` gets the share that is done, counted in voxels.

    Raises InputRejected or DatasetInvalid with the case that cannot be read or predicted, MemoryExceeded,
    BackendFailed, OSError (figures cannot be stored).
    """
    ordered = sorted(locked.cases, key=lambda case: (-case.voxels, case.name))
    timed = {case.name for case in ordered[:TIMED]} if champion is not None else set()
    plan = [(case, _order(candidate, champion, case, is_timed=case.name in timed)) for case in locked.cases]
    report = _Report(progress, sum(case.voxels * len(runs) for case, runs in plan))
    own: list[CaseFigures] = []
    theirs: list[CaseFigures] = []
    times: list[tuple[str, float, float]] = []
    known = 0
    for case, runs in plan:
        loaded = locked.read(case)
        stored = champion.store.get(case.digest) if champion is not None else None
        known += stored is not None
        found = [(version, _run(version, loaded, case, budget_bytes, report)) for version in runs]
        own.append(_keep(candidate, case, [figures for version, figures in found if version is candidate]))
        if champion is not None:
            fresh = [figures for version, figures in found if version is champion]
            theirs.append(stored if stored is not None else _keep(champion, case, fresh))
            if case.name in timed:
                times.append((case.name, own[-1].seconds, min(figures.seconds for figures in fresh)))
    return SuiteFigures(
        cases=locked.cases,
        candidate=tuple(own),
        champion=tuple(theirs) if champion is not None else None,
        timing=Timing(
            cases=tuple(name for name, _, _ in times),
            candidate_s=tuple(seconds for _, seconds, _ in times),
            champion_s=tuple(seconds for _, _, seconds in times),
        )
        if champion is not None
        else None,
        known=known,
    )


def _order(candidate: Version, champion: Version | None, case: LockedCase, *, is_timed: bool) -> tuple[Version, ...]:
    if champion is None:
        return (candidate,)
    if is_timed:
        return champion, candidate, candidate, champion
    return (candidate,) if champion.store.get(case.digest) is not None else (champion, candidate)


def _run(
    version: Version, loaded: LoadedCase, case: LockedCase, budget_bytes: int | None, report: _Report
) -> CaseFigures:
    began = time.perf_counter()
    try:
        prediction = version.predictor.predict(
            loaded.volume, budget_bytes=budget_bytes, progress=lambda share: report.within(case.voxels * share)
        )
    except InputRejected as error:
        raise InputRejected(f"{case.name}: {error}") from error
    seconds = time.perf_counter() - began
    report.finish(case.voxels)
    if not prediction.labels.geometry.same_grid(loaded.labels.geometry):
        raise InputRejected(f"{case.name}: the result does not lie on the grid of its reference")
    return CaseFigures(
        metrics=measure_labels(loaded.labels, prediction.labels, version.predictor.bundle.label_manager),
        seconds=seconds,
        peak_bytes=prediction.runtime.peak_estimate_bytes,
    )


def _keep(version: Version, case: LockedCase, runs: Sequence[CaseFigures]) -> CaseFigures:
    """The labels of all runs are the same; the fastest one's time counts."""
    fastest = min(runs, key=lambda figures: figures.seconds)
    version.store.put(case.digest, fastest)
    return fastest


class _Report:
    """Work done, in voxels, as shares."""

    def __init__(self, progress: Progress | None, work: int) -> None:
        self._progress = progress
        self._work = max(1, work)
        self._done = 0.0

    def within(self, part: float) -> None:
        if self._progress is not None:
            self._progress(min(1.0, (self._done + part) / self._work))

    def finish(self, part: float) -> None:
        self._done += part
        self.within(0.0)
