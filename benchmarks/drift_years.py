"""Drift alarms in years in which nothing changes: how often a person is called for nothing.

Each year has a reference of its own and as many studies a day as are asked for, all drawn with replacement from the
hippocampus cases: reference and live studies are of one site that does not change. Every night the latest studies of
the last 30 days, at most half as many as the reference (gateway.toml's defaults), are compared with it, as the job
`drift` does. Neighbouring windows share most of their studies, so alarms come in runs: an episode lasts until a later
window has none. The year begins when the window has filled. `per_year` is episodes a year with Poisson's exact interval
of 95 %.

All windows of a year are compared at once, by how often each case is in them; tests hold it against the check itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from engine.drift_check import KL_CEILING, StudyRow, largest_window, stream_names, streams_of
from engine.drift_streams import (
    ALPHA,
    Categories,
    FloatArray,
    Histograms,
    Numbers,
    Stream,
    jensen_shannon,
    kl_divergence,
)
from engine.drift_thresholds import Thresholds, calibrate_thresholds
from engine.intensity_baseline import IntensityBaseline
from engine.training_comparison import LEAST_STUDIES, compare_with_training, histogram_stream
from gateway.monitoring.study_rows import PARTS
from gateway.settings import DriftSettings

NIGHTS = 365
VOLUMES = (5, 20, 50)
"""Studies a day."""
_GROUPS = 2000
Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Year:
    """Episodes of an alarm, those of them that were critical, and nights with an alarm."""

    episodes: int
    critical: int
    nights: int


def alarms_per_year(
    rows: Sequence[StudyRow], baseline: IntensityBaseline, *, years: int, processes: int, quiet: bool
) -> dict[str, Any]:
    """Of each volume the episodes a year; and how often LEAST_STUDIES studies are beyond the training's ceiling."""
    reference = DriftSettings().reference_studies
    found = []
    with ProcessPoolExecutor(processes) as pool:
        for volume in VOLUMES:
            done = list(pool.map(partial(simulate_year, rows, volume, reference), range(years), chunksize=4))
            found.append(_summary(volume, done))
            if not quiet:
                print(found[-1], file=sys.stderr)
    return {
        "reference": reference,
        "window": largest_window(reference),
        "nights": NIGHTS,
        "per_year": found,
        "against_training": _against_training(rows, baseline),
    }


def simulate_year(rows: Sequence[StudyRow], volume: int, reference: int, seed: int) -> Year:
    """One year of `volume` studies a day against a reference of so many."""
    random = np.random.default_rng([seed, volume])
    known = random.integers(0, len(rows), reference)
    drawn = [rows[index] for index in known]
    window = largest_window(reference)
    thresholds = calibrate_thresholds(streams_of(drawn, names=stream_names(drawn)), studies=reference, window=window)
    studies = random.integers(0, len(rows), window + volume * NIGHTS)
    counts = np.stack(
        [np.bincount(studies[night * volume :][:window], minlength=len(rows)) for night in range(1, NIGHTS + 1)]
    )
    severities = night_severities(rows, np.bincount(known, minlength=len(rows)), counts, thresholds)
    begins = (severities > 0) & (np.append(0, severities[:-1]) == 0)
    # Episodes are numbered from 1; those that were critical on any night.
    number = np.cumsum(begins)
    return Year(
        episodes=int(begins.sum()),
        critical=len(np.unique(number[severities == 2])),
        nights=int((severities > 0).sum()),
    )


def night_severities(
    rows: Sequence[StudyRow], reference: Counts, windows: Counts, thresholds: Thresholds
) -> NDArray[np.int64]:
    """(W,): 0 none, 1 warn, 2 critical of each window (W, rows), given as how often each row is in it and in the
    reference: what `check_drift` says of the same studies."""
    present = [row for row, count in zip(rows, reference, strict=True) if count]
    severity = np.zeros(len(windows), dtype=np.int64)
    # As streams of all rows, but those that the reference has.
    for stream in streams_of(rows, names=stream_names(present)):
        distance, kl = _distances(stream, reference, windows)
        multiple = distance / thresholds.usual[stream.name]
        severity = np.maximum(severity, 2 * (multiple > thresholds.critical))
        severity = np.maximum(severity, (multiple > thresholds.warn) | (kl > KL_CEILING))
    return severity


def _distances(stream: Stream, reference: Counts, windows: Counts) -> tuple[FloatArray, FloatArray]:
    """(W,) each: the stream's distance of every window, and KL of a histogram (0 for the others)."""
    n, m = windows.sum(axis=1), reference.sum()
    none = np.zeros(len(windows))
    if isinstance(stream, Histograms):
        live, known = _smoothed(windows @ stream.shares), _smoothed(reference @ stream.shares)
        return jensen_shannon(live, known), kl_divergence(live, known)
    if isinstance(stream, Numbers):
        values = np.where(np.isnan(stream.values), -np.inf, stream.values)
        order = np.argsort(values, kind="stable")
        last = np.append(values[order][1:] != values[order][:-1], True)
        away = np.cumsum(windows[:, order], axis=1) / n[:, None] - np.cumsum(reference[order]) / m
        largest: FloatArray = np.abs(away[:, last]).max(axis=1) * np.sqrt(n * m / (n + m))
        return largest, none
    if not isinstance(stream, Categories):
        raise TypeError(f"{stream.name}: no distance is known for it")
    table = np.array([[value == one for one in sorted(set(stream.values))] for value in stream.values], dtype=np.int64)
    known = (reference @ table).astype(np.float64)
    seen = known > 0
    counts = windows @ table
    observed = np.concatenate([counts[:, seen], counts[:, ~seen].sum(axis=1, keepdims=True)], axis=1)
    others = np.append(known[seen], 0.0) + ALPHA
    expected = others / others.sum() * observed.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(observed > 0, observed * np.log(observed / expected), 0.0)
    return 2 * terms.sum(axis=1) / max(1, int(seen.sum())), none


def _smoothed(sums: FloatArray) -> FloatArray:
    spread: FloatArray = sums + ALPHA / sums.shape[-1]
    smoothed: FloatArray = spread / spread.sum(axis=-1, keepdims=True)
    return smoothed


def _summary(volume: int, years: Sequence[Year]) -> dict[str, Any]:
    episodes, critical = sum(year.episodes for year in years), sum(year.critical for year in years)
    return {
        "studies_a_day": volume,
        "years": len(years),
        "nights_with_an_alarm": round(sum(year.nights for year in years) / (NIGHTS * len(years)), 5),
        **{f"per_year{end}": value for end, value in _rate(episodes, len(years)).items()},
        **{f"critical_per_year{end}": value for end, value in _rate(critical, len(years)).items()},
        "years_without": round(sum(year.episodes == 0 for year in years) / len(years), 3),
    }


def _rate(events: int, years: int) -> dict[str, float]:
    """Events a year, and Poisson's exact interval of 95 % (Garwood 1936)."""
    lower = chi2.ppf(0.025, 2 * events) / 2 if events else 0.0
    upper = chi2.ppf(0.975, 2 * events + 2) / 2
    rates = {"": events / years, "_lower": lower / years, "_upper": upper / years}
    return {end: round(float(value), 3) for end, value in rates.items()}


def _against_training(rows: Sequence[StudyRow], baseline: IntensityBaseline) -> dict[str, Any]:
    """How many groups of LEAST_STUDIES different cases warn, and the largest KL of each stream."""
    random = np.random.default_rng(0)
    warned = 0
    largest: dict[str, float] = {}
    for _ in range(_GROUPS):
        chosen = [rows[index] for index in random.choice(len(rows), LEAST_STUDIES, replace=False)]
        live = {
            (channel, part): [row.histograms.get(histogram_stream(channel, part)) for row in chosen]
            for channel in range(len(baseline.channels))
            for part in PARTS
        }
        found = compare_with_training(live, baseline)
        warned += any(finding.severity != "none" for finding in found)
        for finding in found:
            largest[finding.name] = round(max(largest.get(finding.name, 0.0), finding.kl), 4)
    return {"studies": LEAST_STUDIES, "groups": _GROUPS, "warned": warned, "largest_kl": largest}
