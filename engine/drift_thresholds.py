"""From which distance on a window of studies is another than the reference: thresholds from the reference alone.

Many groups as large as the window are drawn from the reference and compared with the rest of it: such are distances
where nothing has changed. Two things follow from one set of draws:

- `usual`, per stream: the distance that 1 of 100 groups exceeds. Distances of different kinds become comparable
  as multiples of it.
- `warn` and `critical`, for all streams together: the multiple that the *largest* of all streams exceeds in so many of
  the groups (Westfall and Young's maximum, 1993). Looking at many streams therefore costs no more false alarms,
  whatever their dependence.

A group and the rest of the reference are a little further apart than a window and the whole reference: the thresholds
are on the safe side. They belong to one window size, since what is usual shrinks with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from engine.drift_streams import FloatArray, Groups, Stream

LEAST_WINDOW = 30
"""Studies; fewer say too little about any stream."""
LEAST_REFERENCE = 60
WARN, CRITICAL = 0.005, 0.001
"""Share of unchanged windows that exceed the threshold in any stream."""
DRAWS = 4000
_USUAL = 0.99
_SEED = 12345
# A stream that never varies in the reference has distances of 0: any change of it is one.
_LEAST_DISTANCE = 1e-9
_MOST_CELLS = 2**24
_CELLS_AT_ONCE = 2**20  # of the lots: as many as a processor's cache holds


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """For windows of `window` studies against a reference of `reference`. `usual`: by stream, the distance that 1 of
    100 unchanged windows exceeds; `warn` and `critical`: multiples of it."""

    window: int
    reference: int
    usual: Mapping[str, float]
    warn: float
    critical: float


def calibrate_thresholds(
    streams: Sequence[Stream], *, studies: int, window: int, draws: int = DRAWS, seed: int = _SEED
) -> Thresholds:
    """Thresholds for a window, from a reference of so many `studies`, in which all `streams` are.

    ValueError for no streams, a window below LEAST_WINDOW, or a reference that has not twice as many.
    """
    if not streams or window < LEAST_WINDOW or studies < max(LEAST_REFERENCE, 2 * window):
        raise ValueError(
            f"{len(streams)} streams, window {window}, reference {studies}: at least 1, {LEAST_WINDOW} and twice the "
            "window are needed"
        )
    distances = np.concatenate(
        [
            np.stack([stream.of_groups(groups) for stream in streams])
            for groups in draw_groups(studies, window, draws, np.random.default_rng(seed))
        ],
        axis=1,
    )
    usual = np.maximum(np.quantile(distances, _USUAL, axis=1), _LEAST_DISTANCE)
    largest = (distances / usual[:, None]).max(axis=0)
    return Thresholds(
        window=window,
        reference=studies,
        usual=MappingProxyType({stream.name: float(value) for stream, value in zip(streams, usual, strict=True)}),
        warn=_exceeded(largest, WARN),
        critical=_exceeded(largest, CRITICAL),
    )


def _exceeded(largest: FloatArray, share: float) -> float:
    """The conservative quantile: of D draws at most `share` (D + 1) - 1 are above it."""
    rank = int(np.ceil((1 - share) * (len(largest) + 1))) - 1
    return float(np.sort(largest)[min(rank, len(largest) - 1)])


def draw_groups(studies: int, window: int, draws: int, rng: np.random.Generator) -> Iterator[Groups]:
    """Groups without replacement, in blocks that fit into memory."""
    block = max(1, _MOST_CELLS // studies)
    at_once = max(1, _CELLS_AT_ONCE // studies)
    for start in range(0, draws, block):
        count = min(block, draws - start)
        # Stored study by study, which is how numbers are looked at.
        members = np.empty((studies, count), dtype=np.bool_).T
        for first in range(0, count, at_once):
            for index, lots in enumerate(rng.random((min(at_once, count - first), studies)), start=first):
                members[index] = lots <= highest_of(lots, window)
        yield Groups(members=members)


def highest_of(lots: FloatArray, window: int) -> np.float64:
    """The highest of the `window` smallest of lots (N,) from 0 to 1. It is looked for where it is to be expected, six
    standard deviations around, and among all of them where it is not there."""
    middle, around = window / len(lots), 3 / np.sqrt(len(lots))
    below = lots < middle - around
    near = lots[~below & (lots < middle + around)]
    place = window - 1 - int(np.count_nonzero(below))
    if not 0 <= place < len(near):
        near, place = lots, window - 1
    highest: np.float64 = np.partition(near, place)[place]
    return highest
