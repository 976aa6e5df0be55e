"""A plain header is what pydicom reads; whatever is not plain is left to pydicom."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from gateway.results.plain_header import plain_header
from tests.support.phantoms import write_series

SPECIFIC_CHARACTER_SET = 0x00080005


def assert_same(head: bytes) -> Dataset:
    found = plain_header(head)
    assert found is not None
    header, offset = found
    stream = BytesIO(head)
    expected = dcmread(stream, stop_before_pixels=True)
    assert offset == stream.tell()
    tags = list(header.keys())
    assert tags == list(expected.keys())
    for tag in tags:
        if tag != SPECIFIC_CHARACTER_SET:  # pydicom has made use of it and keeps it decoded
            assert header.get_item(tag) == expected.get_item(tag)
    assert header.original_character_set == expected.original_character_set
    assert header.original_encoding == expected.original_encoding
    assert header.file_meta == expected.file_meta
    return header


@pytest.mark.parametrize("transfer_syntax", [ExplicitVRLittleEndian, JPEG2000Lossless])
@pytest.mark.parametrize("enhanced", [False, True])
def test_it_is_what_pydicom_reads(tmp_path: Path, transfer_syntax: str, enhanced: bool) -> None:
    series = write_series(tmp_path, shape=(3, 40, 36), transfer_syntax=transfer_syntax, enhanced=enhanced)
    header = assert_same(series.files[0].read_bytes())
    assert header.Rows == 40


@pytest.mark.peer("shared-data")
@pytest.mark.filterwarnings("ignore")  # pydicom has a lot to say about these files
def test_real_headers_of_many_devices_and_character_sets(shared_data: Path) -> None:
    plain = 0
    for file in sorted((shared_data / "dicom").rglob("*.dcm")):
        head = file.read_bytes()[: 1 << 17]
        if head[128:132] == b"DICM" and plain_header(head) is not None:
            assert_same(head)
            plain += 1
    assert plain > 100


def changed(folder: Path, edit: str) -> bytes:
    file = write_series(folder, shape=(1, 8, 8)).files[0]
    data = file.read_bytes()
    rows = data.index(b"\x28\x00\x10\x00US\x02\x00")
    if edit == "unknown VR":
        return data[:rows] + data[rows:].replace(b"US", b"ZZ", 1)
    if edit == "tags out of order":
        return data[:rows] + b"\x08\x00\x18\x00UI\x02\x001\x00" + data[rows:]
    if edit == "length beyond the file":
        return data[:rows] + b"\x28\x00\x10\x00OB\x00\x00\xf0\xff\xff\xff" + data[rows:]
    if edit == "undefined length":
        return data[:rows] + b"\x28\x00\x09\x00SQ\x00\x00\xff\xff\xff\xff\xfe\xff\xdd\xe0\0\0\0\0" + data[rows:]
    if edit == "no pixels":
        return data[: data.index(b"\xe0\x7f\x10\x00")]
    return data[: rows + 5]


@pytest.mark.parametrize(
    "edit",
    ["unknown VR", "tags out of order", "length beyond the file", "undefined length", "no pixels", "cut off"],
)
def test_what_is_not_plain_is_left_to_pydicom(tmp_path: Path, edit: str) -> None:
    assert plain_header(changed(tmp_path, edit)) is None


def test_implicit_values_are_not_taken_for_explicit_ones(tmp_path: Path) -> None:
    file = write_series(tmp_path, shape=(1, 8, 8), transfer_syntax=ImplicitVRLittleEndian).files[0]
    assert plain_header(file.read_bytes()) is None
