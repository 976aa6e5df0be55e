"""Results of a gateway that come back are recognised by their header alone (OUT-46)."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import Tag

from gateway.intake.own_results import is_own_result
from gateway.results.quality import Verdict
from gateway.results.secondary_capture import encode_secondary_capture
from gateway.results.segmentation import encode_segmentation
from gateway.results.structured_report import encode_notice, encode_structured_report
from tests.support.phantoms import write_series
from tests.support.result_contents import content_of, part_of


@pytest.mark.requirement("OUT-46")
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "SR", "SC", "notice"])
def test_every_object_we_make_is_recognised(tmp_path: Path, kind: str) -> None:
    series = write_series(tmp_path, shape=(3, 12, 12))
    part = part_of(series.files)
    content = content_of(part, series.labels, verdict=Verdict.HOLD)
    assert part.volume is not None
    made = {
        "BINARY": lambda: encode_segmentation(content),
        "LABELMAP": lambda: encode_segmentation(content, encoding="LABELMAP"),
        "SR": lambda: encode_structured_report(content),
        "SC": lambda: encode_secondary_capture(content, part.volume.array[0]),
        "notice": lambda: encode_notice(content),
    }[kind]()
    header = pydicom.dcmread(BytesIO(made.data), stop_before_pixels=True)
    assert is_own_result(header) == "Manufacturer is seggate"
    assert is_own_result(part.headers[0]) is None


@pytest.mark.requirement("OUT-46")
def test_an_object_made_from_ours_by_others_is_recognised() -> None:
    """A PACS that rewrites Manufacturer keeps Contributing Equipment."""
    item = Dataset()
    item.Manufacturer = "seggate"
    header = Dataset()
    header.Manufacturer = "Other"
    header.ContributingEquipmentSequence = DicomSequence([Dataset(), item])
    assert is_own_result(header) == "ContributingEquipmentSequence names seggate as Manufacturer"


@pytest.mark.parametrize("name", ["SegGate", "seggate\0", " seggate "])
def test_padding_and_case_do_not_hide_us(name: str) -> None:
    header = Dataset()
    header.ManufacturerModelName = name
    assert is_own_result(header) == "ManufacturerModelName is seggate"


@pytest.mark.parametrize("name", [None, "", "seggate-compatible", "Siemens"])
def test_others_are_not_ours(name: str | None) -> None:
    header = Dataset()
    header.Manufacturer = name
    header.ContributingEquipmentSequence = DicomSequence()
    assert is_own_result(header) is None


def test_a_damaged_sequence_does_not_stop_the_intake() -> None:
    header = Dataset()
    tag = Tag("ContributingEquipmentSequence")
    header[tag] = RawDataElement(tag, "SQ", 7, b"garbage", 0, False, True)
    assert is_own_result(header) is None


@pytest.mark.requirement("OUT-46")
def test_recognition_is_light() -> None:
    """A receiver must not load what only results need."""
    heavy = "('highdicom', 'engine', 'torch', 'onnxruntime', 'SimpleITK')"
    code = f"import sys, gateway.intake.own_results; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=Path(__file__).parents[2]).returncode == 0
