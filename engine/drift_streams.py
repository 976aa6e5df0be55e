"""What is watched for drift, and how far one group of studies is from another in it (ART-20).

A stream is one fact of every study: a histogram, a number or a category. The unit is the study, never the voxel: voxels
of one study are not independent, and tests on pooled voxels find a difference between two halves of one site.

| stream | distance of a group from another |
| --- | --- |
| Histograms | Jensen-Shannon divergence of the mean histograms (nats, 0 to ln 2); beside it KL(group || reference) |
| Numbers | Kolmogorov-Smirnov's D, times the root of n m / (n + m), so that it means the same for every size |
| Categories | G = 2 sum O ln(O / E) per degree of freedom; categories that the reference never had share one bucket |

Studies in which a fact is missing take part: a missing number is lower than every other, a missing category is one of
its own, a missing histogram (nothing was found) is left out.

Shape legend: N studies, D groups that are drawn from them, B bins, K categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Steps = NDArray[np.int32] | NDArray[np.int64]

ALPHA = 0.5
"""Studies that are added to every bin or category (Laplace): one that a side never had gives no infinity."""

_MANY = 64  # groups from which on a loop over the studies is quicker
_VALUES_AT_ONCE = 32  # of a number; a table of so many rows stays in the processor's cache


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """`members` (D, N): which studies are in each group; the others of the N are what it is compared with. What all
    streams need of them is worked out once."""

    members: NDArray[np.bool_]

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(D,): studies in each."""
        sizes: NDArray[np.int64] = np.count_nonzero(self.members, axis=1)
        return sizes

    @cached_property
    def inside(self) -> FloatArray:
        """(D, N): `members` as 0 and 1."""
        return self.members.astype(np.float64)

    @cached_property
    def steps(self) -> Steps:
        """(N, D): N - n of a study that is in the group, -n of one that is not, n being the group's size."""
        total = self.members.shape[1]
        sizes: Steps = self.sizes
        if total**2 <= np.iinfo(np.int32).max:
            sizes = sizes.astype(np.int32)
        steps: Steps = np.where(self.members.T, np.subtract(total, sizes, dtype=sizes.dtype), -sizes)
        return steps


class Stream(Protocol):
    """One fact of the studies of a reference, in their order."""

    @property
    def name(self) -> str: ...

    def of_groups(self, groups: Groups) -> FloatArray:
        """(D,): how far each group is from the rest."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Histograms:
    """`shares` (N, B): each study's histogram, adding up to 1; a row of zeros where a study has none."""

    name: str
    shares: FloatArray

    def of_groups(self, groups: Groups) -> FloatArray:
        sums = groups.inside @ self.shares
        return jensen_shannon(_smoothed(sums), _smoothed(self.shares.sum(axis=0) - sums))

    def distance(self, live: FloatArray) -> float:
        """Of live studies (n, B) from all of these."""
        return float(jensen_shannon(_smoothed(live.sum(axis=0)), _smoothed(self.shares.sum(axis=0))))

    def kl(self, live: FloatArray) -> float:
        """KL(live || reference) in nats."""
        return float(kl_divergence(_smoothed(live.sum(axis=0)), _smoothed(self.shares.sum(axis=0))))


@dataclass(frozen=True, kw_only=True, eq=False)
class Numbers:
    """`values` (N,): NaN where a study has none."""

    name: str
    values: FloatArray

    def of_groups(self, groups: Groups) -> FloatArray:
        ranked = _ranked(self.values)
        order = np.argsort(ranked, kind="stable")
        # Equal values are one step of the distributions.
        last = np.append(ranked[order][1:] != ranked[order][:-1], True)
        n, total = groups.sizes, groups.members.shape[1]
        largest = _largest_gap(groups.steps, order, last) / (n * (total - n))
        scaled: FloatArray = largest * np.sqrt(n * (total - n) / total)
        return scaled

    def distance(self, live: FloatArray) -> float:
        """Of live studies (n,) from all of these."""
        joined = Numbers(name=self.name, values=np.concatenate([live, self.values]))
        members = np.zeros((1, len(joined.values)), dtype=np.bool_)
        members[0, : len(live)] = True
        return float(joined.of_groups(Groups(members=members))[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Categories:
    """`values`: one text for each of the N studies, "" where it has none."""

    name: str
    values: tuple[str, ...]

    def of_groups(self, groups: Groups) -> FloatArray:
        known = sorted(set(self.values))
        places = [[place for place, value in enumerate(self.values) if value == one] for one in known]
        counts = np.zeros((len(groups.sizes), len(known)), dtype=np.int64)
        # The one that most studies have is what is left: often there is no other.
        most = max(range(len(known)), key=lambda index: len(places[index]))
        for index, of_one in enumerate(places):
            if index != most:
                counts[:, index] = groups.members.T[of_one].sum(axis=0)
        counts[:, most] = groups.sizes - counts.sum(axis=1)
        sums = counts.astype(np.float64)
        rest = np.array([len(of_one) for of_one in places]) - sums
        # A category that only the group has is unseen to the rest.
        unseen = (sums * (rest == 0)).sum(axis=1)
        return _g(np.where(rest == 0, 0.0, sums), rest, unseen)

    def distance(self, live: Sequence[str]) -> float:
        """Of live studies from all of these."""
        known = sorted(set(self.values))
        counts = np.array([[live.count(one) for one in known]], dtype=np.float64)
        reference = np.array([[self.values.count(one) for one in known]], dtype=np.float64)
        unseen = np.array([float(len(live)) - counts.sum()])
        return float(_g(counts, reference, unseen)[0])


def kl_divergence(current: FloatArray, reference: FloatArray) -> FloatArray:
    """KL(current || reference) along the last axis, in nats; both positive and adding up to 1."""
    found: FloatArray = np.maximum(np.sum(current * np.log(current / reference), axis=-1), 0.0)
    return found


def jensen_shannon(one: FloatArray, other: FloatArray) -> FloatArray:
    """Symmetric, from 0 to ln 2; as `kl_divergence`."""
    middle = (one + other) / 2
    found: FloatArray = (kl_divergence(one, middle) + kl_divergence(other, middle)) / 2
    return found


def _smoothed(sums: FloatArray) -> FloatArray:
    """Sums of shares over studies (..., B) as a distribution; ALPHA of a study is spread over all bins."""
    spread: FloatArray = sums + ALPHA / sums.shape[-1]
    smoothed: FloatArray = spread / spread.sum(axis=-1, keepdims=True)
    return smoothed


def _largest_gap(steps: Steps, order: NDArray[np.intp], last: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(D,): the largest |F_group - F_rest| over all values, times n m. In whole numbers: N c - n k, where c of the
    group and k of all are not above a value, which is the sum of the `steps` (N, D) of these k. `last` marks the places
    in `order` after which it is looked at."""
    if np.count_nonzero(last) == 1:
        return np.zeros(steps.shape[1], dtype=np.int64)  # one value: both have all of it
    if steps.shape[1] < _MANY:
        sums = np.cumsum(steps[order], axis=0, dtype=np.int64)
        few: NDArray[np.int64] = np.abs(sums[last]).max(axis=0)
        return few
    # Study by study over all groups at once: a table of all sums would be read from memory again and again.
    table = np.zeros((_VALUES_AT_ONCE + 1, steps.shape[1]), dtype=steps.dtype)
    rows, highest, lowest = list(table), np.zeros_like(table[0]), np.zeros_like(table[0])
    place, begun = 0, False
    for study, is_last in zip(order.tolist(), last.tolist(), strict=True):
        np.add(rows[place + begun], steps[study], out=rows[place + 1])
        begun = not is_last
        place += is_last
        if place == _VALUES_AT_ONCE:
            _widen(highest, lowest, table[1:])
            rows[0][:] = rows[place]
            place = 0
    _widen(highest, lowest, table[: place + 1])
    many: NDArray[np.int64] = np.maximum(highest, -lowest).astype(np.int64)
    return many


def _widen(highest: Steps, lowest: Steps, rows: Steps) -> None:
    """`highest` and `lowest` (D,) are those of the `rows` (any, D) too from here on."""
    np.maximum(highest, rows.max(axis=0), out=highest)
    np.minimum(lowest, rows.min(axis=0), out=lowest)


def _ranked(values: FloatArray) -> FloatArray:
    return np.where(np.isnan(values), -np.inf, values)


def _g(counts: FloatArray, reference: FloatArray, unseen: FloatArray) -> FloatArray:
    """(D,) of counts (D, K) of groups and of what each is compared with; `unseen` (D,) of the groups alone."""
    observed = np.concatenate([counts, unseen[:, None]], axis=1)
    others = np.concatenate([np.broadcast_to(reference, counts.shape), np.zeros_like(unseen)[:, None]], axis=1) + ALPHA
    share = others / others.sum(axis=1, keepdims=True)
    expected = share * observed.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(observed > 0, observed * np.log(observed / expected), 0.0)
    found: FloatArray = 2 * terms.sum(axis=1) / max(1, counts.shape[1])
    return found
