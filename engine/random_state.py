"""Random numbers that depend on what they are for, not on what was drawn before.

A generator is made from a seed, a purpose and the place of a sample in the training (epoch, iteration, sample of the
batch). So a batch is the same on any number of workers, and after a training was resumed.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """One independent stream each. The numbers are part of what a seed means: they never change."""

    TRAINING_CASE = 1
    TRAINING_PATCH = 2
    AUGMENTATION = 3
    VALIDATION_CASE = 4
    VALIDATION_PATCH = 5
    WEIGHTS = 6
    REHEARSAL = 7


def random_generator(
    seed: int, purpose: Purpose, *, epoch: int, iteration: int, sample: int = 0
) -> np.random.Generator:
    """A Philox generator whose key is seed and purpose and whose counter is the place; all numbers from 0 to 2^64."""
    counter = np.array((0, sample, iteration, epoch), dtype=np.uint64)
    key = np.array((seed, purpose), dtype=np.uint64)
    # The lowest word of the counter is left to the draws: no two places can meet.
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
