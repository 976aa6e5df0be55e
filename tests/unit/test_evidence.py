"""The rules that declare a study whole, and slice gaps, as pure functions."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydicom.dataset import Dataset

from gateway.intake.evidence import (
    AssociationEvidence,
    ExpectedCount,
    SliceGap,
    SlicePosition,
    StudyEvidence,
    decide,
    slice_gaps,
    slice_position,
)
from gateway.settings import Completeness

T0 = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
SETTINGS = Completeness(quiet_s=30, quiet_open_s=300, give_up_s=7200, expected_count="wait", gap_check=True)
GAP = SliceGap(series_instance_uid="1.2", after_mm=1.0, before_mm=3.0, missing=1)


def association(ended: str = "released", *, resumed: bool = False) -> AssociationEvidence:
    return AssociationEvidence(association_id="a", ended=ended, ended_at=T0, objects=20, resumed=resumed)


def evidence(**changes: Any) -> StudyEvidence:
    base = StudyEvidence(
        study_instance_uid="1.2.3",
        objects=20,
        received=20,
        object_states={"current": 20},
        series={"1.2": 20},
        first_object_at=T0 - timedelta(seconds=10),
        last_object_at=T0,
        associations=(association(),),
        gaps_checked=True,
    )
    return replace(base, **changes)


def expected(count: int | None = None, **more: Any) -> ExpectedCount:
    return ExpectedCount(source="PACS@h:104", count=count, **more)


def rule_after(seconds: float, found: StudyEvidence, settings: Completeness = SETTINGS) -> str | None:
    return decide(found, settings, T0 + timedelta(seconds=seconds)).rule


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
@pytest.mark.parametrize(
    ("changes", "seconds", "rule"),
    [
        ({}, 29, None),
        ({}, 30, "quiet-after-release"),
        ({"associations": (association("open"),)}, 299, None),
        ({"associations": (association("open"),)}, 300, "quiet-open"),
        ({"associations": (association("unknown"),)}, 299, None),
        ({"associations": (association("aborted"),)}, 299, None),
        ({"associations": (association("aborted"),)}, 300, "quiet-open"),
        ({"associations": (association("aborted", resumed=True), association())}, 30, "quiet-after-release"),
        ({"associations": (association(), association("open"))}, 299, None),
        ({"wish": "complete"}, 0, "operator"),
        ({"wish": "wait"}, 1e6, None),
        ({"expected": expected(20)}, 0, "expected-count"),
        ({"expected": expected(20), "associations": (association("open"),)}, 0, None),
        ({"expected": expected(20), "associations": (association("aborted"),)}, 0, "expected-count"),
        ({"expected": expected(21)}, 7199, None),
        ({"expected": expected(21)}, 7200, "give-up"),
        ({"expected": expected(19)}, 29, None),
        ({"expected": expected(19)}, 30, "quiet-after-release"),
        ({"expected": expected(20), "objects": 18, "quarantined": 2}, 7199, None),
        ({"expected": expected(20), "objects": 18, "quarantined": 2}, 7200, "give-up"),
        ({"expected": expected(20), "quarantined": 1}, 299, None),
        ({"quarantined": 1}, 299, None),
        ({"quarantined": 1}, 300, "quiet-after-release"),
        ({"quarantined": 1, "wish": "complete"}, 0, "operator"),
        ({"expected": expected(pending=True)}, 30, None),
        ({"expected": expected(pending=True)}, 300, "quiet-after-release"),
        ({"expected": expected(problem="asked, no answer")}, 30, "quiet-after-release"),
        ({"gaps": (GAP,)}, 299, None),
        ({"gaps": (GAP,)}, 300, "quiet-after-release"),
        ({"gaps": (GAP,), "expected": expected(20)}, 0, "expected-count"),
    ],
)
def test_which_rule_declares_a_study_whole(changes: dict[str, Any], seconds: float, rule: str | None) -> None:
    assert rule_after(seconds, evidence(**changes)) == rule


def test_switched_off_evidence_does_not_decide() -> None:
    off = SETTINGS.model_copy(update={"expected_count": "off", "gap_check": False})
    assert rule_after(30, evidence(expected=expected(99), gaps=(GAP,)), off) == "quiet-after-release"


def test_what_prolonged_the_wait_is_kept() -> None:
    late = decide(evidence(gaps=(GAP,)), SETTINGS, T0 + timedelta(seconds=300))
    assert late.because == ("slice gaps",)


def test_waiting_says_for_what() -> None:
    found = decide(evidence(associations=(association("aborted"),)), SETTINGS, T0)
    assert "broke off" in found.waiting_for
    assert "PACS@h:104" in decide(evidence(expected=expected(21)), SETTINGS, T0).waiting_for


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
