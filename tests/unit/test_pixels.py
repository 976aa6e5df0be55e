from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import JPEG2000LosslessDecoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from gateway.results import pixels
from gateway.results.attributes import AttributeRejected
from gateway.results.frames import read_object
from gateway.results.pixels import stored_frames
from gateway.results.series import decode, read_series
from tests.support.phantoms import write_series

LOSSLESS = [
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
]


def stored(file: Path) -> NDArray[np.int64]:
    source = read_object(file)
    count = range(source.pixel_format.frames)
    frames = stored_frames(file, source.pixel_format, count, source.where)
    return np.stack([np.asarray(frame, dtype=np.int64) for frame in frames])


def rewrite(file: Path, edit: Callable[[Dataset], object]) -> None:
    ds = dcmread(file)
    edit(ds)
    ds.save_as(file)


@pytest.mark.requirement("REC-06")
@pytest.mark.parametrize("transfer_syntax", LOSSLESS)
@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize(("signed", "bits_stored"), [(False, 16), (True, 16), (True, 12)])
def test_lossless_syntaxes_give_the_same_values(
    tmp_path: Path, transfer_syntax: str, enhanced: bool, signed: bool, bits_stored: int
) -> None:
    series = write_series(
        tmp_path,
        shape=(3, 40, 36),
        enhanced=enhanced,
        transfer_syntax=transfer_syntax,
        signed=signed,
        bits_stored=bits_stored,
        rescale="per-slice",
        order="reversed",
    )
    (part,) = read_series(series.files)

    assert part.volume is not None
    np.testing.assert_array_equal(part.volume.array[0], series.array)


@pytest.mark.parametrize("transfer_syntax", [ExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize(("signed", "expected"), [(False, 0x0ABC), (True, 0x0ABC - 0x1000)])
def test_bits_outside_the_stored_ones_are_ignored(
    tmp_path: Path, transfer_syntax: str, signed: bool, expected: int
) -> None:
    series = write_series(tmp_path, shape=(1, 8, 8), bits_stored=12, signed=signed, rescale="none")
    file = series.files[0]

    def dirty(ds: Dataset) -> None:
        ds.PixelData = np.full((8, 8), 0x5ABC, dtype="<u2").tobytes()
        if transfer_syntax == RLELossless:
            ds.compress(RLELossless, generate_instance_uid=False)

    rewrite(file, dirty)

    assert set(stored(file).flat) == {expected}


def test_high_bit_above_the_stored_ones_shifts(tmp_path: Path) -> None:
    file = write_series(tmp_path, shape=(1, 8, 8), bits_stored=12, rescale="none").files[0]

    def shifted(ds: Dataset) -> None:
        ds.HighBit = 15
        ds.PixelData = np.full((8, 8), 0x1230 | 0xF, dtype="<u2").tobytes()

    rewrite(file, shifted)

    assert set(stored(file).flat) == {0x123}


@pytest.mark.parametrize("transfer_syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_eight_bits_in_both_byte_orders(tmp_path: Path, transfer_syntax: str) -> None:
    file = write_series(tmp_path, shape=(1, 8, 8), rescale="none", transfer_syntax=transfer_syntax).files[0]
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)

    def eight(ds: Dataset) -> None:
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        words = values.reshape(-1, 2)
        ds.PixelData = (words[:, ::-1] if transfer_syntax == ExplicitVRBigEndian else words).tobytes()
        ds["PixelData"].VR = "OW"

    rewrite(file, eight)

    np.testing.assert_array_equal(stored(file)[0], values)


def test_monochrome1_values_are_not_inverted(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(3, 8, 8))
    for file in series.files:
        rewrite(file, lambda ds: setattr(ds, "PhotometricInterpretation", "MONOCHROME1"))
    (part,) = read_series(series.files)

    assert part.volume is not None
    np.testing.assert_array_equal(part.volume.array[0], series.array)
    assert part.finding("monochrome1") is not None


def test_padding_values_stay(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(2, 8, 8), signed=True)
    for file in series.files:

        def pad(ds: Dataset) -> None:
            ds.add_new("PixelPaddingValue", "SS", -2000)
            pixels = np.frombuffer(ds.PixelData, dtype="<i2").copy()
            pixels[:5] = -2000
            ds.PixelData = pixels.tobytes()

        rewrite(file, pad)
    (part,) = read_series(series.files)

    assert part.volume is not None
    assert (part.volume.array[0, :, 0, :5] == -2000).all()


@pytest.mark.parametrize("missing", [1, 128])
def test_short_pixel_data_are_refused(tmp_path: Path, missing: int) -> None:
    file = write_series(tmp_path, shape=(1, 8, 8)).files[0]
    data = file.read_bytes()
    file.write_bytes(data[:-missing])

    with pytest.raises(AttributeRejected, match=r"PixelData \(7FE0,0010\)"):
        read_series([file])


@pytest.mark.parametrize("transfer_syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_damaged_compressed_data_are_refused(tmp_path: Path, transfer_syntax: str) -> None:
    file = write_series(tmp_path, shape=(1, 40, 36), transfer_syntax=transfer_syntax).files[0]
    data = bytearray(file.read_bytes())
    start = data.index(b"\xe0\x7f\x10\x00") + 32
    data[start : start + 200] = bytes(200)
    file.write_bytes(bytes(data))

    with pytest.raises(AttributeRejected, match="PixelData"):
        read_series([file])


@pytest.mark.parametrize("transfer_syntax", LOSSLESS)
def test_pixels_found_at_their_place_are_those_of_the_parsed_object(tmp_path: Path, transfer_syntax: str) -> None:
    """Every frame, in any order, with bits to be cut off; an offset that is wrong costs time and nothing else."""
    file = write_series(
        tmp_path, shape=(3, 40, 36), enhanced=True, transfer_syntax=transfer_syntax, bits_stored=12, signed=True
    ).files[0]
    source = read_object(file)
    order = [2, 0, 1]

    def frames(offset: int | None) -> NDArray[np.int64]:
        found = stored_frames(file, source.pixel_format, order, source.where, offset=offset)
        return np.stack([np.asarray(frame, dtype=np.int64) for frame in found])

    parsed = frames(None)
    assert np.array_equal(frames(source.pixel_data_offset), parsed)
    assert np.array_equal(frames(200), parsed)
    assert np.array_equal(frames(1 << 40), parsed)


@pytest.mark.parametrize("transfer_syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless])
def test_an_object_is_parsed_once(tmp_path: Path, transfer_syntax: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_series(tmp_path, shape=(1, 40, 36), transfer_syntax=transfer_syntax).files[0]
    (part,) = read_series([file], only_headers=True)
    monkeypatch.setattr(pixels, "dcmread", None)
    decode(part)


def test_an_object_that_was_cut_short_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    file = write_series(tmp_path, shape=(1, 8, 8)).files[0]
    (part,) = read_series([file], only_headers=True)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        AttributeRejected, match=r"PixelData \(7FE0,0010\) is truncated \(frame 1 has 118 bytes of 128\)"
    ):
        decode(part)


def test_what_pillow_cannot_decode_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = write_series(tmp_path, shape=(1, 40, 36), transfer_syntax=JPEG2000Lossless)

    def failing(*_: object) -> None:
        raise RuntimeError("not this one")

    monkeypatch.setitem(JPEG2000LosslessDecoder._available, "pillow", failing)
    (part,) = read_series(series.files)
    assert part.volume is not None
    np.testing.assert_array_equal(part.volume.array[0], series.array)


def test_object_without_pixels_is_refused_when_voxels_are_wanted(tmp_path: Path) -> None:
    file = write_series(tmp_path, shape=(1, 8, 8)).files[0]
    padding = bytes(256)

    def without(ds: Dataset) -> None:
        del ds.PixelData
        ds.add_new(0x00091001, "OB", padding)
        ds.add_new(0x00090010, "LO", "PHANTOM")

    rewrite(file, without)
    assert len(read_series([file], only_headers=True)) == 1

    with pytest.raises(AttributeRejected, match=r"PixelData \(7FE0,0010\) is absent"):
        read_series([file])


@pytest.mark.parametrize(
    ("transfer_syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.53", "retired"),
        ("1.2.840.10008.1.2.4.55", "retired"),
        ("1.2.840.10008.1.2.8.1", "Deflated Image Frame"),
        ("1.2.840.10008.1.2.4.102", "MPEG-4"),
        ("1.2.3.4", r"1\.2\.3\.4"),
    ],
)
@pytest.mark.requirement("REC-06")
def test_syntaxes_without_decoder_are_named(tmp_path: Path, transfer_syntax: str, name: str) -> None:
    file = write_series(tmp_path, shape=(1, 40, 36), transfer_syntax=JPEGLSLossless).files[0]
    data = file.read_bytes()
    old = b"1.2.840.10008.1.2.4.80"
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, transfer_syntax.encode().ljust(len(old), b"\0")[: len(old)]))
    if len(transfer_syntax) > len(old):
        longer = transfer_syntax.encode() + b"\0" * (len(transfer_syntax) % 2)
        head = b"\x02\x00\x10\x00UI"
        grown = int.from_bytes(data[140:144], "little") + len(longer) - len(old)
        data = data[:140] + grown.to_bytes(4, "little") + data[144:]
        file.write_bytes(
            data.replace(head + len(old).to_bytes(2, "little") + old, head + len(longer).to_bytes(2, "little") + longer)
        )

    with pytest.raises(AttributeRejected, match=rf"TransferSyntaxUID \(0002,0010\) is .*{name}"):
        read_series([file], only_headers=True)


def test_absurd_sizes_are_refused_before_allocation(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(3, 8, 8))

    with pytest.raises(AttributeRejected, match=r"Rows .* 3 x 8 x 8 voxels, more than 100"):
        read_series(series.files, max_voxels=100)

    file = write_series(tmp_path / "big", shape=(1, 40, 36), transfer_syntax=JPEGLSLossless).files[0]

    def enlarge(ds: Dataset) -> None:
        ds.Rows, ds.Columns = 65_535, 65_535

    rewrite(file, enlarge)
    with pytest.raises(AttributeRejected, match=r"Rows .* 1 x 65535 x 65535 voxels"):
        read_series([file])
