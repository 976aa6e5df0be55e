"""Reads single attributes of headers that nobody vouches for, and refuses with the attribute named.

Values are taken from the raw bytes, so that one odd value elsewhere in the data set disturbs nothing and no value
is ever printed by a warning. What cannot be read raises `AttributeRejected`; what is absent or empty is `None` or
an empty tuple, and the caller decides whether that matters.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag, Tag

from gateway.errors import Rejected

PARSER_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    struct.error,
    zlib.error,
    InvalidDicomError,
)
"""What pydicom and its decoders are seen to raise on broken input."""
READ_ERRORS: tuple[type[Exception], ...] = (*PARSER_ERRORS, OSError)
"""The same where a file is read; `damaged` tells the content's fault from the file system's."""


def damaged(error: Exception) -> bool:
    """Whether the content is at fault, not the file system: pydicom raises OSError, too, but without an errno."""
    return isinstance(error, PARSER_ERRORS) or (isinstance(error, OSError) and error.errno is None)


_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_BINARY_FORMATS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_BINARY_SIZES = {"H": 2, "h": 2, "I": 4, "i": 4, "f": 4, "d": 8}


@dataclass(frozen=True, kw_only=True)
class Where:
    """The object a message is about. sop_instance_uid is empty where it could not be read."""

    file: Path
    sop_instance_uid: str = ""

    def __str__(self) -> str:
        if not self.sop_instance_uid:
            return f"file {self.file.name}"
        return f"SOP Instance UID {self.sop_instance_uid} (file {self.file.name})"


class AttributeRejected(Rejected):
    """An attribute of the input is at fault. `keyword` is its DICOM keyword, `sop_instance_uid` may be empty."""

    def __init__(self, keyword: str, problem: str, where: Where, advice: str) -> None:
        super().__init__(f"{attribute(keyword)} {problem} in {where}: {advice}")
        self.keyword = keyword
        self.sop_instance_uid = where.sop_instance_uid
        self.file = where.file


@lru_cache(maxsize=512)
def _tag(keyword: str) -> BaseTag:
    return Tag(keyword)


def attribute(keyword: str) -> str:
    """`Rows (0028,0010)`."""
    tag = tag_for_keyword(keyword)
    return keyword if tag is None else f"{keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X})"


def texts(ds: Dataset, keyword: str, where: Where) -> tuple[str, ...]:
    """All values as text, stripped of padding; empty when the attribute is absent or empty."""
    tag = _tag(keyword)
    if tag not in ds:
        return ()
    try:
        element = ds.get_item(tag)
    except READ_ERRORS as error:
        raise AttributeRejected(keyword, "cannot be read", where, "the object is damaged; send it again") from error
    value = element.value
    if isinstance(element, RawDataElement) and isinstance(value, bytes):
        return _decoded(element, value, keyword, where)
    if value is None:
        return ()
    values = list(value) if isinstance(value, MultiValue | list | tuple) else [value]
    found = tuple(str(v).strip(" \0\r\n\t") for v in values)
    return () if all(v == "" for v in found) else found


def _decoded(element: RawDataElement, value: bytes, keyword: str, where: Where) -> tuple[str, ...]:
    vr = element.VR if element.VR not in (None, "UN") else dictionary_VR(element.tag)
    if vr == "US or SS":
        vr = "US"
    code = _BINARY_FORMATS.get(str(vr))
    if code is None:
        stripped = value.decode("latin-1").strip(" \0\r\n\t")
        return tuple(v.strip(" \0\r\n\t") for v in stripped.split("\\")) if stripped else ()
    size = _BINARY_SIZES[code]
    if len(value) % size:
        problem = f"has {len(value)} bytes, which is no whole number of {vr} values,"
        raise AttributeRejected(keyword, problem, where, "the object is damaged; send it again")
    order = "<" if element.is_little_endian else ">"
    return tuple(repr(v) for v in struct.unpack(f"{order}{len(value) // size}{code}", value))


def text(ds: Dataset, keyword: str, where: Where) -> str:
    """The first value as text, or "" when absent or empty."""
    found = texts(ds, keyword, where)
    return found[0] if found else ""


def numbers(ds: Dataset, keyword: str, where: Where) -> tuple[float, ...]:
    """All values as finite numbers; empty when absent or empty."""
    found = texts(ds, keyword, where)
    parsed = []
    for value in found:
        number = float(value) if _DECIMAL.fullmatch(value) else math.nan
        if not math.isfinite(number):
            raise AttributeRejected(keyword, "is not a finite number", where, "correct it at the sender")
        parsed.append(number)
    return tuple(parsed)


def number(ds: Dataset, keyword: str, where: Where) -> float | None:
    """The first value as a finite number, or None when absent or empty."""
    found = numbers(ds, keyword, where)
    return found[0] if found else None


def integer(ds: Dataset, keyword: str, where: Where) -> int | None:
    """The only value as a whole number, or None when absent or empty."""
    found = number(ds, keyword, where)
    if found is None:
        return None
    if not found.is_integer():
        raise AttributeRejected(keyword, "is not a whole number", where, "correct it at the sender")
    return int(found)


def uid(ds: Dataset, keyword: str, where: Where) -> str:
    """A UID, or "" when absent or empty. Raises AttributeRejected for what is no UID (PS3.5 section 9)."""
    found = text(ds, keyword, where)
    if found and (len(found) > 64 or not _UID.fullmatch(found)):
        raise AttributeRejected(keyword, "is not a valid UID", where, "correct it at the sender")
    return found


def required_uid(ds: Dataset, keyword: str, where: Where) -> str:
    """A UID that must be there."""
    found = uid(ds, keyword, where)
    if not found:
        raise absent(keyword, where, "the object cannot be referred to; send it with its original UIDs")
    return found


def absent(keyword: str, where: Where, advice: str) -> AttributeRejected:
    """The refusal for an attribute that is absent or empty."""
    return AttributeRejected(keyword, "is absent or empty", where, advice)


def items(ds: Dataset, keyword: str, where: Where) -> tuple[Dataset, ...]:
    """The items of a sequence; empty when absent or empty."""
    tag = _tag(keyword)
    if tag not in ds:
        return ()
    try:
        value = ds[tag].value
        if value is None or value == b"":
            return ()
        if isinstance(value, DicomSequence):
            return tuple(value)
    except READ_ERRORS as error:
        raise AttributeRejected(keyword, "cannot be read", where, "the object is damaged; send it again") from error
    raise AttributeRejected(keyword, "is not a sequence", where, "correct it at the sender")
