"""Reads the header of a spooled object or any DICOM file: everything but the pixels, tolerant and bounded.

Every way in which the bytes can be at fault ends in IntakeRejected, which names the attribute; values of the object
never appear in a message.
"""

from __future__ import annotations

import mmap
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pydicom import config
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from gateway.intake.errors import IntakeRejected
from gateway.intake.structure import Structure, attribute_name, walk
from gateway.intake.uids import uid_fault
from storage.part10 import meta_text, read_meta_elements

MAX_INFLATED_BYTES = 1 << 30
MAX_HEADER_BYTES = 512 << 20
MAX_INFLATED_HEADER_BYTES = 64 << 20  # of a deflated data set: so much is held in memory, the rest is counted

_INFLATE_IN_BYTES = 1 << 16
_INFLATE_OUT_BYTES = 1 << 20
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT = "1.2.840.10008.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"

_TRANSFER_SYNTAX_TAG = 0x00020010
_SOP_CLASS = 0x00080016
_SOP_INSTANCE = 0x00080018
_STUDY_INSTANCE = 0x0020000D
_SERIES_INSTANCE = 0x0020000E
_NUMBER_OF_FRAMES = 0x00280008
_PIXEL_DATA = 0x7FE00010

# What pydicom raises on bytes that a sender made up (OSError: a sequence in memory that ends early).
PARSER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """A header with the UIDs checked.

    `dataset` holds every element before the pixels; `text` reads it safely. The MediaStorage... values are those of
    the file meta information, empty when absent.
    """

    dataset: Dataset
    structure: Structure
    dataset_offset: int  # where the data set begins in the file
    transfer_syntax_uid: str
    media_storage_sop_class_uid: str
    media_storage_sop_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    character_set_repaired: bool  # text was not in the declared character set, and was read with replacements

    @property
    def is_deflated(self) -> bool:
        return self.transfer_syntax_uid == _DEFLATED

    def text(self, keyword: str) -> str | None:
        """A value as text: decoded, without padding and NUL; several values joined by a backslash. None if empty."""
        return text_of(self.dataset, keyword)


def read_header(path: Path) -> Header:
    """Read and check the header. Raises IntakeRejected, FileNotFoundError and other OSError.

    Checked: file meta, structure of the whole data set, the four UIDs that place the object, NumberOfFrames, and that
    the pixels are as long as the header says.
    """
    with path.open("rb") as file:
        try:
            meta, offset = read_meta_elements(file)
        except ValueError as error:
            raise IntakeRejected(str(error)) from error
        transfer_syntax = meta_text(meta, _TRANSFER_SYNTAX_TAG)
        if not transfer_syntax:
            raise IntakeRejected("is absent or empty", attribute_name(_TRANSFER_SYNTAX_TAG))
        if path.stat().st_size <= offset:
            raise IntakeRejected("the file ends after the file meta information")
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as whole,
            whole[offset:] as encoded,
        ):
            structure, dataset = _parse(encoded, transfer_syntax)
    with _quiet():
        header = Header(
            dataset=dataset,
            structure=structure,
            dataset_offset=offset,
            transfer_syntax_uid=transfer_syntax,
            media_storage_sop_class_uid=meta_text(meta, 0x00020002),
            media_storage_sop_instance_uid=meta_text(meta, 0x00020003),
            sop_class_uid=_uid(dataset, _SOP_CLASS),
            sop_instance_uid=_uid(dataset, _SOP_INSTANCE),
            study_instance_uid=_uid(dataset, _STUDY_INSTANCE),
            series_instance_uid=_uid(dataset, _SERIES_INSTANCE),
            character_set_repaired=_is_character_set_bad(dataset),
        )
        _check_pixels(dataset, structure)
    return header


def text_of(dataset: Dataset, keyword: str) -> str | None:
    """See Header.text; a value that cannot be decoded at all counts as absent."""
    with _quiet():
        try:
            value = dataset.get(keyword)
            if value is None:
                return None
            many = value if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else [value]
            text = "\\".join(str(item) for item in many)
        except PARSER_ERRORS:
            return None
    text = text.replace("\0", "").strip().encode("utf-8", "replace").decode("utf-8")
    return text or None


@contextmanager
def _quiet() -> Iterator[None]:
    """pydicom checks no values and warns of nothing: its warnings quote values of the object, into logs too."""
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _parse(encoded: memoryview, transfer_syntax: str) -> tuple[Structure, Dataset]:
    little = transfer_syntax != _BIG_ENDIAN
    data: bytearray | memoryview
    data, length = _inflated(encoded) if transfer_syntax == _DEFLATED else (encoded, len(encoded))
    structure = walk(data, is_implicit_vr=transfer_syntax == _IMPLICIT, is_little_endian=little, length=length)
    if structure.header_end > MAX_HEADER_BYTES:
        raise IntakeRejected(f"the header has {structure.header_end} bytes, more than {MAX_HEADER_BYTES}")
    head = BytesIO(bytes(data[: structure.header_end]))
    with _quiet():
        try:
            dataset = read_dataset(head, structure.is_implicit_vr, little)
        except PARSER_ERRORS as error:
            raise IntakeRejected(f"the header cannot be read ({type(error).__name__})") from error
    return structure, dataset


def _inflated(encoded: memoryview) -> tuple[bytearray, int]:
    """The beginning of a deflated data set (PS3.5 A.5), MAX_INFLATED_HEADER_BYTES of it, and its whole length.

    A few kilobytes can inflate to a thousand times their size, so what no header needs is counted and dropped.
    Rejected beyond MAX_INFLATED_BYTES.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    kept, length, position = bytearray(), 0, 0
    pending = b""
    while not inflater.eof:
        if not pending:
            pending = bytes(encoded[position : position + _INFLATE_IN_BYTES])
            position += len(pending)
        at_end = not pending
        try:
            piece = inflater.decompress(pending, _INFLATE_OUT_BYTES)
        except zlib.error as error:
            raise IntakeRejected("the deflated data set is damaged") from error
        pending = inflater.unconsumed_tail
        length += len(piece)
        if length > MAX_INFLATED_BYTES:
            raise IntakeRejected(f"the data set inflates to more than {MAX_INFLATED_BYTES} bytes")
        if at_end and not piece and not inflater.eof:
            raise IntakeRejected("the deflated data set ends early")
        kept += piece[: max(0, MAX_INFLATED_HEADER_BYTES - len(kept))]
    return kept, length


def _uid(dataset: Dataset, tag: int) -> str:
    try:
        element = dataset.get_item(tag)
        value = None if element is None else element.value
    except PARSER_ERRORS as error:
        raise IntakeRejected("cannot be read", attribute_name(tag)) from error
    if element is None:
        raise IntakeRejected("is absent", attribute_name(tag))
    raw = value if isinstance(value, bytes) else str(value or "").encode("utf-8", "replace")
    fault = uid_fault(raw)
    if fault is not None:
        raise IntakeRejected(fault, attribute_name(tag))
    return raw.rstrip(b"\0 ").decode("ascii")


def _is_character_set_bad(dataset: Dataset) -> bool:
    """Whether the patient's name or id had to be read with a fallback or with replacement characters."""
    with warnings.catch_warnings(record=True) as caught, config.disable_value_validation():
        warnings.simplefilter("always")
        for keyword in ("PatientName", "PatientID"):
            try:
                str(dataset.get(keyword))
            except PARSER_ERRORS:
                return True
    words = ("encoding", "decode", "character set")
    return any(any(word in str(warning.message).lower() for word in words) for warning in caught)


def _check_pixels(dataset: Dataset, structure: Structure) -> None:
    """NumberOfFrames is a number, and native pixels are not shorter than the header says (PS3.5 8.1.1)."""
    frames = _integer(dataset, _NUMBER_OF_FRAMES, default=1)
    if structure.pixel_data_length is None or structure.is_encapsulated:
        return
    rows = _integer(dataset, 0x00280010, default=0)
    columns = _integer(dataset, 0x00280011, default=0)
    samples = _integer(dataset, 0x00280002, default=1)
    bits = _integer(dataset, 0x00280100, default=0)
    if min(rows, columns, samples, bits, frames) < 1:
        return  # no image, or one that the reader of the series judges
    pixels = rows * columns * samples
    if (text_of(dataset, "PhotometricInterpretation") or "").startswith("YBR_FULL_422"):
        pixels = pixels * 2 // 3
    needed = (pixels * frames * bits + 7) // 8
    if structure.pixel_data_length < needed:
        raise IntakeRejected(
            f"{structure.pixel_data_length} bytes of pixels, {needed} are needed", attribute_name(_PIXEL_DATA)
        )


def _integer(dataset: Dataset, tag: int, *, default: int) -> int:
    try:
        value = dataset[tag].value if tag in dataset else None
        return default if value is None or value == "" else int(value)
    except PARSER_ERRORS as error:
        raise IntakeRejected("is not one whole number", attribute_name(tag)) from error
