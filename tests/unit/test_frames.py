from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import DeflatedExplicitVRLittleEndian

from gateway.errors import Rejected, meaning
from gateway.results import frames
from gateway.results.attributes import AttributeRejected
from gateway.results.frames import read_frames, read_object
from tests.support.phantoms import write_series


def one_file(folder: Path, *, enhanced: bool = False) -> Path:
    return write_series(folder, shape=(3, 8, 8), enhanced=enhanced).files[0]


def overwrite(file: Path, keyword: str, raw: bytes, vr: str) -> None:
    """Put bytes into a top-level element as a broken sender would, past every check of a writer."""
    tag = tag_for_keyword(keyword)
    assert tag is not None
    data = file.read_bytes()
    start = data.index((tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little"), 132)
    value = start + 8
    old_length = int.from_bytes(data[start + 6 : value], "little")
    head = data[start : start + 4] + vr.encode() + len(raw).to_bytes(2, "little")
    file.write_bytes(data[:start] + head + raw + data[value + old_length :])


def change(file: Path, edit: Callable[[Dataset], object]) -> None:
    ds = dcmread(file)
    edit(ds)
    ds.save_as(file)


@pytest.mark.parametrize(
    "keyword",
    [
        "SOPInstanceUID",
        "SOPClassUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "Rows",
        "Columns",
        "BitsAllocated",
        "PixelRepresentation",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
    ],
)
@pytest.mark.parametrize("blank", [True, False])
def test_missing_or_blank_attribute_is_named(tmp_path: Path, keyword: str, blank: bool) -> None:
    file = one_file(tmp_path)
    uid = str(dcmread(file).SOPInstanceUID)
    change(file, lambda ds: setattr(ds, keyword, None) if blank else delattr(ds, keyword))

    with pytest.raises(AttributeRejected, match=keyword) as caught:
        read_frames(read_object(file))

    assert caught.value.keyword == keyword
    assert meaning(caught.value) is Rejected
    assert file.name in str(caught.value)
    if keyword != "SOPInstanceUID":
        assert uid in str(caught.value)


@pytest.mark.parametrize(
    ("keyword", "raw", "vr"),
    [
        ("NumberOfFrames", b"1A", "IS"),
        ("NumberOfFrames", b"0 ", "IS"),
        ("NumberOfFrames", b"99999999", "IS"),
        ("Rows", b"\x01", "US"),
        ("Rows", b"\x00\x00", "US"),
        ("ImagePositionPatient", b"1\\2\\nan ", "DS"),
        ("ImagePositionPatient", b"1\\2 ", "DS"),
        ("ImagePositionPatient", b"1e9\\0\\0 ", "DS"),
        ("ImageOrientationPatient", b"1\\0\\0\\1\\0\\0 ", "DS"),
        ("ImageOrientationPatient", b"0\\0\\0\\0\\0\\0 ", "DS"),
        ("PixelSpacing", b"0\\0 ", "DS"),
        ("PixelSpacing", b"-1\\1", "DS"),
        ("PixelSpacing", b"one ", "DS"),
        ("RescaleSlope", b"0 ", "DS"),
        ("RescaleSlope", b"1_0 ", "DS"),
        ("BitsStored", b"\x11\x00", "US"),
        ("BitsAllocated", b"\x01\x00", "US"),
        ("HighBit", b"\x02\x00", "US"),
        ("SamplesPerPixel", b"\x03\x00", "US"),
        ("PhotometricInterpretation", b"RGB ", "CS"),
        ("SOPInstanceUID", b"../../../etc", "UI"),
    ],
)
def test_bad_value_is_named(tmp_path: Path, keyword: str, raw: bytes, vr: str) -> None:
    file = one_file(tmp_path)
    if keyword == "NumberOfFrames":
        change(file, lambda ds: setattr(ds, "NumberOfFrames", 1))
    overwrite(file, keyword, raw, vr)

    with pytest.raises(AttributeRejected) as caught:
        read_frames(read_object(file))

    assert caught.value.keyword == keyword


@pytest.mark.parametrize("keyword", ["InstanceNumber", "SliceThickness"])
def test_a_broken_hint_does_not_matter(tmp_path: Path, keyword: str) -> None:
    file = one_file(tmp_path)
    overwrite(file, keyword, b"x1", "IS")

    (frame,) = read_frames(read_object(file))

    assert frame.instance_number is None or frame.slice_thickness_mm is None


def test_enhanced_object_without_functional_groups_is_refused(tmp_path: Path) -> None:
    file = one_file(tmp_path, enhanced=True)
    change(file, lambda ds: delattr(ds, "PerFrameFunctionalGroupsSequence"))

    with pytest.raises(AttributeRejected, match="PerFrameFunctionalGroupsSequence"):
        read_frames(read_object(file))


def test_fewer_functional_groups_than_frames_are_refused(tmp_path: Path) -> None:
    file = one_file(tmp_path, enhanced=True)
    change(file, lambda ds: ds.PerFrameFunctionalGroupsSequence.pop())

    with pytest.raises(AttributeRejected, match="has 2 items for 3 frames"):
        read_frames(read_object(file))


def test_real_world_values_are_not_applied(tmp_path: Path) -> None:
    file = one_file(tmp_path, enhanced=True)
    mapping = Dataset()
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 7.0, 3.0

    def add(ds: Dataset) -> None:
        ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = DicomSequence([mapping])

    change(file, add)

    assert {(f.rescale_slope, f.rescale_intercept) for f in read_frames(read_object(file))} == {(1.0, -1024.0)}


def test_a_table_of_values_is_refused(tmp_path: Path) -> None:
    file = one_file(tmp_path)
    table = Dataset()
    table.LUTDescriptor = [256, 0, 16]

    def replace_rescale(ds: Dataset) -> None:
        del ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType
        ds.ModalityLUTSequence = DicomSequence([table])

    ds = dcmread(file)
    replace_rescale(ds)
    ds.ModalityLUTSequence[0]["LUTDescriptor"].VR = "US"
    ds.save_as(file)

    with pytest.raises(AttributeRejected, match="ModalityLUTSequence"):
        read_frames(read_object(file))


@pytest.mark.parametrize("content", [b"", b"DICM", b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 400])
def test_what_is_no_dicom_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "junk.dcm"
    file.write_bytes(content)

    with pytest.raises(AttributeRejected, match=r"junk\.dcm"):
        read_object(file)


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
def test_deep_sequences_are_refused_without_a_crash(tmp_path: Path) -> None:
    file = one_file(tmp_path)
    data = file.read_bytes()
    # 10 000 nested private sequences of undefined length, none closed, in front of everything after group 0008.
    start = data.index(b"\x10\x00\x10\x00PN")
    item = b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    file.write_bytes(data[:start] + item * 10_000 + data[start:])

    with pytest.raises(AttributeRejected):
        read_object(file)


def test_a_deflated_bomb_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_INFLATED_BYTES", 1 << 20)
    file = write_series(tmp_path, shape=(1, 8, 8), transfer_syntax=DeflatedExplicitVRLittleEndian).files[0]
    data = file.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    file.write_bytes(data[:start] + packer.compress(bytes(64 << 20)) + packer.flush())

    with pytest.raises(AttributeRejected, match="grows beyond"):
        read_object(file)


# pydicom warns of half values at the cut; the refusal is ours and is what counts.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_truncation_of_a_file_is_refused_or_read(tmp_path: Path) -> None:
    file = write_series(tmp_path, shape=(1, 4, 4)).files[0]
    data = file.read_bytes()
    refused = 0
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        try:
            read_frames(read_object(file))
        except AttributeRejected:
            refused += 1
    assert refused > len(data) // 8
