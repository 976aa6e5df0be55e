"""Whether a window of studies is another than the reference, in any of its streams (ART-20).

    streams_of(reference + live)  →  calibrate_thresholds(reference)  →  compare(reference, live, thresholds)

A window has at least LEAST_WINDOW studies and at most half as many as the reference; with fewer the answer is that
there are too few. Beside the calibrated thresholds stands the article's ceiling: KL(live || reference) of a channel's
histogram over 0.05 is a warning whatever is usual. What the model was trained on is another reference
(engine/training_comparison.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.drift_streams import Categories, FloatArray, Histograms, Numbers, Stream
from engine.drift_thresholds import LEAST_REFERENCE, LEAST_WINDOW, Thresholds, calibrate_thresholds

KL_CEILING = 0.05
"""ART-20: nats."""

Severity = Literal["none", "warn", "critical"]


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """The facts of one study, by stream. A histogram holds counts or shares, in any unit; None where it has none."""

    categories: Mapping[str, str]
    numbers: Mapping[str, float]
    histograms: Mapping[str, Sequence[float] | None]


@dataclass(frozen=True, kw_only=True)
class StreamFinding:
    """`distance` in the stream's own measure (engine/drift_streams.py), `multiple` of what 1 of 100 unchanged windows
    exceeds. `kl` is KL(live || reference) in nats, of a histogram."""

    name: str
    distance: float
    multiple: float
    kl: float | None
    severity: Severity


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamPair:
    """One stream of both sides, of one kind: what a finding is about, to be looked at."""

    reference: Histograms | Numbers | Categories
    live: Histograms | Numbers | Categories

    @property
    def name(self) -> str:
        return self.reference.name


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """`findings` are of all streams, the furthest first; empty where there were too few studies (`too_few` says so)."""

    reference: int
    window: int
    severity: Severity
    findings: tuple[StreamFinding, ...]
    too_few: str | None

    @property
    def drifted(self) -> tuple[StreamFinding, ...]:
        return tuple(finding for finding in self.findings if finding.severity != "none")


def largest_window(reference: int) -> int:
    """As many of the latest studies are compared at most."""
    return reference // 2


def check_drift(
    reference: Sequence[StudyRow], live: Sequence[StudyRow], *, thresholds: Thresholds | None = None
) -> DriftReport:
    """`live` in any order, at most `largest_window(len(reference))` of them. `thresholds`: those of these sizes, where
    they are known already. ValueError for more."""
    if len(live) > largest_window(len(reference)) and len(reference) >= LEAST_REFERENCE:
        raise ValueError(f"a window of {len(live)} studies for a reference of {len(reference)}: at most half of it")
    too_few = None
    if len(reference) < LEAST_REFERENCE:
        too_few = f"{len(reference)} studies in the reference, {LEAST_REFERENCE} are needed"
    elif len(live) < LEAST_WINDOW:
        too_few = f"{len(live)} studies since, {LEAST_WINDOW} are needed"
    if too_few is not None:
        return DriftReport(reference=len(reference), window=len(live), severity="none", findings=(), too_few=too_few)
    streams = streams_of(reference, names=stream_names([*reference, *live]))
    chosen = thresholds or calibrate_thresholds(list(streams), studies=len(reference), window=len(live))
    findings = sorted((_finding(stream, live, chosen) for stream in streams), key=lambda finding: -finding.multiple)
    worst = [finding.severity for finding in findings]
    severity: Severity = "critical" if "critical" in worst else "warn" if "warn" in worst else "none"
    return DriftReport(
        reference=len(reference), window=len(live), severity=severity, findings=tuple(findings), too_few=None
    )


def stream_names(rows: Sequence[StudyRow]) -> dict[str, tuple[str, ...]]:
    """By kind ("histograms", "numbers", "categories"): what at least one study has, sorted."""
    return {
        "histograms": _union(row.histograms for row in rows),
        "numbers": _union(row.numbers for row in rows),
        "categories": _union(row.categories for row in rows),
    }


def streams_of(rows: Sequence[StudyRow], *, names: Mapping[str, Sequence[str]]) -> list[Stream]:
    """The named streams of a reference, in its order."""
    return [_stream(rows, kind, name) for kind, of_kind in names.items() for name in of_kind]


def stream_pair(reference: Sequence[StudyRow], live: Sequence[StudyRow], stream: str) -> StreamPair:
    """A stream's values in both, each in its order. ValueError where no study has the stream."""
    names = stream_names([*reference, *live])
    kind = next((kind for kind, of_kind in names.items() if stream in of_kind), None)
    if kind is None:
        raise ValueError(f"no study has the stream {stream!r}")
    of_reference = _stream(reference, kind, stream)
    bins = of_reference.shares.shape[1] if isinstance(of_reference, Histograms) else None
    return StreamPair(reference=of_reference, live=_stream(live, kind, stream, bins=bins))


def _stream(
    rows: Sequence[StudyRow], kind: str, name: str, *, bins: int | None = None
) -> Histograms | Numbers | Categories:
    if kind == "histograms":
        return Histograms(name=name, shares=_shares(rows, name, bins=bins))
    if kind == "numbers":
        return Numbers(name=name, values=_values(rows, name))
    return Categories(name=name, values=tuple(row.categories.get(name, "") for row in rows))


def _finding(stream: Stream, live: Sequence[StudyRow], thresholds: Thresholds) -> StreamFinding:
    kl: float | None = None
    if isinstance(stream, Histograms):
        shares = _shares(live, stream.name, bins=stream.shares.shape[1])
        distance, kl = stream.distance(shares), stream.kl(shares)
    elif isinstance(stream, Numbers):
        distance = stream.distance(_values(live, stream.name))
    elif isinstance(stream, Categories):
        distance = stream.distance([row.categories.get(stream.name, "") for row in live])
    else:
        raise TypeError(f"{stream.name}: no distance is known for it")
    multiple = distance / thresholds.usual[stream.name]
    severity: Severity = "none"
    if multiple > thresholds.critical:
        severity = "critical"
    elif multiple > thresholds.warn or (kl is not None and kl > KL_CEILING):
        severity = "warn"
    return StreamFinding(name=stream.name, distance=distance, multiple=multiple, kl=kl, severity=severity)


def _union(of: Iterable[Mapping[str, object]]) -> tuple[str, ...]:
    return tuple(sorted({name for mapping in of for name in mapping}))


def _shares(rows: Sequence[StudyRow], name: str, *, bins: int | None = None) -> FloatArray:
    """(N, B): each row adds up to 1; zeros where a study has none, or one of another number of bins."""
    found = [row.histograms.get(name) for row in rows]
    size = bins or max((len(histogram) for histogram in found if histogram is not None), default=1)
    table = np.zeros((len(rows), size))
    for index, histogram in enumerate(found):
        if histogram is not None and len(histogram) == size and (total := sum(histogram)) > 0:
            table[index] = np.asarray(histogram, dtype=np.float64) / total
    return table


def _values(rows: Sequence[StudyRow], name: str) -> FloatArray:
    return np.array([row.numbers.get(name, np.nan) for row in rows], dtype=np.float64)


def most_unlike(pair: StreamPair, *, count: int = 3) -> list[int]:
    """Indices of the live studies that are furthest from the reference in a stream, the furthest first: examples for
    whoever looks into it."""
    reference, live = pair.reference, pair.live
    if isinstance(reference, Histograms) and isinstance(live, Histograms):
        away = np.array([reference.kl(live.shares[index : index + 1]) for index in range(len(live.shares))])
    elif isinstance(reference, Numbers) and isinstance(live, Numbers):
        known = np.sort(reference.values[~np.isnan(reference.values)])
        middle = float(np.median(known)) if known.size else 0.0
        away = np.where(np.isnan(live.values), np.inf if known.size else 0.0, np.abs(live.values - middle))
    elif isinstance(reference, Categories) and isinstance(live, Categories):
        away = np.array([-reference.values.count(value) for value in live.values], dtype=np.float64)
    else:
        raise TypeError(f"{pair.name}: two kinds of streams")
    return [int(index) for index in np.argsort(-away, kind="stable")[:count]]
