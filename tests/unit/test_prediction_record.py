"""Predictions in a fold's validation belong to the weights that made them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.dataset import Case
from engine.errors import DatasetInvalid
from engine.prediction_record import (
    PREDICTED_BY,
    claim_predictions,
    forget_predictions,
    read_record,
    reference_stamps,
)

ENDING = ".nii.gz"


@pytest.fixture
def fold(tmp_path: Path) -> Path:
    """Predictions of a case, and its reference."""
    for file in ("validation/a.nii.gz", "validation/summary.json", "validation_logits/a.npy", "a.nii.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(file)
    return tmp_path


def _claim(fold: Path, predictor: str) -> bool:
    case = Case(name="a", channels={}, label=fold / "a.nii.gz")
    return claim_predictions(fold / "validation", fold / "validation_logits", predictor, [case], file_ending=ENDING)


def _left(fold: Path) -> set[str]:
    return {path.name for folder in ("validation", "validation_logits") for path in (fold / folder).iterdir()}


def test_predictions_whose_maker_is_not_known_are_removed(fold: Path) -> None:
    assert not _claim(fold, "mine")
    assert _left(fold) == {PREDICTED_BY}


def test_predictions_of_other_weights_are_removed_and_ones_own_stay(fold: Path) -> None:
    _claim(fold, "mine")
    for file in ("validation/a.nii.gz", "validation_logits/a.npy"):
        (fold / file).write_text("predicted")
    assert _claim(fold, "mine")
    assert _left(fold) == {PREDICTED_BY, "a.nii.gz", "a.npy"}
    assert not _claim(fold, "other")
    assert _left(fold) == {PREDICTED_BY}


def test_a_record_that_is_damaged_is_none(fold: Path) -> None:
    _claim(fold, "mine")
    (fold / "validation/a.nii.gz").write_text("predicted")
    (fold / "validation" / PREDICTED_BY).write_text("")
    with pytest.raises(DatasetInvalid):
        read_record(fold / "validation")
    assert not _claim(fold, "mine")


def test_the_record_has_the_references_as_they_were(fold: Path) -> None:
    _claim(fold, "mine")
    record = read_record(fold / "validation")
    assert record is not None
    cases = [Case(name="a", channels={}, label=fold / "a.nii.gz")]
    assert record.references == reference_stamps(cases)
    (fold / "a.nii.gz").write_text("corrected by somebody")
    assert record.references != reference_stamps(cases)
    (fold / "a.nii.gz").unlink()
    with pytest.raises(DatasetInvalid, match="a: its label map cannot be read"):
        reference_stamps(cases)


def test_where_nothing_was_predicted_nothing_is_forgotten(tmp_path: Path) -> None:
    assert read_record(tmp_path / "validation") is None
    assert not forget_predictions(tmp_path / "validation", tmp_path / "logits", file_ending=ENDING)
