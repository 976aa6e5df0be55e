"""Under whom a result is filed, when the first slice does not say."""

from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from gateway.results.encoding import _identified


def _header(**values: str) -> Dataset:
    header = Dataset()
    for keyword, value in values.items():
        setattr(header, keyword, value)
    return header


@pytest.mark.requirement("OUT-39", open="rendering in OHIF")
def test_an_empty_identity_of_the_first_slice_is_filled_from_a_later_one() -> None:
    headers = [_header(PatientID="", StudyID="7"), _header(PatientName="Ärztin^Änne"), _header(PatientID="P1")]
    header = _identified(headers)
    assert (header.PatientID, str(header.PatientName), header.StudyID) == ("P1", "Ärztin^Änne", "7")


def test_what_the_first_slice_says_stays() -> None:
    assert _identified([_header(PatientID="P1"), _header(PatientID="P2")]).PatientID == "P1"


def test_what_no_slice_says_stays_absent() -> None:
    assert "PatientID" not in _identified([_header(), _header()])
