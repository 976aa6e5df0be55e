"""Stored pixel values of one object: every transfer syntax that pydicom's decoders read, checked before allocation.

Values are those of the sender: PixelRepresentation and BitsStored are applied, rescale is not (see `series`).
MONOCHROME1 only says how a display draws the values (PS3.3 C.7.6.3.1.2) and changes none. PixelPaddingValue
(0028,0120) is left in place, as converters to NIfTI leave it: the models were trained with it. Colour images,
one-bit segmentations and floating point pixel data are not images a model reads; they are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from gateway.results.attributes import (
    PARSER_ERRORS,
    READ_ERRORS,
    AttributeRejected,
    Where,
    absent,
    damaged,
    integer,
    text,
)

StoredValues = NDArray[Any]
"""(rows, columns), any integer type."""
PIXEL_DATA = Tag("PixelData")
_UNREAD_SYNTAXES = {
    "1.2.840.10008.1.2.4.53": "JPEG Spectral Selection, Process 6 and 8, retired",
    "1.2.840.10008.1.2.4.55": "JPEG Full Progression, Process 10 and 12, retired",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}
_PLUGINS = {str(JPEG2000Lossless): ("pillow", "")}
"""pydicom's plugins to try, "" for all that it has: Pillow spends least beside OpenJPEG, which works on a frame with as
many threads as OPJ_NUM_THREADS says."""
MAX_FRAMES = 65_535
"""More frames than this in one object are refused unread."""


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How the pixels of one object are encoded. frames counts from 1; native = not encapsulated."""

    transfer_syntax_uid: str
    rows: int
    columns: int
    frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    photometric_interpretation: str
    native: bool

    @property
    def frame_bytes(self) -> int:
        """Bytes of one uncompressed frame."""
        return self.rows * self.columns * self.bits_allocated // 8


def number_of_frames(header: Dataset, where: Where) -> int:
    """NumberOfFrames, 1 when absent."""
    frames = integer(header, "NumberOfFrames", where)
    if frames is None:
        return 1
    if not 1 <= frames <= MAX_FRAMES:
        problem = f"is {frames}, outside 1 to {MAX_FRAMES},"
        raise AttributeRejected("NumberOfFrames", problem, where, "correct it at the sender")
    return frames


def read_pixel_format(header: Dataset, transfer_syntax_uid: str, where: Where) -> PixelFormat:
    """Check the Image Pixel module (PS3.3 C.7.6.3) and that a decoder exists.

    Raises AttributeRejected for what is absent, contradictory, coloured, one bit deep or not decodable.
    """
    frames = number_of_frames(header, where)
    native = not UID(transfer_syntax_uid).is_encapsulated if UID(transfer_syntax_uid).is_transfer_syntax else False
    if not native:
        _decoder(transfer_syntax_uid, where)
    rows, columns = (_positive(header, keyword, 65_535, where) for keyword in ("Rows", "Columns"))
    samples = integer(header, "SamplesPerPixel", where)
    if samples not in (None, 1):
        problem = f"is {samples}"
        raise AttributeRejected("SamplesPerPixel", problem, where, "only images of one value per pixel are read")
    photometric = text(header, "PhotometricInterpretation", where) or "MONOCHROME2"
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        problem = f"is {photometric[:16]!r}"
        advice = "only MONOCHROME1 and MONOCHROME2 images are read"
        raise AttributeRejected("PhotometricInterpretation", problem, where, advice)
    allocated = _positive(header, "BitsAllocated", 32, where)
    if allocated not in (8, 16, 32):
        problem = f"is {allocated}"
        raise AttributeRejected("BitsAllocated", problem, where, "only images of 8, 16 or 32 bits are read")
    stored = integer(header, "BitsStored", where)
    stored = allocated if stored is None else stored
    if not 1 <= stored <= allocated:
        problem = f"is {stored} with BitsAllocated {allocated}"
        raise AttributeRejected("BitsStored", problem, where, "correct it at the sender")
    high_bit = integer(header, "HighBit", where)
    high_bit = stored - 1 if high_bit is None else high_bit
    if not stored - 1 <= high_bit < allocated:
        problem = f"is {high_bit} with BitsStored {stored} and BitsAllocated {allocated}"
        raise AttributeRejected("HighBit", problem, where, "correct it at the sender")
    representation = integer(header, "PixelRepresentation", where)
    if representation not in (0, 1):
        problem = "is absent or neither 0 nor 1"
        raise AttributeRejected("PixelRepresentation", problem, where, "only integer pixel data are read")
    return PixelFormat(
        transfer_syntax_uid=transfer_syntax_uid,
        rows=rows,
        columns=columns,
        frames=frames,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit,
        signed=representation == 1,
        photometric_interpretation=photometric,
        native=native,
    )


def check_length(pixel_format: PixelFormat, file: Path, where: Where) -> None:
    """Refuse an uncompressed object whose file is smaller than its pixels."""
    if not pixel_format.native or pixel_format.transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        return
    expected = pixel_format.frame_bytes * pixel_format.frames
    found = file.stat().st_size
    if found < expected:
        raise _short(f"the file has {found} bytes", expected, where)


def stored_frames(
    file: Path, pixel_format: PixelFormat, indices: Sequence[int], where: Where, *, offset: int | None = None
) -> Iterator[StoredValues]:
    """Yield the stored values (rows, columns) of the frames at `indices` (from 0), in that order.

    offset: of the element Pixel Data, which spares parsing the data set again; where the element is not found there as
    it should be, the data set is parsed. Raises AttributeRejected naming PixelData or TransferSyntaxUID when they
    cannot be decoded.
    """
    if offset is not None:
        with file.open("rb", buffering=0) as stream:
            if _is_at_pixel_data(stream, offset, pixel_format):
                if pixel_format.native:
                    yield from _frames_in_file(stream, pixel_format, indices, where)
                else:
                    yield from _decoded_frames(stream.read(), pixel_format, indices, where)
                return
    try:
        ds = dcmread(file)
        element = ds.get_item(PIXEL_DATA) if PIXEL_DATA in ds else None
    except READ_ERRORS as error:
        if not damaged(error):
            raise
        raise AttributeRejected("PixelData", "cannot be read", where, "the object is damaged; send it again") from error
    if element is None or not element.value:
        raise absent("PixelData", where, "the object holds no image; send the image itself")
    if pixel_format.native:
        yield from _native_frames(element.value, str(element.VR), pixel_format, indices, where)
    else:
        yield from _decoded_frames(ds, pixel_format, indices, where)


def _is_at_pixel_data(stream: RawIOBase, offset: int, pixel_format: PixelFormat) -> bool:
    """Whether Pixel Data begins at `offset` in the plainest form (PS3.5 7.1.2, 7.1.3, A.4) and is long enough; leaves
    the stream at the value."""
    implicit = pixel_format.transfer_syntax_uid == ImplicitVRLittleEndian
    if pixel_format.transfer_syntax_uid in (ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian):
        return False
    stream.seek(offset)
    head = stream.read(8 if implicit else 12) or b""
    tag, vr, length = head[:4], head[4:8], head[-4:]
    if tag != b"\xe0\x7f\x10\x00" or len(head) < (8 if implicit else 12):
        return False
    if not pixel_format.native:
        return vr == b"OB\0\0" and length == b"\xff\xff\xff\xff"
    found = int.from_bytes(length, "little")
    plain = implicit or vr in (b"OB\0\0", b"OW\0\0")
    return plain and pixel_format.frame_bytes * pixel_format.frames <= found < 0xFFFF_FFFF


def _frames_in_file(
    stream: RawIOBase, pixel_format: PixelFormat, indices: Sequence[int], where: Where
) -> Iterator[StoredValues]:
    start = stream.tell()
    for index in indices:
        frame = np.empty((pixel_format.rows, pixel_format.columns), dtype=f"<u{pixel_format.bits_allocated // 8}")
        stream.seek(start + index * pixel_format.frame_bytes)
        view = frame.reshape(-1).view(np.uint8).data
        found = 0
        while found < frame.nbytes and (count := stream.readinto(view[found:])):
            found += count
        if found < frame.nbytes:
            raise _short(f"frame {index + 1} has {found} bytes", frame.nbytes, where)
        yield _without_unused_bits(frame, pixel_format)


def _native_frames(
    data: bytes, vr: str, pixel_format: PixelFormat, indices: Sequence[int], where: Where
) -> Iterator[StoredValues]:
    expected = pixel_format.frame_bytes * pixel_format.frames
    if len(data) < expected:
        raise _short(f"has {len(data)} bytes", expected, where)
    big_endian = pixel_format.transfer_syntax_uid == ExplicitVRBigEndian
    if big_endian and pixel_format.bits_allocated == 8 and vr == "OW":
        # PS3.5 A.3: bytes of an OW element are swapped pairwise, also when a pixel is one byte.
        data = np.frombuffer(data[: len(data) // 2 * 2], dtype=">u2").astype("<u2").tobytes()
    dtype = np.dtype(f"{'>' if big_endian else '<'}u{pixel_format.bits_allocated // 8}")
    for index in indices:
        frame = np.frombuffer(
            data,
            dtype=dtype,
            count=pixel_format.rows * pixel_format.columns,
            offset=index * pixel_format.frame_bytes,
        )
        yield _without_unused_bits(frame.reshape(pixel_format.rows, pixel_format.columns), pixel_format)


def _decoded_frames(
    source: Dataset | bytes, pixel_format: PixelFormat, indices: Sequence[int], where: Where
) -> Iterator[StoredValues]:
    """source: a data set, or the value of Pixel Data and what follows it."""
    decoder = _decoder(pixel_format.transfer_syntax_uid, where)
    options = _decoder_options(pixel_format) if isinstance(source, bytes) else {}
    found, failure = 0, None
    shape = (pixel_format.rows, pixel_format.columns)
    for plugin in _PLUGINS.get(pixel_format.transfer_syntax_uid, ("",)):
        try:
            rest = list(indices)[found:]
            for frame, _ in decoder.iter_array(source, indices=rest, raw=True, decoding_plugin=plugin, **options):
                if frame.shape != shape:
                    problem = f"decodes to {frame.shape[0]}x{frame.shape[1]} instead of {shape[0]}x{shape[1]} pixels"
                    raise AttributeRejected("PixelData", problem, where, "the object is damaged; send it again")
                found += 1
                if pixel_format.transfer_syntax_uid == RLELossless:
                    frame = _without_unused_bits(frame.view(f"u{frame.dtype.itemsize}"), pixel_format)
                yield frame
            failure = None
            break
        except AttributeRejected:
            raise
        except PARSER_ERRORS as error:
            failure = error
    if failure is not None:
        name = UID(pixel_format.transfer_syntax_uid).name
        problem = f"cannot be decoded as {name}"
        advice = "send the image again or uncompressed"
        raise AttributeRejected("PixelData", problem, where, advice) from failure
    if found != len(indices):
        problem = f"holds {found} of {len(indices)} frames"
        raise AttributeRejected("PixelData", problem, where, "the object is damaged; send it again")


def _decoder_options(pixel_format: PixelFormat) -> dict[str, Any]:
    return {
        "rows": pixel_format.rows,
        "columns": pixel_format.columns,
        "number_of_frames": pixel_format.frames,
        "samples_per_pixel": 1,
        "bits_allocated": pixel_format.bits_allocated,
        "bits_stored": pixel_format.bits_stored,
        "pixel_representation": int(pixel_format.signed),
        "photometric_interpretation": pixel_format.photometric_interpretation,
        "pixel_keyword": "PixelData",
    }


def _without_unused_bits(unsigned: StoredValues, pixel_format: PixelFormat) -> StoredValues:
    """Keep the BitsStored bits that end at HighBit; bits outside may hold overlays (retired) or garbage. An array that
    can be written to is changed in place."""
    allocated, stored = pixel_format.bits_allocated, pixel_format.bits_stored
    values = unsigned.astype(unsigned.dtype.newbyteorder("="), copy=not unsigned.flags.writeable)
    if pixel_format.signed:
        values = values.view(f"i{allocated // 8}")
    if stored == allocated:
        return values
    if pixel_format.signed:
        # Move the sign bit to the top, then back with sign extension.
        values <<= allocated - 1 - pixel_format.high_bit
        values >>= allocated - stored
        return values
    shift = pixel_format.high_bit + 1 - stored
    if shift:
        values >>= shift
    values &= (1 << stored) - 1
    return values


def _decoder(transfer_syntax_uid: str, where: Where) -> Decoder:
    try:
        decoder = get_decoder(UID(transfer_syntax_uid))
    except (NotImplementedError, ValueError) as error:
        raise _not_decodable(transfer_syntax_uid, where) from error
    if not decoder.is_available:
        raise _not_decodable(transfer_syntax_uid, where)
    return decoder


def _not_decodable(transfer_syntax_uid: str, where: Where) -> AttributeRejected:
    name = _UNREAD_SYNTAXES.get(transfer_syntax_uid, UID(transfer_syntax_uid).name)
    shown = transfer_syntax_uid if name == transfer_syntax_uid else f"{transfer_syntax_uid} ({name})"
    problem = f"is {shown}, for which there is no decoder,"
    return AttributeRejected("TransferSyntaxUID", problem, where, "send the image in another transfer syntax")


def _short(found: str, expected: int, where: Where) -> AttributeRejected:
    problem = f"is truncated ({found} of {expected})"
    return AttributeRejected("PixelData", problem, where, "the object is incomplete; send it again")


def _positive(header: Dataset, keyword: str, largest: int, where: Where) -> int:
    value = integer(header, keyword, where)
    if value is None:
        raise absent(keyword, where, "the object is no image that can be read")
    if not 1 <= value <= largest:
        raise AttributeRejected(keyword, f"is {value}", where, "correct it at the sender")
    return value
