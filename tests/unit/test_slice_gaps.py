"""Positions of slices as received, and the gaps between them, as pure functions."""

from __future__ import annotations

import math

import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from gateway.intake.slice_gaps import SlicePosition, slice_gaps, slice_position


def stack(
    heights: list[float],
    cosines: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    origin: tuple[float, float, float] = (0, 0, 0),
) -> list[SlicePosition]:
    a, b, c, d, e, f = cosines
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    return [
        SlicePosition(
            series_instance_uid="1.2",
            position_mm=(
                origin[0] + h * normal[0],
                origin[1] + h * normal[1],
                origin[2] + h * normal[2],
            ),
            cosines=cosines,
        )
        for h in heights
    ]


TILT = (1.0, 0.0, 0.0, 0.0, math.cos(0.4), -math.sin(0.4))


@pytest.mark.requirement("CMP-16")
@pytest.mark.parametrize("cosines", [(1, 0, 0, 0, 1, 0), TILT, (0, 1, 0, 0, 0, -1)])
@pytest.mark.parametrize("spacing", [1.0, 2.5, 6.5])
def test_a_missing_slice_is_found_in_any_order_and_orientation(cosines: tuple[float, ...], spacing: float) -> None:
    heights = [i * spacing for i in range(12) if i not in (4, 7, 8)]
    gaps = slice_gaps(list(reversed(stack(heights, cosines, (5, -7, 30)))))
    assert [g.missing for g in gaps] == [1, 2]
    assert slice_gaps(stack([i * spacing for i in range(12)], cosines)) == ()


def test_echoes_at_the_same_position_are_no_gap_and_do_not_hide_one() -> None:
    heights = [float(i) for i in range(8) if i != 3]
    assert [g.missing for g in slice_gaps(stack(heights + heights))] == [1]


def test_irregular_series_and_localizers_have_no_gaps() -> None:
    assert slice_gaps(stack([0, 1.3, 5, 11, 12.7, 20])) == ()
    localizer = stack([0, 40, 80]) + stack([0, 40, 80], (0, 1, 0, 0, 0, -1)) + stack([0, 40], (1, 0, 0, 0, 0, -1))
    assert slice_gaps(localizer) == ()


def test_headers_without_a_usable_position_have_none() -> None:
    header = Dataset()
    assert slice_position(header) is None
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.ImagePositionPatient = [1, 2]
    assert slice_position(header) is None
    header.ImagePositionPatient = [1, 2, 3]
    found = slice_position(header)
    assert found is not None
    assert found.position_mm == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("value", ["1.7e308", "-1e7", "nan", "inf", "1e400"])
@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient"])
def test_a_value_beyond_one_kilometre_is_no_position(keyword: str, value: str) -> None:
    header = Dataset()
    header.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    header.ImagePositionPatient = ["1", "2", "3"]
    raw = "\\".join([value, *["0"] * (2 if keyword == "ImagePositionPatient" else 5)]).encode()
    tag = header[keyword].tag
    header._dict[tag] = RawDataElement(tag, "DS", len(raw), raw, 0, False, True)
    assert slice_position(header) is None
