"""The rules that declare a study whole, and slice gaps, as pure functions."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gateway.intake.evidence import (
    AssociationEvidence,
    ExpectedCount,
    StudyEvidence,
    decide,
)
from gateway.intake.slice_gaps import SliceGap
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
        last_new_object_at=T0,
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
        ({"conflicting": 1}, 299, None),
        ({"conflicting": 1}, 300, "quiet-after-release"),
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
    aside = decide(evidence(quarantined=2, conflicting=1), SETTINGS, T0 + timedelta(seconds=30))
    assert aside.waiting_for == "another copy of 2 quarantined objects and 1 objects in conflict, at most 300 s"
