"""engine.drift_check: a window of studies against a reference, over all kinds of streams together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from engine.drift_check import KL_CEILING, StudyRow, check_drift, largest_window, stream_names, streams_of
from engine.drift_thresholds import LEAST_REFERENCE, LEAST_WINDOW, Thresholds, calibrate_thresholds

REFERENCE, WINDOW = 120, 30
BINS = 16


def rows(seed: int, count: int, *, shift: float = 0.0) -> list[StudyRow]:
    """Studies of one site: a histogram that varies, three numbers of which one is often absent, two categories."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        middle = 7.0 + shift + 0.5 * random.normal()
        histogram = np.exp(-((np.arange(BINS) - middle) ** 2) / 8)
        numbers = {"volume": float(random.lognormal(2, 0.3)), "noise": float(random.normal(0.03, 0.003))}
        if random.random() < 0.5:
            numbers["echo-time-ms"] = float(random.choice([4.9, 9.8]))
        found.append(
            StudyRow(
                categories={"manufacturer": "A", "convolution-kernel": str(random.choice(["B30f", "B45f"]))},
                numbers=numbers,
                histograms={"T1": tuple(histogram), "foreground": None if random.random() < 0.1 else tuple(histogram)},
            )
        )
    return found


@pytest.fixture(scope="module")
def reference() -> list[StudyRow]:
    return rows(1, REFERENCE)


@pytest.fixture(scope="module")
def thresholds(reference: list[StudyRow]) -> Thresholds:
    streams = streams_of(reference, names=stream_names(reference))
    return calibrate_thresholds(streams, studies=REFERENCE, window=WINDOW)


@pytest.mark.requirement("ART-20", open="windows in time, alarms and what they start")
def test_the_same_site_raises_nothing_and_every_stream_is_reported(
    reference: list[StudyRow], thresholds: Thresholds
) -> None:
    report = check_drift(reference, rows(2, WINDOW), thresholds=thresholds)
    assert (report.severity, report.too_few, report.drifted) == ("none", None, ())
    assert {finding.name for finding in report.findings} == {
        "T1",
        "foreground",
        "volume",
        "noise",
        "echo-time-ms",
        "manufacturer",
        "convolution-kernel",
    }
    assert [finding.multiple for finding in report.findings] == sorted(
        (finding.multiple for finding in report.findings), reverse=True
    )
    assert [finding.name for finding in report.findings if finding.kl is not None]


def _all(change: Callable[[StudyRow], StudyRow]) -> list[StudyRow]:
    return [change(row) for row in rows(3, WINDOW)]


CHANGES: dict[str, tuple[Callable[[], list[StudyRow]], str]] = {
    "another scanner": (
        lambda: _all(lambda row: replace(row, categories={**row.categories, "manufacturer": "B"})),
        "manufacturer",
    ),
    "a number is gone": (
        lambda: _all(lambda row: replace(row, numbers={k: v for k, v in row.numbers.items() if k != "volume"})),
        "volume",
    ),
    "a number that the reference never had": (
        lambda: _all(lambda row: replace(row, numbers={**row.numbers, "kvp": 120.0})),
        "kvp",
    ),
    "twice the noise": (
        lambda: _all(lambda row: replace(row, numbers={**row.numbers, "noise": 2 * row.numbers["noise"]})),
        "noise",
    ),
    "brighter images": (lambda: rows(4, WINDOW, shift=1.5), "T1"),
}


@pytest.mark.requirement("ART-20", open="windows in time, alarms and what they start")
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_critical_and_its_stream_is_named_first(
    reference: list[StudyRow], thresholds: Thresholds, what: str
) -> None:
    make, stream = CHANGES[what]
    # A stream that the reference never had has no threshold of its own yet.
    known = thresholds if stream in thresholds.usual else None
    report = check_drift(reference, make(), thresholds=known)
    assert report.severity == "critical"
    assert stream in {finding.name for finding in report.drifted}
    others = {finding.name for finding in report.drifted} - {stream, "foreground"}
    assert others == set(), others


def test_the_articles_ceiling_warns_where_the_calibrated_threshold_would_not(
    reference: list[StudyRow], thresholds: Thresholds
) -> None:
    wide = replace(thresholds, warn=1e9, critical=1e9)
    report = check_drift(reference, rows(4, WINDOW, shift=1.5), thresholds=wide)
    by_name = {finding.name: finding for finding in report.findings}
    kl = by_name["T1"].kl
    assert kl is not None
    assert kl > KL_CEILING
    assert (by_name["T1"].severity, by_name["volume"].severity, report.severity) == ("warn", "none", "warn")


@pytest.mark.parametrize(
    ("studies", "window", "said"),
    [
        (LEAST_REFERENCE - 1, LEAST_WINDOW, f"{LEAST_REFERENCE - 1} studies in the reference, {LEAST_REFERENCE}"),
        (REFERENCE, LEAST_WINDOW - 1, f"{LEAST_WINDOW - 1} studies since, {LEAST_WINDOW}"),
    ],
)
def test_too_few_studies_are_an_answer(studies: int, window: int, said: str) -> None:
    report = check_drift(rows(1, studies), rows(2, window))
    assert (report.severity, report.findings) == ("none", ())
    assert report.too_few is not None
    assert said in report.too_few


def test_a_window_beyond_half_of_the_reference_is_refused(reference: list[StudyRow]) -> None:
    with pytest.raises(ValueError, match="at most half of it"):
        check_drift(reference, rows(2, largest_window(REFERENCE) + 1))
