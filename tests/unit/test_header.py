"""The header reader: what real files hold passes, what is damaged is named, no value ever leaks."""

from __future__ import annotations

import contextlib
import logging
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.intake import header as header_module
from gateway.intake.errors import IntakeRejected
from gateway.intake.header import read_header
from gateway.intake.structure import walk
from storage.part10 import ObjectEvidence, encode_preamble_and_meta
from storage.spool import received_at
from tests.support.received_objects import data_set, element
from tests.support.scripted_peer import CT_IMAGE, EXPLICIT_LITTLE

DEFLATED = "1.2.840.10008.1.2.1.99"


def write(path: Path, data: bytes, *, syntax: str = EXPLICIT_LITTLE) -> Path:
    evidence = ObjectEvidence(
        object_id="0" * 32, association_id="", peer_address="", calling_ae="", called_ae="",
        received_at=received_at("0" * 32), sop_class_uid=CT_IMAGE, sop_instance_uid="1.2.3.1",
        transfer_syntax_uid=syntax,
    )  # fmt: skip
    path.write_bytes(encode_preamble_and_meta(evidence) + data)
    return path


def deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def test_header_is_read_without_the_pixels(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "a", data_set("1.2.3.1", id=" P1 ", name="Doe^Jane")))
    assert (header.sop_instance_uid, header.text("PatientID"), header.text("PatientName")) == (
        "1.2.3.1",
        "P1",
        "Doe^Jane",
    )
    assert header.text("AccessionNumber") is None
    assert "PixelData" not in header.dataset
    assert header.structure.pixel_data_length == 32


@pytest.mark.peer("shared-data")
@pytest.mark.requirement("REC-06")
def test_header_agrees_with_the_toolkit_in_every_real_file(shared_data: Path) -> None:
    folders = ("transfer-syntaxes", "pydicom-data", "pydicom/test_files", "foreign-results", "ct-organs/series")
    read = 0
    for folder in folders:
        for path in sorted((shared_data / "dicom" / folder).rglob("*.dcm")):
            try:
                header = read_header(path)
            except IntakeRejected:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = pydicom.dcmread(path, stop_before_pixels=True)
            assert header.sop_instance_uid == expected.SOPInstanceUID, path.name
            tags, known = [int(e.tag) for e in header.dataset], [int(e.tag) for e in expected]
            assert tags == [tag for tag in known if tag < 0x7FE00000], path.name
            read += 1
    assert read > 160  # the others are damaged on purpose or hold no image object


def test_deflated_header_is_read_and_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = deflate(data_set("1.2.3.1", id="P1"))
    assert read_header(write(tmp_path / "a", packed, syntax=DEFLATED)).text("PatientID") == "P1"
    with pytest.raises(IntakeRejected, match="ends early"):
        read_header(write(tmp_path / "b", packed[:-20], syntax=DEFLATED))
    with pytest.raises(IntakeRejected, match="damaged"):
        read_header(write(tmp_path / "c", b"\xff" * 100, syntax=DEFLATED))
    monkeypatch.setattr(header_module, "MAX_INFLATED_BYTES", 1000)
    too_much = deflate(data_set("1.2.3.1", pixels=bytes(1 << 20)))
    with pytest.raises(IntakeRejected, match="inflates to more"):
        read_header(write(tmp_path / "d", too_much, syntax=DEFLATED))


def bomb(head: bytes, zeros: int) -> bytes:
    """Deflated `head` and then so many MiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * zeros + packer.flush()


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@pytest.mark.parametrize(
    ("tag", "mebibytes", "words"),
    [
        (0x7FE00010, 1023, None),
        (0x7FE00010, 1024, "inflates to more than"),
        (0x00291010, 1023, "the header has more than 67108864 bytes"),
    ],
)
def test_deflated_gigabyte_is_counted_and_not_held(tmp_path: Path, tag: int, mebibytes: int, words: str | None) -> None:
    head = data_set("1.2.3.1", id="P1")[: -len(element(0x7FE00010, "OW", b"\1\2" * 16))]
    head += struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, b"OW", 0, mebibytes << 20)
    path = write(tmp_path / "a", bomb(head, mebibytes), syntax=DEFLATED)
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    try:
        if words is None:
            header = read_header(path)
            assert (header.text("PatientID"), header.structure.pixel_data_length) == ("P1", mebibytes << 20)
        else:
            with pytest.raises(IntakeRejected, match=words):
                read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 150 << 20


def test_deflated_pixels_beyond_what_is_held_must_still_fit(tmp_path: Path) -> None:
    head = data_set("1.2.3.1")[: -len(element(0x7FE00010, "OW", b"\1\2" * 16))]
    head += struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OW", 0, 100 << 20)
    with pytest.raises(IntakeRejected, match="announced"):
        read_header(write(tmp_path / "a", bomb(head, 80), syntax=DEFLATED))


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_rejection_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    good = bytearray(
        data_set(
            "1.2.3.1",
            extra=element(0x00400275, "SQ", b"\xfe\xff\x00\xe0\x0c\x00\x00\x00" + element(0x00400007, "LO", "ABCD")),
        )
    )
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    good = good[: data.draw(st.integers(0, len(good)))]
    syntax = data.draw(
        st.sampled_from(
            ["1.2.840.10008.1.2", EXPLICIT_LITTLE, "1.2.840.10008.1.2.2", DEFLATED, "1.2.840.10008.1.2.4.90"]
        )
    )
    with contextlib.suppress(IntakeRejected):  # anything else is a failure of the reader
        assert read_header(write(tmp_path / "x", bytes(good), syntax=syntax)).study_instance_uid


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_walk_of_any_bytes_ends_in_a_structure_or_a_rejection(data: bytes, implicit: bool, little: bool) -> None:
    try:
        structure = walk(data, is_implicit_vr=implicit, is_little_endian=little)
    except IntakeRejected:
        return
    assert 0 <= structure.header_end <= len(data)


@pytest.mark.requirement("EMR-50")
def test_no_value_of_the_object_is_logged_or_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secrets = {"id": "CANARY1", "name": "CANARY2^X", "birth_date": "CANARY3"}
    extra = element(0x00280008, "IS", "CANARY4") + element(0x00280030, "DS", "CANARY5")
    with caplog.at_level(logging.DEBUG), pytest.raises(IntakeRejected) as refused:
        read_header(write(tmp_path / "a", data_set("1.2.3.1", extra=extra, **secrets)))  # type: ignore[arg-type]
    assert "NumberOfFrames (0028,0008)" in str(refused.value)
    assert "CANARY" not in str(refused.value) + caplog.text


def test_implicit_sent_as_explicit_is_read_as_it_is(tmp_path: Path) -> None:
    explicit = data_set("1.2.3.1", id="P1")
    header = read_header(write(tmp_path / "a", explicit, syntax="1.2.840.10008.1.2"))
    assert not header.structure.is_implicit_vr
    assert header.text("PatientID") == "P1"
