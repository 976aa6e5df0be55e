from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from engine.component_count import count_components


@pytest.mark.parametrize("share", [0.02, 0.08, 0.15, 0.3, 0.6])
@pytest.mark.parametrize("shape", [(1, 40, 50), (20, 30, 40), (60, 3, 1)])
def test_parts_are_those_of_labelling_with_all_26_neighbours(shape: tuple[int, int, int], share: float) -> None:
    random = np.random.default_rng(5)
    labels = np.where(random.random(shape) < share, random.integers(1, 4, shape), 0).astype(np.uint8)
    chosen = np.array([False, True, False, True])
    expected = ndimage.label(chosen[labels], structure=np.ones((3, 3, 3)))[1]
    assert count_components(labels, chosen) == expected


def test_a_spiral_that_closes_late_is_one_part_and_an_empty_segment_has_none() -> None:
    comb = np.zeros((9, 9, 9), dtype=np.uint16)
    comb[:, ::2, ::2] = 300
    chosen = np.zeros(301, dtype=np.bool_)
    assert count_components(comb, chosen) == 0
    chosen[300] = True
    assert count_components(comb, chosen) == 25
    comb[8] = 300
    assert count_components(comb, chosen) == 1
    assert count_components(comb[:, :0], chosen) == 0
