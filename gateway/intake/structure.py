"""Walks the elements of an encoded data set without decoding values, in bounded memory and without recursion.

Whatever passes here has lengths that fit, sequences that end, and a bounded depth, so that a toolkit can be let at
it (PS3.5 clause 7). What does not pass is rejected with the attribute and the byte offset.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pydicom.datadict import dictionary_VR, keyword_for_tag

from gateway.intake.errors import IntakeRejected

MAX_DEPTH = 64  # sequences in sequences; the deepest real reports stay below 20
MAX_ELEMENTS = 2_000_000

_UNDEFINED = 0xFFFFFFFF
_ITEM = 0xFFFEE000
_ITEM_DELIMITER = 0xFFFEE00D
_SEQUENCE_DELIMITER = 0xFFFEE0DD
_PIXEL_DATA = 0x7FE00010
_PIXEL_GROUP = 0x7FE0
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_FRAGMENT_VRS = frozenset({b"OB", b"OW"})


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What the walk found. Offsets and lengths are in bytes of the data set."""

    is_implicit_vr: bool  # as found, which is not always as declared
    header_end: int  # where group 7FE0 (or the data set) ends the header
    pixel_data_length: int | None  # native: length of PixelData; encapsulated: sum of its fragments; None: absent
    is_encapsulated: bool


@dataclass
class _Level:
    """A data set (is_items False) or a list of items (True) that is being walked."""

    end: int | None  # None: until its delimiter
    limit: int  # end of the innermost enclosing defined length
    is_items: bool
    is_implicit: bool
    tag: int  # the sequence, for messages


def attribute_name(tag: int) -> str:
    """E.g. "PatientID (0010,0020)"."""
    keyword = keyword_for_tag(tag) or ("private element" if (tag >> 16) % 2 else "unknown element")
    return f"{keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X})"


def walk(
    data: bytes | bytearray | memoryview, *, is_implicit_vr: bool, is_little_endian: bool, length: int | None = None
) -> Structure:
    """Walk the whole data set. Raises IntakeRejected.

    `length`: bytes of the whole data set where `data` is only its beginning. The walk then ends with `data`, which must
    hold the header; pixels that are longer are measured against `length`.
    """
    with memoryview(data) as view:  # released even when a traceback keeps the walker: the caller may unmap the file
        whole = len(view) if length is None else length
        return _Walker(view, is_implicit_vr=is_implicit_vr, is_little_endian=is_little_endian, length=whole).run()


class _Walker:
    def __init__(self, data: memoryview, *, is_implicit_vr: bool, is_little_endian: bool, length: int) -> None:
        self._data = data
        self._length = length
        order = "<" if is_little_endian else ">"
        self._tag_and_length = struct.Struct(order + "HHL")
        self._explicit = struct.Struct(order + "HH2sH")
        self._long = struct.Struct(order + "L")
        self._is_implicit = _found_implicit(data, declared=is_implicit_vr)
        self._header_end: int | None = None
        self._pixel_data_length: int | None = None
        self._is_encapsulated = False

    def run(self) -> Structure:
        data_end = self._length
        if data_end < 8:
            raise IntakeRejected(f"the data set has only {data_end} bytes")
        stack = [_Level(end=data_end, limit=data_end, is_items=False, is_implicit=self._is_implicit, tag=0)]
        position = 0
        count = 0
        while stack:
            level = stack[-1]
            if level.end is not None and position >= level.end:
                stack.pop()
                continue
            if position + 8 > level.limit:
                if len(stack) == 1:
                    break  # fewer than eight bytes after the last element: padding
                raise IntakeRejected(f"ends inside the sequence, at byte {position}", attribute_name(level.tag))
            if self._is_beyond(position):
                break
            count += 1
            if count > MAX_ELEMENTS:
                raise IntakeRejected(f"more than {MAX_ELEMENTS} elements")
            step = self._item if level.is_items else self._element
            position = step(stack, level, position)
            if len(stack) > 2 * MAX_DEPTH:
                raise IntakeRejected(f"more than {MAX_DEPTH} sequences inside each other", attribute_name(stack[1].tag))
        if self._header_end is None and len(self._data) < data_end:
            raise IntakeRejected(f"the header has more than {len(self._data)} bytes")
        return Structure(
            is_implicit_vr=self._is_implicit,
            header_end=data_end if self._header_end is None else self._header_end,
            pixel_data_length=self._pixel_data_length,
            is_encapsulated=self._is_encapsulated,
        )

    def _is_beyond(self, position: int) -> bool:
        """No element can be read here, because only the beginning of the data set is at hand."""
        if position + 12 <= len(self._data) or len(self._data) == self._length:
            return False
        if self._header_end is None:
            raise IntakeRejected(f"the header has more than {len(self._data)} bytes")
        return True

    def _item(self, stack: list[_Level], level: _Level, position: int) -> int:
        group, number, length = self._tag_and_length.unpack_from(self._data, position)
        tag = group << 16 | number
        if tag == _SEQUENCE_DELIMITER:
            stack.pop()
            return position + 8
        if tag != _ITEM:
            raise IntakeRejected(
                f"({group:04X},{number:04X}) stands where an item must be, at byte {position}",
                attribute_name(level.tag),
            )
        start = position + 8
        end = None if length == _UNDEFINED else start + length
        if end is not None and end > level.limit:
            raise IntakeRejected(
                f"an item announces {length} bytes, {level.limit - start} are left, at byte {position}",
                attribute_name(level.tag),
            )
        stack.append(
            _Level(
                end=end,
                limit=level.limit if end is None else end,
                is_items=False,
                is_implicit=level.is_implicit,
                tag=level.tag,
            )
        )
        return start

    def _element(self, stack: list[_Level], level: _Level, position: int) -> int:
        tag, vr, length, start = self._head(level, position)
        if tag == _ITEM_DELIMITER and level.end is None:
            stack.pop()
            return position + 8
        at_top = len(stack) == 1
        if tag >> 16 == 0xFFFE:
            raise IntakeRejected(
                f"a delimiter ({tag >> 16:04X},{tag & 0xFFFF:04X}) without an item, at byte {position}"
            )
        if at_top and tag >> 16 == _PIXEL_GROUP and self._header_end is None:
            self._header_end = position
        if length == _UNDEFINED:
            if tag == _PIXEL_DATA or vr in _FRAGMENT_VRS:
                position, size = self._fragments(level, tag, start)
                if at_top and tag == _PIXEL_DATA:
                    self._pixel_data_length, self._is_encapsulated = size, True
                return position
            # UN of undefined length holds Implicit VR Little Endian (PS3.5 6.2.2 note 7).
            implicit = level.is_implicit or vr == b"UN"
            stack.append(_Level(end=None, limit=level.limit, is_items=True, is_implicit=implicit, tag=tag))
            return start
        end = start + length
        if end > level.limit:
            raise IntakeRejected(
                f"{length} bytes announced, {level.limit - start} are left, at byte {position}", attribute_name(tag)
            )
        if at_top and tag == _PIXEL_DATA:
            self._pixel_data_length = length
        if length and (vr == b"SQ" or (vr == b"" and _is_sequence(tag))):
            stack.append(_Level(end=end, limit=end, is_items=True, is_implicit=level.is_implicit, tag=tag))
            return start
        return end

    def _head(self, level: _Level, position: int) -> tuple[int, bytes, int, int]:
        """(tag, VR or b"" when implicit, length, offset of the value) of the element at `position`."""
        if not level.is_implicit:
            group, number, vr, length = self._explicit.unpack_from(self._data, position)
            tag = group << 16 | number
            if b"AA" <= vr <= b"ZZ" and 0x41 <= vr[1] <= 0x5A:
                if vr not in _LONG_VRS:
                    return tag, vr, length, position + 8
                if position + 12 > level.limit:
                    raise IntakeRejected(f"ends inside the length, at byte {position}", attribute_name(tag))
                (length,) = self._long.unpack_from(self._data, position + 8)
                return tag, vr, length, position + 12
        # Implicit, or an element without a VR in an explicit data set: length in four bytes, as toolkits read it.
        group, number, length = self._tag_and_length.unpack_from(self._data, position)
        return group << 16 | number, b"", length, position + 8

    def _fragments(self, level: _Level, tag: int, position: int) -> tuple[int, int]:
        """Walk encapsulated pixel data (PS3.5 A.4): (offset after it, bytes in its fragments)."""
        size = 0
        while True:
            if position + 8 > level.limit:
                raise IntakeRejected(f"ends without a sequence delimiter, at byte {position}", attribute_name(tag))
            if self._is_beyond(position):
                raise IntakeRejected("encapsulated in a deflated data set (PS3.5 A.5)", attribute_name(tag))
            group, number, length = self._tag_and_length.unpack_from(self._data, position)
            item, start = group << 16 | number, position + 8
            if item == _SEQUENCE_DELIMITER:
                return start, size
            if item != _ITEM or length == _UNDEFINED:
                raise IntakeRejected(f"no fragment where one must be, at byte {position}", attribute_name(tag))
            if start + length > level.limit:
                raise IntakeRejected(
                    f"a fragment announces {length} bytes, {level.limit - start} are left, at byte {position}",
                    attribute_name(tag),
                )
            size += length
            position = start + length


def _found_implicit(data: memoryview, *, declared: bool) -> bool:
    """Some senders declare one VR form and send the other; two capital letters where a VR stands decide."""
    if len(data) < 8:
        return declared
    letters = bytes(data[4:6])
    looks_explicit = all(0x41 <= letter <= 0x5A for letter in letters)
    return not looks_explicit


def _is_sequence(tag: int) -> bool:
    try:
        return dictionary_VR(tag) == "SQ"
    except KeyError:
        return False
