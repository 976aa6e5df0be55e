"""engine.training_comparison: live intensities against those of the training data."""

from __future__ import annotations

import numpy as np
import pytest

from engine.drift_check import KL_CEILING
from engine.intensity_baseline import BINS, SHARES, ChannelBins, IntensityBaseline, PooledIntensities
from engine.training_comparison import LEAST_STUDIES, Part, compare_with_training, histogram_stream

EDGES = tuple(float(edge) for edge in np.linspace(-0.1, 1.4, BINS - 1))


def histogram(middle: float) -> tuple[float, ...]:
    shares = np.exp(-((np.arange(BINS) - middle) ** 2) / 50)
    return tuple(float(share) for share in shares / shares.sum() * SHARES)


def baseline(*, foreground: tuple[float, ...] | None = None) -> IntensityBaseline:
    return IntensityBaseline(
        grid=(4, 2, 2),
        channels=(ChannelBins(name="MRI", scale="percentile", foreground_edges=EDGES, whole_edges=EDGES),),
        labels=("Anterior",),
        cases=200,
        pooled=(PooledIntensities(foreground=foreground, whole=histogram(30)),),
        studies=(),
    )


def studies(middle: float, count: int, *, seed: int = 1) -> list[tuple[float, ...] | None]:
    random = np.random.default_rng(seed)
    return [histogram(middle + 1.5 * random.normal()) for _ in range(count)]


@pytest.mark.requirement("ART-20", open="windows in time, alarms and what they start")
def test_studies_of_the_training_scanner_are_below_the_ceiling_and_another_one_is_above() -> None:
    (same,) = compare_with_training({(0, "whole"): studies(30, LEAST_STUDIES)}, baseline())
    assert (same.name, same.severity) == ("intensities 0 against the training data", "none")
    assert same.kl < KL_CEILING / 2
    (other,) = compare_with_training({(0, "whole"): studies(36, LEAST_STUDIES)}, baseline())
    assert (other.severity, len(other.members), other.edges) == ("warn", LEAST_STUDIES, EDGES)
    assert other.kl > KL_CEILING


def test_the_unit_of_a_study_does_not_matter_and_each_counts_the_same() -> None:
    many = studies(36, 12)
    few = [tuple(value / SHARES for value in row or ()) for row in many]
    kls = [compare_with_training({(0, "whole"): live}, baseline())[0].kl for live in (few, many)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-9)


def test_too_few_studies_give_no_answer_whatever_else_is_recorded() -> None:
    live: dict[tuple[int, Part], list[tuple[float, ...] | None]] = {
        (0, "whole"): [*studies(36, LEAST_STUDIES - 1), None, (1.0,) * 8, (0.0,) * BINS],
        (0, "foreground"): studies(36, 50),  # the baseline has none
    }
    assert compare_with_training(live, baseline()) == ()
    live[0, "whole"].append(histogram(36))
    (found,) = compare_with_training(live, baseline())
    assert found.members == (*range(LEAST_STUDIES - 1), LEAST_STUDIES + 2)


def test_what_was_segmented_is_compared_apart() -> None:
    live: dict[tuple[int, Part], list[tuple[float, ...] | None]] = {
        (0, "whole"): studies(30, 12),
        (0, "foreground"): studies(20, 12),
    }
    found = compare_with_training(live, baseline(foreground=histogram(12)))
    assert [(finding.name, finding.severity) for finding in found] == [
        ("intensities 0 against the training data", "none"),
        ("foreground-intensities 0 against the training data", "warn"),
    ]
    assert histogram_stream(3, "foreground") == "foreground-intensities 3"
