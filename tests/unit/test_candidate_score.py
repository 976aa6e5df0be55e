"""Candidates are ranked by the labels that the references have."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.candidate_score import invented_voxels, mean_dice
from engine.metrics import RegionMetrics, summary
from engine.selection import Candidate


def _summary(*cases: dict[int, tuple[int, int, int]]) -> dict[str, object]:
    """Of cases with (true positives, false positives, false negatives) by label."""
    return summary(
        [
            (
                "reference",
                "prediction",
                {
                    (label,): RegionMetrics(
                        true_positives=tp,
                        false_positives=fp,
                        false_negatives=fn,
                        true_negatives=0,
                        hd95_mm=None,
                        surface_dice=None,
                    )
                    for label, (tp, fp, fn) in case.items()
                },
            )
            for case in cases
        ]
    )


def _candidate(name: str, document: dict[str, object]) -> Candidate:
    return Candidate(
        name=name,
        configurations=(name,),
        folder=Path(name),
        score=mean_dice(document),
        invented_voxels=invented_voxels(document),
    )


def test_where_every_label_occurs_the_score_is_nnunets() -> None:
    document = _summary({1: (4, 1, 1), 2: (1, 0, 2)}, {1: (4, 0, 0), 2: (0, 3, 0)})
    foreground = document["foreground_mean"]
    assert isinstance(foreground, dict)
    assert mean_dice(document) == pytest.approx(foreground["Dice"])
    assert invented_voxels(document) == 0


def test_a_model_that_invents_a_label_is_not_better_than_one_that_does_not() -> None:
    good = _candidate("good", _summary({1: (4, 1, 1), 2: (0, 0, 0)}))
    inventive = _candidate("inventive", _summary({1: (4, 1, 1), 2: (0, 7, 0)}))
    assert good.score == inventive.score == pytest.approx(0.8)
    assert inventive.invented_voxels == 7
    assert max([inventive, good], key=lambda c: c.rank) is good


def test_a_model_without_any_score_comes_last() -> None:
    none = _candidate("none", _summary({1: (0, 0, 0)}))
    assert none.score is None
    bad = _candidate("bad", _summary({1: (0, 5, 5)}))
    assert max([none, bad], key=lambda c: c.rank) is bad
    assert max([none, none], key=lambda c: c.rank) is none
