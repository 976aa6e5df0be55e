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
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Groups = NDArray[np.bool_]
"""(D, N): which studies are in each group; the others of the N are what it is compared with."""

ALPHA = 0.5
"""Studies that are added to every bin or category (Laplace): one that a side never had gives no infinity."""


_MANY = 64  # groups from which on a loop over the studies is quicker


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
        inside = groups.astype(np.float64)
        sums = inside @ self.shares
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
        n, total = groups.sum(axis=1), groups.shape[1]
        largest = _largest_gap(groups, n, order, last) / (n * (total - n))
        scaled: FloatArray = largest * np.sqrt(n * (total - n) / total)
        return scaled

    def distance(self, live: FloatArray) -> float:
        """Of live studies (n,) from all of these."""
        joined = Numbers(name=self.name, values=np.concatenate([live, self.values]))
        groups = np.zeros((1, len(joined.values)), dtype=np.bool_)
        groups[0, : len(live)] = True
        return float(joined.of_groups(groups)[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Categories:
    """`values`: one text for each of the N studies, "" where it has none."""

    name: str
    values: tuple[str, ...]

    def of_groups(self, groups: Groups) -> FloatArray:
        known = sorted(set(self.values))
        members = [[place for place, value in enumerate(self.values) if value == one] for one in known]
        sums = np.stack([groups.T[places].sum(axis=0) for places in members], axis=1).astype(np.float64)
        rest = np.array([len(places) for places in members]) - sums
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


def _largest_gap(
    groups: Groups, n: NDArray[np.int64], order: NDArray[np.intp], last: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """(D,): the largest |F_group - F_rest| over all values, times n m. In whole numbers: N c - n k, where c of the
    group and k of all are not above a value; `last` marks the places in `order` after which it is looked at."""
    total = groups.shape[1]
    if len(groups) < _MANY:
        steps = np.cumsum(groups[:, order] * total - n[:, None], axis=1)
        few: NDArray[np.int64] = np.abs(steps[:, last]).max(axis=1)
        return few
    # Study by study over all groups at once: a table of all steps would be read from memory again and again.
    by_study = np.ascontiguousarray(groups.T)
    gap, highest, lowest = (np.zeros(len(groups), dtype=np.int64) for _ in range(3))
    for place, is_last in zip(order, last, strict=True):
        gap += by_study[place] * total
        gap -= n
        if is_last:
            np.maximum(highest, gap, out=highest)
            np.minimum(lowest, gap, out=lowest)
    many: NDArray[np.int64] = np.maximum(highest, -lowest)
    return many


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
