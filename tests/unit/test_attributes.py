from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import Tag

from gateway.errors import Rejected, meaning
from gateway.results import attributes
from gateway.results.attributes import AttributeRejected, Where

WHERE = Where(file=Path("/secret/folder/slice.dcm"), sop_instance_uid="1.2.3")


def raw(keyword: str, value: bytes, vr: str | None, *, little: bool = True) -> Dataset:
    ds = Dataset()
    tag = Tag(keyword)
    element = RawDataElement(tag, vr, len(value), value, 0, vr is None, little)
    ds._dict[tag] = element
    return ds


@pytest.mark.parametrize(
    ("keyword", "value", "vr", "little", "expected"),
    [
        ("Rows", b"\x00\x02", "US", True, (512.0,)),
        ("Rows", b"\x02\x00", "US", False, (512.0,)),
        ("Rows", b"\x00\x02", None, True, (512.0,)),
        ("Rows", b"\x00\x02", "UN", True, (512.0,)),
        ("EchoNumbers", b" 1\\2 ", "IS", True, (1.0, 2.0)),
        ("EchoTime", b"4.90 ", "DS", True, (4.9,)),
        ("EchoTime", b"+1.5E-1\0", "DS", True, (0.15,)),
        ("DiffusionBValue", b"\0\0\0\0\0\0\xf0?", "FD", True, (1.0,)),
        ("EchoTime", b"", "DS", True, ()),
        ("EchoTime", b"  ", "DS", True, ()),
    ],
)
def test_numbers_are_read_from_raw_bytes(
    keyword: str, value: bytes, vr: str | None, little: bool, expected: tuple[float, ...]
) -> None:
    assert attributes.numbers(raw(keyword, value, vr, little=little), keyword, WHERE) == expected


@pytest.mark.parametrize("value", [b"nan ", b"inf ", b"1,5 ", b"0x10", b"1_000", b"1A", b"1\\", b"--1 ", b"1e999 "])
def test_what_is_no_finite_decimal_is_refused(value: bytes) -> None:
    with pytest.raises(AttributeRejected, match=r"EchoTime \(0018,0081\)"):
        attributes.numbers(raw("EchoTime", value, "DS"), "EchoTime", WHERE)


@pytest.mark.parametrize("value", [b"1.2.840.abc", b"1..2", b"1.2/3", b".1", b"1." * 40 + b"1"])
def test_what_is_no_uid_is_refused(value: bytes) -> None:
    with pytest.raises(AttributeRejected, match="SOPInstanceUID"):
        attributes.uid(raw("SOPInstanceUID", value, "UI"), "SOPInstanceUID", WHERE)


def test_a_fraction_is_no_whole_number() -> None:
    with pytest.raises(AttributeRejected, match="not a whole number"):
        attributes.integer(raw("InstanceNumber", b"1.5 ", "IS"), "InstanceNumber", WHERE)


def test_absent_attributes_are_empty() -> None:
    ds = Dataset()

    assert attributes.texts(ds, "PatientName", WHERE) == ()
    assert attributes.text(ds, "PatientName", WHERE) == ""
    assert attributes.number(ds, "EchoTime", WHERE) is None
    assert attributes.items(ds, "PixelMeasuresSequence", WHERE) == ()
    with pytest.raises(AttributeRejected, match="is absent or empty"):
        attributes.required_uid(ds, "SOPInstanceUID", WHERE)


def test_a_sequence_that_is_none_is_refused() -> None:
    ds = Dataset()
    ds.add_new("PixelMeasuresSequence", "LO", "text")
    with pytest.raises(AttributeRejected, match="PixelMeasuresSequence"):
        attributes.items(ds, "PixelMeasuresSequence", WHERE)

    ds = Dataset()
    ds.PixelMeasuresSequence = DicomSequence([Dataset()])
    assert len(attributes.items(ds, "PixelMeasuresSequence", WHERE)) == 1


def test_messages_name_attribute_object_and_file_but_no_value_and_no_folder() -> None:
    with pytest.raises(AttributeRejected) as caught:
        attributes.number(raw("EchoTime", b"Doe^John", "DS"), "EchoTime", WHERE)
    message = str(caught.value)

    assert "EchoTime (0018,0081)" in message
    assert "SOP Instance UID 1.2.3 (file slice.dcm)" in message
    assert "Doe" not in message
    assert "secret" not in message
    assert meaning(caught.value) is Rejected
