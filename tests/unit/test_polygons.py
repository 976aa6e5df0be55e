"""gateway.training_data.polygons: even-odd, centres on the line included, the same from every side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from gateway.training_data.polygons import even_odd

SHAPE = (9, 12)


def _square(low: float, high: float) -> NDArray[np.float64]:
    return np.array([[low, low], [high, low], [high, high], [low, high]])


def _by_definition(points: NDArray[np.float64], row: int, column: int) -> bool | None:
    """On the line, or a ray to the right crosses the line an odd number of times; None so near to a line that either
    is right."""
    crossings = 0
    near = False
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        edge, centre = np.array([bx - ax, by - ay]), np.array([column - ax, row - ay])
        along = np.clip(centre @ edge / (edge @ edge), 0, 1) if edge.any() else 0.0
        away = float(np.linalg.norm(centre - along * edge))
        if away < 1e-6:
            return True
        near = near or away < 0.02
        if (ay <= row) != (by <= row):
            crossings += ax + (row - ay) / (by - ay) * (bx - ax) > column
    return None if near else crossings % 2 == 1


def test_a_square_between_centres_holds_the_centres_inside() -> None:
    mask = even_odd([_square(1.5, 4.5)], SHAPE)
    assert np.argwhere(mask).tolist() == [[r, c] for r in (2, 3, 4) for c in (2, 3, 4)]


def test_a_line_through_centres_gives_back_the_pixels_it_was_drawn_from() -> None:
    mask = even_odd([_square(2, 4)], SHAPE)
    assert np.argwhere(mask).tolist() == [[r, c] for r in (2, 3, 4) for c in (2, 3, 4)]


def test_a_contour_within_another_is_a_hole_and_one_beside_it_adds_up() -> None:
    hole = even_odd([_square(0.5, 6.5), _square(2.5, 4.5)], SHAPE)
    assert hole.sum() == 36 - 4
    assert not hole[3, 3]
    beside = even_odd([_square(0.5, 2.5), _square(5.5, 7.5)], SHAPE)
    assert beside.sum() == 8


def test_a_keyhole_leaves_its_hole_out() -> None:
    outer, inner = _square(0.5, 6.5), _square(2.5, 4.5)
    keyhole = np.concatenate([outer, outer[:1], inner, inner[:1]])
    assert np.array_equal(even_odd([keyhole], SHAPE), even_odd([outer, inner], SHAPE))


@pytest.mark.parametrize("points", [[[3.0, 2.0]], [[3.0, 2.0], [5.0, 2.0]]])
def test_a_contour_without_area_is_the_pixels_on_it(points: list[list[float]]) -> None:
    assert even_odd([np.array(points)], SHAPE).sum() == (1 if len(points) == 1 else 3)


def test_what_lies_outside_the_image_is_cut_off() -> None:
    assert even_odd([_square(-5.5, 40.5)], SHAPE).all()
    assert not even_odd([_square(-9.5, -1.5)], SHAPE).any()
    assert not even_odd([_square(20.5, 30.5)], SHAPE).any()


# Quarters of a pixel: a centre is on a line or well away from it.
POLYGONS = arrays.arrays(
    np.float64, st.tuples(st.integers(3, 9), st.just(2)), elements=st.integers(-8, 56).map(lambda n: n / 4)
)


@settings(max_examples=30, deadline=None)
@given(POLYGONS)
def test_any_polygon_is_filled_as_the_definition_says(points: NDArray[np.float64]) -> None:
    mask = even_odd([points], SHAPE)
    for (row, column), found in np.ndenumerate(mask):
        assert _by_definition(points, row, column) in (None, bool(found)), (row, column)


@settings(max_examples=30, deadline=None)
@given(POLYGONS)
def test_the_direction_of_the_axes_and_of_the_contour_does_not_matter(points: NDArray[np.float64]) -> None:
    mask = even_odd([points], SHAPE)
    mirrored = points * [-1, 1] + [SHAPE[1] - 1, 0]
    assert np.array_equal(even_odd([mirrored], SHAPE), mask[:, ::-1])
    assert np.array_equal(even_odd([points[:, ::-1]], SHAPE[::-1]), mask.T)
    assert np.array_equal(even_odd([points[::-1]], SHAPE), mask)
