"""Whether live studies have the intensities that the model was trained on (ART-20).

KL(live || training) of the mean histograms of a channel, of the whole image and of what was segmented; the training
side is the bundle's baseline, made by the same function on the same grid and edges. Above the article's 0.05 it is a
warning. It needs no reference of live studies, so it is an answer soon after a go-live, and it may be one from the
first day on: another scanner than those of the training data. That is worth one look, not one every night.

On 200 cases that the demo model was trained on, none of 2,000 groups of LEAST_STUDIES is beyond the ceiling; the
largest KL is 0.010 for the image and 0.034 for what was segmented (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.drift_check import KL_CEILING, StreamPair
from engine.drift_streams import FloatArray, Histograms
from engine.intensity_baseline import SHARES, IntensityBaseline, kl_divergence

LEAST_STUDIES = 10
Part = Literal["whole", "foreground"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingFinding:
    """One histogram of one channel. `members`: places of the live studies that have it. `pair`: the baseline, and those
    studies; `edges`: of its bins, in the image's units or where 0 and 1 are the image's 1st and 99th percentile."""

    name: str
    kl: float
    members: tuple[int, ...]
    pair: StreamPair
    edges: tuple[float, ...]

    @property
    def severity(self) -> Literal["none", "warn"]:
        return "warn" if self.kl > KL_CEILING else "none"


def compare_with_training(
    live: Mapping[tuple[int, Part], Sequence[Sequence[float] | None]], baseline: IntensityBaseline
) -> tuple[TrainingFinding, ...]:
    """`live`: by channel and part the studies' histograms, in any unit, None where a study has none. Histograms that
    fewer than LEAST_STUDIES have are left out, and those of another number of bins than the baseline's."""
    found = []
    for index, (pooled, bins) in enumerate(zip(baseline.pooled, baseline.channels, strict=True)):
        parts: tuple[tuple[Part, tuple[float, ...] | None, tuple[float, ...]], ...] = (
            ("whole", pooled.whole, bins.whole_edges),
            ("foreground", pooled.foreground, bins.foreground_edges),
        )
        for part, trained, edges in parts:
            if trained is None:
                continue
            members, shares = _shares(live.get((index, part), ()), len(trained))
            if len(members) < LEAST_STUDIES:
                continue
            name = f"{histogram_stream(index, part)} against the training data"
            training = np.asarray([trained], dtype=np.float64)
            found.append(
                TrainingFinding(
                    name=name,
                    kl=kl_divergence(tuple(shares.mean(axis=0) * SHARES), trained),
                    members=members,
                    pair=StreamPair(
                        reference=Histograms(name=name, shares=training / training.sum()),
                        live=Histograms(name=name, shares=shares),
                    ),
                    edges=edges,
                )
            )
    return tuple(found)


def histogram_stream(channel: int, part: Part) -> str:
    """What the stream of a channel's histograms is called."""
    return f"intensities {channel}" if part == "whole" else f"foreground-intensities {channel}"


def _shares(histograms: Sequence[Sequence[float] | None], bins: int) -> tuple[tuple[int, ...], FloatArray]:
    """Which studies have one, and their histograms (N, bins), each adding up to 1."""
    found = {
        place: np.asarray(row, dtype=np.float64) / sum(row)
        for place, row in enumerate(histograms)
        if row is not None and len(row) == bins and sum(row) > 0
    }
    return tuple(found), np.stack(list(found.values())) if found else np.zeros((0, bins))
