"""benchmarks.drift_years and drift_scale: the simulation says what the check itself says of the same studies."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.drift_years import night_severities, simulate_year
from engine.drift_check import StudyRow, check_drift, stream_names, streams_of
from engine.drift_thresholds import calibrate_thresholds

CASES, REFERENCE, WINDOW = 60, 80, 40


def cases() -> list[StudyRow]:
    """With ties, missing numbers, missing histograms, and a category that few have."""
    random = np.random.default_rng(7)
    rows = []
    for index in range(CASES):
        shares = np.exp(-((np.arange(16) - 7 - random.normal()) ** 2) / 8)
        numbers = {"volume": float(random.lognormal(2, 0.3)), "slices": float(random.integers(30, 36))}
        if random.random() < 0.6:
            numbers["echo-time-ms"] = float(random.choice([4.9, 9.8]))
        rows.append(
            StudyRow(
                categories={"kernel": str(random.choice(["a", "b", ""])), "rare": "yes" if index < 2 else "no"},
                numbers=numbers,
                histograms={"T1": tuple(shares), "foreground": None if random.random() < 0.1 else tuple(shares)},
            )
        )
    return rows


@pytest.mark.requirement("ART-20", open="windows in time, alarms and what they start")
def test_every_window_has_the_severity_that_the_check_gives_it() -> None:
    rows, random = cases(), np.random.default_rng(3)
    known = random.integers(0, CASES, REFERENCE)
    reference = [rows[index] for index in known]
    names = stream_names(reference)
    thresholds = calibrate_thresholds(streams_of(reference, names=names), studies=REFERENCE, window=WINDOW, draws=500)
    # Windows from one end of the cases are unlike the reference: all severities are among them.
    drawn = [random.integers(0, max(2, CASES - 5 * step), WINDOW) for step in range(12) for _ in range(4)]
    counts = np.stack([np.bincount(window, minlength=CASES) for window in drawn])
    found = night_severities(rows, np.bincount(known, minlength=CASES), counts, thresholds)
    expected = [
        ("none", "warn", "critical").index(
            check_drift(reference, [rows[index] for index in window], thresholds=thresholds).severity
        )
        for window in drawn
    ]
    assert found.tolist() == expected
    assert set(expected) >= {0, 2}


def test_a_year_is_the_same_each_time_and_most_nights_are_quiet() -> None:
    rows = cases()
    year = simulate_year(rows, 5, REFERENCE, 1)
    assert year == simulate_year(rows, 5, REFERENCE, 1)
    assert year.critical <= year.episodes <= year.nights < 60
