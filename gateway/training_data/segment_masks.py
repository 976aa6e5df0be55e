"""DICOM Segmentation (PS3.3 A.51) and Label Map Segmentation (Supplement 243) → voxels on the grid of their images.

Frames are taken one by one, in any order, each from its own position, orientation and pixel spacing: nothing is assumed
of their number or of the slices that have none. FRACTIONAL values count from a threshold on. Two frames of one segment
at one position (time points) are no one mask, and are refused unless they are the same.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import UID

from engine.volume import Geometry
from gateway.errors import Rejected
from gateway.results import attributes
from gateway.results.attributes import PARSER_ERRORS, AttributeRejected, Where
from gateway.results.frames import directions, macro, read_header, vector
from gateway.results.pixels import PIXEL_DATA, number_of_frames
from gateway.results.series import MAX_VOXELS
from gateway.training_data.grid_placement import Placement, place
from gateway.training_data.label_objects import LABEL_MAP_SEGMENTATION, source_images
from gateway.training_data.label_painting import LabelPainter

_DEFERRED_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Index from 0, its functional groups, and the segment that it is of (None: pixels say)."""

    index: int
    groups: tuple[Dataset, ...]
    segment: int | None


def paint_segments(
    file: Path,
    values: Mapping[int, int],
    geometry: Geometry,
    painter: LabelPainter,
    *,
    threshold: float,
    absent: frozenset[str] = frozenset(),
) -> None:
    """Paint the segments of a SEG object. values: segment number → label value; other segments are passed over.

    threshold: share of MaximumFractionalValue from which on a voxel of a FRACTIONAL segment counts. Raises Rejected
    (AttributeRejected) when the object cannot be read, does not lie on the grid `geometry`, or has frames of one
    segment at one position that differ, or voxels on images that are `absent` (SOP Instance UIDs).
    """
    where = Where(file=file)
    header = read_header(file, where)
    where = Where(file=file, sop_instance_uid=attributes.required_uid(header, "SOPInstanceUID", where))
    rows, columns = (_size(header, keyword, where) for keyword in ("Rows", "Columns"))
    if rows * columns > MAX_VOXELS:
        problem = f"and Columns make {rows} x {columns} pixels a frame,"
        raise AttributeRejected("Rows", problem, where, "the object is damaged; export it again")
    least = _least(header, where, threshold)
    frames = [f for f in _frames(header, where) if f.segment is None or f.segment in values]
    placements = [_placement(frame, rows, columns, geometry, header, where) for frame in frames]
    _check_positions(file, values, frames, placements, (rows, columns), where)
    for frame, placement, pixels in zip(frames, placements, _pixels(file, frames, where), strict=True):
        if pixels.shape != (rows, columns):
            problem = f"holds a frame of {pixels.shape} pixels instead of {(rows, columns)}"
            raise AttributeRejected("PixelData", problem, where, "the object is damaged; export it again")
        sources = frozenset().union(*(source_images(group, where) for group in frame.groups)) if absent else frozenset()
        of_frame = [int(n) for n in np.unique(pixels)] if frame.segment is None else [frame.segment]
        for number in (n for n in of_frame if n in values):
            mask = pixels >= least if frame.segment is not None else pixels == number
            if sources and sources <= absent and mask.any():
                raise Rejected(
                    f"frame {frame.index + 1} of {where}: has {int(mask.sum())} voxels of segment {number} on an image "
                    "that is not in the source; add the slices that the series lacks, or take the labels by their "
                    "coordinates (--ignore-references)"
                )
            _paint(values[number], mask, placement, geometry, painter, where, frame)


def _check_positions(
    file: Path,
    values: Mapping[int, int],
    frames: Sequence[_Frame],
    placements: Sequence[Placement],
    size: tuple[int, int],
    where: Where,
) -> None:
    """Raises Rejected for frames of one segment (of a label map: frames) over the same voxels whose pixels differ."""
    there: dict[tuple[int | None, bytes], list[_Frame]] = {}
    for frame, placement in zip(frames, placements, strict=True):
        first, last = placement.shift, placement.shift + placement.turn @ (size[1] - 1, size[0] - 1)
        # Whichever way the rows run.
        covered = np.stack([np.minimum(first, last), np.maximum(first, last)]).tobytes()
        there.setdefault((frame.segment, covered), []).append(frame)
    positions: Counter[int] = Counter()
    for (segment, _), shared in there.items():
        if len(shared) < 2:
            continue
        pixels = _pixels(file, shared, where)
        one = next(pixels)
        differing: set[int] = set()
        for other in pixels:
            if segment is not None and not np.array_equal(one, other):
                differing.add(segment)
            elif segment is None and one.shape == other.shape:
                differing.update(int(n) for both in (one, other) for n in np.unique(both[one != other]))
        positions.update(differing & set(values))
    if positions:
        found = ", ".join(f"segment {n} at {times} position(s)" for n, times in sorted(positions.items()))
        raise Rejected(
            f"{where}: several frames at one position that differ, of {found} (time points?), and nothing says which "
            "are meant; export one segmentation for each time point"
        )


def _paint(
    value: int,
    mask: NDArray[np.bool_],
    placement: Placement,
    geometry: Geometry,
    painter: LabelPainter,
    where: Where,
    frame: _Frame,
) -> None:
    row, column = np.nonzero(mask)
    if row.size:
        painter.paint(value, *placement.apply((column, row), geometry, f"frame {frame.index + 1} of {where}"))


def _size(header: Dataset, keyword: str, where: Where) -> int:
    size = attributes.integer(header, keyword, where)
    if size is None or not 1 <= size <= 65_535:
        raise AttributeRejected(keyword, f"is {size}", where, "the object is damaged; export it again")
    return size


def _least(header: Dataset, where: Where, threshold: float) -> float:
    """The stored value from which on a voxel belongs to the segment."""
    if attributes.text(header, "SegmentationType", where) != "FRACTIONAL":
        return 1
    full = attributes.integer(header, "MaximumFractionalValue", where)
    if full is None or full < 1:
        raise AttributeRejected("MaximumFractionalValue", f"is {full}", where, "export the segmentation again")
    return max(threshold * full, 1)


def _frames(header: Dataset, where: Where) -> Iterator[_Frame]:
    shared = attributes.items(header, "SharedFunctionalGroupsSequence", where)[:1]
    per_frame = attributes.items(header, "PerFrameFunctionalGroupsSequence", where)
    count = number_of_frames(header, where)
    if len(per_frame) != count:
        problem = f"has {len(per_frame)} items for {count} frames"
        raise AttributeRejected("PerFrameFunctionalGroupsSequence", problem, where, "export the segmentation again")
    is_label_map = attributes.text(header, "SOPClassUID", where) == LABEL_MAP_SEGMENTATION or (
        attributes.text(header, "SegmentationType", where) == "LABELMAP"
    )
    for index, groups in enumerate(per_frame):
        yield _Frame(
            index=index,
            groups=(groups, *shared),
            segment=None if is_label_map else _segment(index, (groups, *shared), where),
        )


def _segment(index: int, groups: tuple[Dataset, ...], where: Where) -> int:
    identified = macro(groups, ("SegmentIdentificationSequence",), where)
    number = None if identified is None else attributes.integer(identified, "ReferencedSegmentNumber", where)
    if number is None:
        problem = f"is absent in frame {index + 1}"
        raise AttributeRejected("ReferencedSegmentNumber", problem, where, "export the segmentation again")
    return number


def _placement(frame: _Frame, rows: int, columns: int, geometry: Geometry, header: Dataset, where: Where) -> Placement:
    levels = [
        header if (found := macro(frame.groups, (keyword,), where)) is None else found
        for keyword in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    ]
    origin_mm = vector(levels[0], "ImagePositionPatient", 3, where)
    row, column = directions(levels[1], where)
    spacing_y, spacing_x = vector(levels[2], "PixelSpacing", 2, where)
    if min(spacing_y, spacing_x) <= 0:
        raise AttributeRejected("PixelSpacing", "is not positive", where, "export the segmentation again")
    return place(
        origin_mm=origin_mm,
        steps_mm=np.stack([row * spacing_x, column * spacing_y], axis=1),
        sizes=(columns, rows),
        target=geometry,
        what=f"frame {frame.index + 1} of {where}",
    )


def _pixels(file: Path, frames: Sequence[_Frame], where: Where) -> Iterator[NDArray[np.integer]]:
    """Stored values of these frames; the whole object is never in memory."""
    if not frames:
        return
    try:
        packed = _packed_bits(file, where)
        if packed is not None:
            yield from _unpacked(file, packed, [frame.index for frame in frames])
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a decoder finds odd, and its message, is the object's
            yield from iter_pixels(file, indices=[frame.index for frame in frames], raw=True)
    except Rejected:
        raise
    except PARSER_ERRORS as error:
        problem = "cannot be decoded"
        raise AttributeRejected("PixelData", problem, where, "export the segmentation again, uncompressed") from error


@dataclass(frozen=True, kw_only=True)
class _PackedBits:
    """Uncompressed frames of one bit a pixel, which need not begin at a byte; `start`: of the first one in the file."""

    start: int
    rows: int
    columns: int


def _packed_bits(file: Path, where: Where) -> _PackedBits | None:
    """None where the pixels are no such frames. Refuses uncompressed pixels that end before the last frame: a decoder
    that reads a file frame by frame takes what follows for pixels."""
    ds = dcmread(file, defer_size=_DEFERRED_BYTES)
    syntax = UID(attributes.required_uid(ds.file_meta, "TransferSyntaxUID", where))
    element = ds.get_item(PIXEL_DATA, keep_deferred=True) if PIXEL_DATA in ds else None
    if syntax.is_encapsulated or not isinstance(element, RawDataElement):
        return None
    bits = attributes.integer(ds, "BitsAllocated", where) or 0
    rows, columns = _size(ds, "Rows", where), _size(ds, "Columns", where)
    expected = (rows * columns * number_of_frames(ds, where) * bits + 7) // 8
    if element.length < expected:
        problem = f"is truncated ({element.length} of {expected} bytes)"
        raise AttributeRejected("PixelData", problem, where, "the object is incomplete; export it again")
    if bits != 1 or syntax.is_deflated or not syntax.is_little_endian:
        return None
    return _PackedBits(start=element.value_tell, rows=rows, columns=columns)


def _unpacked(file: Path, packed: _PackedBits, indices: list[int]) -> Iterator[NDArray[np.integer]]:
    """PS3.5 8.2, D: pixels follow each other without gaps, over the ends of rows and frames; the first is the lowest
    bit. (pydicom 3.0 reads frames by themselves only where they begin at a byte.)"""
    size = packed.rows * packed.columns
    with file.open("rb") as stream:
        for index in indices:
            first, offset = divmod(index * size, 8)
            stream.seek(packed.start + first)
            content = np.frombuffer(stream.read((offset + size + 7) // 8), np.uint8)
            bits = np.unpackbits(content, bitorder="little")[offset : offset + size]
            yield bits.reshape(packed.rows, packed.columns)
