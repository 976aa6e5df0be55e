"""Rehearsal: while a network learns new cases, a stated part of every batch's samples are of those it learnt before.

A network that is trained on new cases alone forgets the old ones; mixing in old cases is the plainest remedy, and a
strong one (Robins, Catastrophic forgetting, rehearsal and pseudorehearsal, 1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from engine.random_state import Purpose, random_generator

LEAST_SHARE, MOST_SHARE = 0.25, 0.5
SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """`share` of all samples are of the `old` cases, the rest of the others that are trained on."""

    old: tuple[str, ...]
    share: float

    def __post_init__(self) -> None:
        if not LEAST_SHARE <= self.share <= MOST_SHARE:
            raise ValueError(f"rehearsal share {self.share:g}: {LEAST_SHARE:g} to {MOST_SHARE:g} is allowed")


@dataclass(frozen=True, kw_only=True)
class RehearsalDraw:
    """A rehearsal by the indices of the training cases. Both sides have one at least."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    share: float

    @classmethod
    def of(cls, rehearsal: Rehearsal | None, names: Sequence[str]) -> Self | None:
        """`names` are the training cases in their order; None without rehearsal. Raises ValueError where one side has
        no case."""
        if rehearsal is None:
            return None
        known = set(rehearsal.old)
        old = tuple(index for index, name in enumerate(names) if name in known)
        new = tuple(index for index, name in enumerate(names) if name not in known)
        if not old or not new:
            raise ValueError(f"{len(old)} old and {len(new)} new cases: a rehearsal needs both")
        return cls(old=old, new=new, share=rehearsal.share)

    def is_old(self, *, seed: int, batch_size: int, epoch: int, iteration: int, sample: int) -> bool:
        """Whether this sample is of an old case.

        The first n samples of an epoch have n * share old ones, rounded, whenever a batch ends: so an epoch has the
        share exactly. Which places of the batch they take is random, since the last ones are those with foreground.
        """
        before, after = (_rounded(index * batch_size * self.share) for index in (iteration, iteration + 1))
        order = random_generator(seed, Purpose.REHEARSAL, epoch=epoch, iteration=iteration).permutation(batch_size)
        return sample in order[: after - before]

    def pool(self, *, seed: int, batch_size: int, epoch: int, iteration: int, sample: int) -> tuple[int, ...]:
        """The cases that this sample is drawn from."""
        is_old = self.is_old(seed=seed, batch_size=batch_size, epoch=epoch, iteration=iteration, sample=sample)
        return self.old if is_old else self.new


def _rounded(value: float) -> int:
    """To the nearest, halves up; `round` takes halves to even, by which batches would differ for no reason."""
    return math.floor(value + 0.5)
