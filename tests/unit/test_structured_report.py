"""gateway.results.structured_report, read back item by item (tests/conformance asks other readers)."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from gateway.results.structured_report import encode_structured_report
from tests.support.phantoms import write_series
from tests.support.result_contents import content_of, part_of


def _numbers(item: Dataset) -> Iterator[tuple[str, float]]:
    """Every measurement of a content tree: what it is called and its value."""
    if item.get("ValueType") == "NUM":
        name = item.ConceptNameCodeSequence[0].CodeMeaning
        yield name, float(item.MeasuredValueSequence[0].NumericValue)
    for child in item.get("ContentSequence", []):
        yield from _numbers(child)


@pytest.mark.requirement("ART-16")
def test_an_estimate_is_a_measurement_and_its_bound_another(tmp_path: Path) -> None:
    series = write_series(tmp_path / "source")
    content = content_of(part_of(series.files), series.labels)
    values = dict(_numbers(pydicom.dcmread(BytesIO(encode_structured_report(content).data))))
    assert values["Check estimated-dice: left structure"] == 0.88
    assert values["Check estimated-dice, 90 % bound: left structure"] == 0.75
    assert values["Check confidence"] == 0.91
