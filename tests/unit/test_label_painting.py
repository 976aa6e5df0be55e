"""gateway.training_data.label_painting: who gets a voxel that two labels claim, whatever is painted first."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from gateway.training_data.label_painting import LabelPainter, Overlap

PLACES = {1: [0, 1, 2], 2: [2, 3], 3: [3, 4, 0]}


@pytest.mark.parametrize("order", list(permutations(PLACES)))
@pytest.mark.parametrize(
    ("overlap", "expected"), [("first", [1, 1, 1, 2, 3]), ("last", [3, 1, 2, 3, 3]), ("refuse", [3, 1, 2, 3, 3])]
)
def test_the_order_of_painting_does_not_matter(order: tuple[int, ...], overlap: Overlap, expected: list[int]) -> None:
    painter = LabelPainter((1, 1, 6), 3, overlap)
    for value in order:
        x = np.array(PLACES[value])
        painter.paint(value, np.zeros_like(x), np.zeros_like(x), x)
        painter.paint(value, np.zeros_like(x), np.zeros_like(x), x)
    assert painter.array[0, 0].tolist() == [*expected, 0]
    assert set(painter.overlaps) == {(1, 2), (2, 3), (1, 3)}
    assert painter.painted == set(expected)


def test_many_labels_get_a_wider_type() -> None:
    painter = LabelPainter((1, 1, 1), 300, "refuse")
    zero = np.zeros(1, np.intp)
    painter.paint(300, zero, zero, zero)
    assert painter.array.item() == 300
