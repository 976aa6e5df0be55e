"""Batch and patch that fill a share of a device's memory, found by measured steps (profile `article`, ART-06).

The batch grows first, up to the share of the dataset that the planner lets a batch have; where memory is left then,
the patch does. Where the smallest batch does not fit, the patch shrinks. Patches, and the depth of their networks, are
those that nnU-Net's planner goes through. A larger patch or batch never needs less memory, so both are bisected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import MemoryExceeded
from engine.topology import Topology

DEVICE_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class SizeChoice:
    """What the planner would take for a configuration, and what else it may. `patches` run from the largest to the
    smallest, `planned` is one of them; `largest_batch` is the most for a patch, whatever the memory."""

    configuration: str
    patches: Sequence[Topology]
    planned: int
    batch_size: int
    smallest_batch: int
    largest_batch: Callable[[Topology], int]


Fits = Callable[[Topology, int], bool]


def fit_to_memory(choice: SizeChoice, fits: Fits) -> tuple[Topology, int]:
    """The patch and the batch. Raises MemoryExceeded where nothing fits."""
    smallest, planned = choice.smallest_batch, choice.patches[choice.planned]
    if not fits(planned, smallest):
        last = len(choice.patches) - 1
        index = _first(choice.planned + 1, last, lambda i: fits(choice.patches[i], smallest))
        if index is None:
            raise MemoryExceeded(
                f"{choice.configuration}: not even {smallest} patches of {choice.patches[last].patch_size} fit into "
                "the device's memory"
            )
        return choice.patches[index], _largest_batch(choice, choice.patches[index], fits)
    batch = _largest_batch(choice, planned, fits)
    if batch < choice.largest_batch(planned):
        return planned, batch
    # The dataset allows no larger batch: what is left goes into the patch.
    index = _first(0, choice.planned, lambda i: fits(choice.patches[i], choice.largest_batch(choice.patches[i])))
    patch = planned if index is None else choice.patches[index]
    return patch, choice.largest_batch(patch)


def _largest_batch(choice: SizeChoice, patch: Topology, fits: Fits) -> int:
    """From the planned one on by doubling, then by bisection; the smallest is known to fit."""
    most, low = choice.largest_batch(patch), choice.smallest_batch
    high = most + 1  # does not fit, or may not be
    probe = min(max(choice.batch_size, low), most)
    while probe > low:
        if fits(patch, probe):
            low = probe
            if low == most:
                break
            probe = min(2 * low, most)
        else:
            high = probe
            break
    while high - low > 1:
        middle = (low + high) // 2
        if fits(patch, middle):
            low = middle
        else:
            high = middle
    return low


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The first number from `low` to `high` that `holds`, which holds for all after it; None where none does."""
    if low > high or not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
