"""Illegal and missing source attributes are repaired or dropped by rule, recorded, and never fatal (OUT-39)."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom import config
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import Tag

from gateway.errors import Rejected
from gateway.results.content import Repair
from gateway.results.segmentation import encode_segmentation
from gateway.results.source_header import repaired_header
from gateway.results.structured_report import encode_structured_report
from tests.support.phantoms import write_series
from tests.support.result_contents import content_of, later, part_of
from tests.support.result_readers import iod_errors

SECRET = "Doe^Jane"


def header(**values: Any) -> Dataset:
    """A complete source header, changed: None removes, bytes are put in as they would be read from a file."""
    ds = Dataset()
    legal = {
        "PatientName": SECRET,
        "PatientID": "4711",
        "PatientBirthDate": "19700101",
        "PatientSex": "F",
        "StudyInstanceUID": "1.2.3",
        "StudyDate": "20240105",
        "StudyTime": "101500",
        "ReferringPhysicianName": "",
        "StudyID": "1",
        "AccessionNumber": "A1",
        "SeriesInstanceUID": "1.2.3.4",
        "SOPInstanceUID": "1.2.3.4.5",
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SeriesNumber": "3",
    }
    for keyword, value in (legal | values).items():
        tag = Tag(keyword)
        if value is None:
            continue
        if isinstance(value, bytes):
            ds[tag] = RawDataElement(tag, None, len(value), value, 0, True, True)
        else:
            vr = pydicom.datadict.dictionary_VR(tag)
            ds.add(DataElement(tag, vr, value, validation_mode=config.IGNORE))
    return ds


def repair_of(repairs: list[Repair], attribute: str) -> tuple[str, str]:
    (found,) = [r for r in repairs if r.attribute == attribute]
    return found.action, found.reason


def test_a_legal_header_needs_no_repair() -> None:
    repaired, repairs = repaired_header(header())
    assert repairs == []
    assert str(repaired.PatientName) == SECRET
    assert repaired.SpecificCharacterSet == "ISO_IR 192"


CASES: list[tuple[str, Any, str, str | None]] = [
    # attribute, value in the source, action, value in the result
    ("StudyID", None, "emptied", ""),
    ("PatientID", None, "emptied", ""),
    ("PatientBirthDate", None, "emptied", ""),
    ("PatientBirthDate", b"1970.01.01", "replaced", "19700101"),
    ("PatientBirthDate", b"19701301", "emptied", ""),
    ("PatientBirthDate", b"unknown ", "emptied", ""),
    ("PatientSex", b"female", "emptied", ""),
    ("PatientSex", b"f ", "replaced", "F"),
    ("StudyTime", b"10:15:00", "replaced", "101500"),
    ("StudyTime", b"25", "emptied", ""),
    ("StudyDescription", b"Brain\0\0", "cleaned", "Brain"),
    ("StudyDescription", b"d" * 70, "shortened", "d" * 64),
    ("StudyDescription", b"a\\b ", "shortened", "a"),
    ("PatientID", b"9" * 70, "kept", "9" * 70),
    ("AccessionNumber", b"123456789012345678", "kept", "123456789012345678"),
    ("PatientAge", b"42", "dropped", None),
    ("PatientWeight", b"heavy ", "dropped", None),
    ("SeriesNumber", b"3.5 ", "dropped", None),
    ("FrameOfReferenceUID", b"none", "dropped", None),
    ("Laterality", b"B ", "dropped", None),
    ("TimezoneOffsetFromUTC", b"+1500 ", "dropped", None),
    ("TimezoneOffsetFromUTC", b"-0000 ", "dropped", None),
    ("TimezoneOffsetFromUTC", b"+0160 ", "dropped", None),
    ("TimezoneOffsetFromUTC", b"Europe", "dropped", None),
    ("ProcedureCodeSequence", DicomSequence([Dataset()]), "dropped", None),
    ("ProcedureCodeSequence", DicomSequence(), "dropped", None),
    ("StudyDate", DicomSequence([Dataset()]), "emptied", ""),
]


@pytest.mark.requirement("OUT-39")
@pytest.mark.parametrize(("attribute", "value", "action", "expected"), CASES)
def test_the_rule_for_one_bad_attribute(attribute: str, value: Any, action: str, expected: str | None) -> None:
    source = header(**{attribute: value})
    if isinstance(value, DicomSequence):
        source.add(DataElement(Tag(attribute), "SQ", value))
    repaired, repairs = repaired_header(source)
    assert repair_of(repairs, attribute)[0] == action
    if expected is None:
        assert attribute not in repaired
    else:
        assert str(repaired[attribute].value or "") == expected


def test_a_code_sequence_keeps_its_legal_items() -> None:
    code, empty = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "24727-0", "LN", "CT head"
    source = header()
    source.ProcedureCodeSequence = DicomSequence([empty, code])
    repaired, repairs = repaired_header(source)
    assert [i.CodeValue for i in repaired.ProcedureCodeSequence] == ["24727-0"]
    assert repair_of(repairs, "ProcedureCodeSequence")[0] == "shortened"


@pytest.mark.requirement("OUT-39")
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
@pytest.mark.parametrize("value", [None, b"", b"\0\0", b"not-a-uid", b"1." * 40 + b"1"])
def test_without_a_uid_there_is_no_result_and_the_attribute_is_named(keyword: str, value: bytes | None) -> None:
    with pytest.raises(Rejected, match=keyword):
        repaired_header(header(**{keyword: value}))


def test_repairs_carry_no_patient_values() -> None:
    source = header(PatientName=b"Doe\0^Jane", PatientID=b"4711" * 20, PatientBirthDate=b"born 1970")
    _, repairs = repaired_header(source)
    text = repr(repairs)
    assert len(repairs) == 3
    for value in ("Doe", "Jane", "4711", "1970"):
        assert value not in text


def test_an_unknown_character_set_is_survived() -> None:
    source = header(PatientName=b"Doe^Jane")
    source.SpecificCharacterSet = "ISO_IR 999"
    repaired, _ = repaired_header(source)
    assert str(repaired.PatientName) == SECRET


@pytest.mark.requirement("OUT-39")
@pytest.mark.peer("dciodvfy")
def test_a_header_with_everything_wrong_still_makes_valid_objects(tmp_path: Path) -> None:
    series = write_series(tmp_path / "source", shape=(4, 12, 12))
    part = part_of(series.files)
    bad = header(
        PatientBirthDate=b"1.1.70",
        PatientSex=b"female",
        StudyDate=b"05/01/24",
        StudyTime=b"noon",
        StudyID=None,
        PatientID=None,
        AccessionNumber=None,
        SeriesNumber=b"A",
        FrameOfReferenceUID=b"",
        StudyDescription=b"x" * 200,
        Manufacturer=b"M" * 80,
        BodyPartExamined=b"the whole body of it",
        PatientAge=b"old ",
    )
    bad.ProcedureCodeSequence = DicomSequence([Dataset()])
    content = later(content_of(part, series.labels), header=bad, frame_of_reference_uid="")
    for name, made in (("seg", encode_segmentation(content)), ("sr", encode_structured_report(content))):
        path = tmp_path / f"{name}.dcm"
        path.write_bytes(made.data)
        assert iod_errors(path) == []
        assert {r.attribute for r in made.repairs} >= {"PatientBirthDate", "StudyDate", "FrameOfReferenceUID"}
    dataset = pydicom.dcmread(BytesIO(encode_segmentation(content).data))
    assert dataset.FrameOfReferenceUID.startswith("2.25.")
    assert dataset.SeriesNumber == 9000
