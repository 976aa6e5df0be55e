"""How many connected parts a segment has, plane by plane: a labelled copy would take four bytes a voxel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.logit_kernels import compiled


def count_components(labels: NDArray[Any], chosen: NDArray[np.bool_]) -> int:
    """Parts of a label map (Z, Y, X) that do not touch, not even by a corner; `chosen` says of each label value whether
    it belongs to the segment."""
    return int(_count(labels, chosen))


@compiled
def _count(labels: NDArray[Any], chosen: NDArray[np.bool_]) -> int:
    depth, height, width = labels.shape
    parents = np.zeros(1024, dtype=np.int64)
    made = joined = 0
    # Part 0 is "outside"; an edge all around spares the comparisons.
    before = np.zeros((height + 2, width + 2), dtype=np.int64)
    here = np.zeros((height + 2, width + 2), dtype=np.int64)
    for z in range(depth):
        here[:, :] = 0
        for y in range(height):
            for x in range(width):
                if not chosen[labels[z, y, x]]:
                    continue
                own = 0
                for near in range(13):
                    # Nine neighbours in the plane before, three in the row before, one to the left.
                    if near < 9:
                        part = before[y + near // 3, x + near % 3]
                    elif near < 12:
                        part = here[y, x + near - 9]
                    else:
                        part = here[y + 1, x]
                    if part == 0 or part == own:
                        continue
                    if own == 0:
                        own = part
                        continue
                    one, other = _root(parents, own), _root(parents, part)
                    if one != other:
                        parents[max(one, other)] = min(one, other)
                        joined += 1
                if own == 0:
                    made += 1
                    if made == len(parents):
                        longer = np.zeros(2 * len(parents), dtype=np.int64)
                        longer[: len(parents)] = parents
                        parents = longer
                    parents[made] = made
                    own = made
                here[y + 1, x + 1] = own
        before, here = here, before
    return made - joined


@compiled
def _root(parents: NDArray[np.int64], part: int) -> int:
    while parents[part] != part:
        parents[part] = parents[parents[part]]
        part = parents[part]
    return part
