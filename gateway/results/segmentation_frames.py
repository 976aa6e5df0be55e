"""Frames of a Segmentation as bytes: per-frame functional groups and pixel data (PS3.3 C.7.6.16, PS3.5 8.2, A.4).

A whole-body result has ten thousand frames. One pydicom data set for each takes longer and more memory than all
pixels do, so a frame's functional groups are those of its plane, encoded once, with the numbers of the segment filled
in; pixels are made plane by plane when they are written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from gateway.results.content import Encoding, ResultContent

MOST_BYTES = 0xFFFF_FFFE
"""Value length of an element that is not encapsulated (PS3.5 7.1.1): even, and below the undefined length."""
_CHUNK_BYTES = 1 << 20
_DIMENSION_INDEX_VALUES = b"\x20\x00\x57\x91UL"
_REFERENCED_SEGMENT_NUMBER = b"\x62\x00\x0b\x00US\x02\x00"
_PER_FRAME_SEQUENCE = b"\x00\x52\x30\x92SQ\x00\x00"
_PIXEL_DATA = b"\xe0\x7f\x10\x00OB\x00\x00"
_RLE_HEADER_BYTES = 64
_RLE_MOST = 128
_ITEM = b"\xfe\xff\x00\xe0"
_END_OF_FRAMES = b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"


@dataclass(frozen=True, kw_only=True)
class FrameOrder:
    """Which frames there are, in stored order: all planes of the first segment, of the second, …

    planes: slices z that have a frame of any segment, in the order of their dimension index. Frame i is of segment
    segments[i] (from 0) and plane planes[plane_indices[i]]; segments is empty for a label map, whose frames are the
    planes.
    """

    planes: tuple[int, ...]
    segments: NDArray[np.intp]
    plane_indices: NDArray[np.intp]


def label_values(labels: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.bool_]:
    """(Z, highest value + 1): whether value v lies anywhere in slice z."""
    found = np.zeros((labels.shape[0], int(labels.max(initial=0)) + 1), dtype=np.bool_)
    for z in range(labels.shape[0]):
        flat = labels[z].reshape(-1)
        # A value is there where one of its runs ends: far fewer voxels to look at than all.
        found[z][flat[:-1][flat[1:] != flat[:-1]]] = True
        found[z][flat[-1]] = True
    return found


def segments_present(content: ResultContent) -> NDArray[np.bool_]:
    """(Z, segments): which slices have a voxel of which segment. Without any voxel the first slice has all segments,
    because an object without frames is not a Segmentation."""
    values = label_values(content.labels)
    present = np.zeros((values.shape[0], len(content.segments)), dtype=np.bool_)
    for index, segment in enumerate(content.segments):
        present[:, index] = values[:, _region(segment.region, values.shape[1])].any(axis=1)
    if not present.any():
        present[0] = True
    return present


def frame_order(present: NDArray[np.bool_], planes: Sequence[int], encoding: Encoding) -> FrameOrder:
    """BINARY: one frame for each segment and slice that it has voxels in. LABELMAP: one for each of the slices."""
    if encoding == "LABELMAP":
        none = np.zeros(0, dtype=np.intp)
        return FrameOrder(planes=tuple(planes), segments=none, plane_indices=np.arange(len(planes)))
    segments, plane_indices = np.nonzero(present[list(planes)].T)
    return FrameOrder(planes=tuple(planes), segments=segments, plane_indices=plane_indices)


def overlap_anywhere(content: ResultContent) -> bool:
    """Whether some voxel belongs to two segments."""
    values = [value for segment in content.segments for value in set(segment.region)]
    shared = [value for value in set(values) if value > 0 and values.count(value) > 1]
    return bool(np.isin(content.labels, shared).any())


def _region(region: Sequence[int], values: int) -> list[int]:
    return [value for value in region if 0 < value < values]


def functional_groups(templates: Sequence[Dataset], order: FrameOrder) -> Iterator[bytes]:
    """The element PerFrameFunctionalGroupsSequence.

    templates[i]: item of a frame in plane order.planes[i]. Where segments are numbered per frame, the first dimension
    index and ReferencedSegmentNumber become those of the frame's segment; else items are written as they are.
    """
    items = [_encoded(template) for template in templates]
    if any(len(item) % 2 for item in items):
        raise ValueError("an encoded functional group has an odd length (PS3.5 7.1.1)")
    lengths = np.array([len(item) + 8 for item in items])
    yield _PER_FRAME_SEQUENCE + struct.pack("<I", int(lengths[order.plane_indices].sum()))
    if not len(order.segments):
        for item in items:
            yield _ITEM + struct.pack("<I", len(item)) + item
        return
    numbered = [_NumberedItem(item) for item in items]
    frames = zip(order.segments.tolist(), order.plane_indices.tolist(), strict=True)
    yield from _joined(numbered[plane].of_segment(segment + 1) for segment, plane in frames)


class _NumberedItem:
    """An encoded item whose segment can be exchanged."""

    def __init__(self, item: bytes) -> None:
        self._bytes = bytearray(_ITEM + struct.pack("<I", len(item)) + item)
        self._dimension = self._bytes.index(_DIMENSION_INDEX_VALUES) + len(_DIMENSION_INDEX_VALUES) + 2
        # A model with one segment names it once, in the shared functional groups.
        found = self._bytes.find(_REFERENCED_SEGMENT_NUMBER)
        self._number = found + len(_REFERENCED_SEGMENT_NUMBER) if found >= 0 else None

    def of_segment(self, number: int) -> bytes:
        struct.pack_into("<I", self._bytes, self._dimension, number)
        if self._number is not None:
            struct.pack_into("<H", self._bytes, self._number, number)
        return bytes(self._bytes)


def bit_packed_bytes(content: ResultContent, order: FrameOrder) -> int:
    """Length of the value of `bit_packed`, padding included."""
    _, rows, columns = content.labels.shape
    length = -(-len(order.segments) * int(rows) * int(columns) // 8)
    return length + length % 2


def bit_packed(content: ResultContent, order: FrameOrder) -> Iterator[bytes]:
    """The element Pixel Data, one bit a voxel, first voxel in the lowest bit; frames follow each other without
    padding, also within a byte (PS3.5 8.2, PS3.5 annex D)."""
    _, rows, columns = content.labels.shape
    length = bit_packed_bytes(content, order)
    yield _PIXEL_DATA + struct.pack("<I", length)
    masks = _masks(content, order)
    if rows * columns % 8 == 0:
        yield from _joined(np.packbits(mask, bitorder="little").tobytes() for mask in masks)
        return
    written, rest = 0, np.zeros(0, dtype=np.bool_)
    for mask in masks:
        bits = np.concatenate((rest, mask))
        whole = bits.size // 8 * 8
        packed, rest = np.packbits(bits[:whole], bitorder="little").tobytes(), bits[whole:]
        written += len(packed)
        yield packed
    last = np.packbits(rest, bitorder="little").tobytes()
    yield last.ljust(length - written, b"\0")


def _masks(content: ResultContent, order: FrameOrder) -> Iterator[NDArray[np.bool_]]:
    """(rows * columns,) of each frame."""
    highest = int(content.labels.max(initial=0))
    regions = [_region(segment.region, highest + 1) for segment in content.segments]
    for segment, index in zip(order.segments.tolist(), order.plane_indices.tolist(), strict=True):
        flat = content.labels[order.planes[index]].reshape(-1)
        mask = np.zeros(flat.size, dtype=np.bool_)
        for value in regions[segment]:
            mask |= flat == value
        yield mask


def run_length_encoded(content: ResultContent, order: FrameOrder) -> list[bytes]:
    """Segment numbers of each frame in RLE (PS3.5 annex G), each of even length."""
    table = content.segment_number_table()
    if table.dtype == content.labels.dtype and np.array_equal(table, np.arange(table.size)):
        return [rle_frame(content.labels[z]) for z in order.planes]
    return [rle_frame(table[content.labels[z]]) for z in order.planes]


def rle_frame(numbers: NDArray[np.unsignedinteger[Any]]) -> bytes:
    """One (rows, columns) frame: a header, then one segment for each byte of a pixel, most significant first.

    The encoders that pydicom finds take six times as long, or abort the process at a frame of odd size.
    """
    pixels = numbers.astype(numbers.dtype.newbyteorder(">"), copy=False)
    planes = pixels.view(np.uint8).reshape(*numbers.shape, numbers.itemsize)
    segments = [_rle_segment(np.ascontiguousarray(planes[..., byte])) for byte in range(numbers.itemsize)]
    offsets = np.cumsum([_RLE_HEADER_BYTES, *(len(segment) for segment in segments[:-1])])
    header = struct.pack(f"<{1 + len(segments)}I", len(segments), *offsets.tolist())
    return header.ljust(_RLE_HEADER_BYTES, b"\0") + b"".join(segments)


def _rle_segment(plane: NDArray[np.uint8]) -> bytes:
    """PackBits (PS3.5 G.3.1) in replicate runs alone, a single byte as a literal run of one: labels are made of runs.

    Runs end with their row (PS3.5 G.3.1) and after 128 bytes."""
    rows, columns = plane.shape
    flat = plane.reshape(-1)
    begins = np.ones(flat.size, dtype=np.bool_)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins.reshape(rows, columns)[:, 0] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=flat.size)
    pieces = -(-lengths // _RLE_MOST)
    piece_lengths = np.full(int(pieces.sum()), _RLE_MOST)
    piece_lengths[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * _RLE_MOST
    encoded = np.empty((piece_lengths.size, 2), dtype=np.uint8)
    encoded[:, 0] = np.where(piece_lengths > 1, 257 - piece_lengths, 0)
    encoded[:, 1] = np.repeat(flat[starts], pieces)
    return encoded.tobytes()


def encapsulated(frames: Sequence[bytes]) -> Iterator[bytes]:
    """The element Pixel Data with a Basic Offset Table and one fragment for each frame (PS3.5 A.4)."""
    offsets = np.cumsum([0, *(len(frame) + 8 for frame in frames[:-1])]).astype("<u4")
    yield _PIXEL_DATA + b"\xff\xff\xff\xff" + _ITEM + struct.pack("<I", offsets.nbytes) + offsets.tobytes()
    for frame in frames:
        yield _ITEM + struct.pack("<I", len(frame)) + frame
    yield _END_OF_FRAMES


def _encoded(dataset: Dataset) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, dataset)
    return buffer.getvalue()


def _joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of about a megabyte."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= _CHUNK_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)
